"""Load, run and save any Hugging Face dual encoder: the model class of teachers and students."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from edgeclip.compress.teachers.families import (
    Padding,
    family_of,
    text_padding,
    text_positions,
)
from edgeclip.compress.teachers.licence import is_restricted
from edgeclip.compress.teachers.model_folder import model_folder, read_json
from edgeclip.compress.teachers.model_parts import check_parts
from edgeclip.compress.teachers.own_settings import own_settings
from edgeclip.compress.teachers.read_model import ModelParts, read_model
from edgeclip.runtime.bundle.files import atomic_directory
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Basis, read_basis
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.preprocess import preprocess_batch
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import EncoderSpec, ImageSpec, TextSpec, Tower, plain_spec

# Settings of the process that saved the tokenizer, not of the tokenizer.
_PRIVATE = ("backend", "is_local", "local_files_only")


def write_portable_config(folder: Path) -> None:
    """Rewrite `tokenizer_config.json`, beside `tokenizer.json`, so that transformers 4 reads it.

    transformers 5 calls a tokenizer without a class of its own "TokenizersBackend", a name
    that older releases and optimum's runtimes do not know; they call it
    "PreTrainedTokenizerFast". That class takes `add_prefix_space` from the settings, where
    the new one leaves it to `tokenizer.json`, and it also returns `token_type_ids`, which no
    text tower takes, where the settings do not name what models take.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in _PRIVATE:
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        prefix = (tokenizer.get("pre_tokenizer") or {}).get("add_prefix_space")
        if prefix is not None:
            config["add_prefix_space"] = prefix
    if config.get("tokenizer_class") == "PreTrainedTokenizerFast":
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Only EdgeCLIP writes this file, so a directory that holds it may be replaced by a model.
MARKER = "edgeclip-model.json"
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The record of a saved model's embedding space; a student has its teacher's.

    `space` is the fingerprint of that space, `model` the one that the files define themselves, as
    saved: 64 hex digits each, from `space_fingerprint`. Version 1 has no `model`. `licence` is that
    of the weights that it was made from, where it is known.
    """

    schema_version: Literal[1, 2]
    space: str
    model: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("space", self.space), ("model", self.model)):
            if value is not None and not _HEX.fullmatch(value):
                raise ValueError(f"{name} must be 64 hexadecimal digits, got {value[:70]!r}")
        if (self.model is None) is (self.schema_version == 2):
            raise ValueError("model is for schema_version 2, and needed there")


def read_record(folder: Path) -> ModelRecord | None:
    """Read the record in a model's directory; None if EdgeCLIP did not save the model.

    Raises:
        ConfigError: the record is damaged, or of another version.
    """
    path = folder / MARKER
    return parse(ModelRecord, read_json(path), source=str(path)) if path.exists() else None


transformers.utils.logging.disable_progress_bar()  # a file or two is no long work
transformers.utils.logging.set_verbosity_error()  # `load` says itself which weights are amiss
_log = logging.getLogger(__name__)
_OF_MODELS = {".json", ".jsonl", ".txt", ".safetensors", ".bin", ".jinja", ".model"}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


class DualEncoder(nn.Module):
    """A CLIP-style pair of image and text towers whose embeddings share one space.

    Args:
        model: a model of one of the `FAMILIES`.
        image: the preprocessing of the image tower.
        tokenizer: a fast tokenizer with the tokens that a text of the family has.
        space: fingerprint of the teacher's embedding space, for a student; None if the
            model defines its own space.
        licence: of the weights, or of those that they were made from; None if nobody said it.

    Attributes:
        basis: by which embeddings of the space are cut, if the model was trained so; it is saved
            and loaded with the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image: ImageSpec,
        tokenizer: PreTrainedTokenizerFast,
        *,
        space: str | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        # Written out, attention trains 1.4 to 1.7 times as fast as the fused kernel in bfloat16
        # on a CPU, and exports to plain MatMul and Softmax.
        model.set_attn_implementation("eager")
        self.model = model
        self.family = family_of(model)
        self.image_spec = image
        self.tokenizer = tokenizer
        self.licence = licence
        self.basis: Basis | None = None
        self._space = space

    @property
    def space(self) -> str:
        """Fingerprint of the model's embedding space, 64 hex digits."""
        return self._space or space_fingerprint(self)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as float32."""
        return 4 * sum(weight.numel() for weight in self.parameters())

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor from cosines to logits."""
        parameter = self.model.logit_scale
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def logit_bias(self) -> float | None:
        """What a SigLIP adds to its logits; None for a model that answers with a softmax."""
        found = getattr(self.model, "logit_bias", None)
        return None if found is None else float(found.detach())

    @functools.cached_property
    def _frame(self) -> tuple[int | None, int | None]:
        """The first and the last id of every text, as the tokenizer puts them around one."""
        if self.text_padding == "seen":  # the only towers whose texts may lack one
            whole = self.tokenizer("a")["input_ids"]
            inner = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            if whole[: len(inner)] == inner and len(whole) <= len(inner) + 1:
                return None, int(whole[-1]) if len(whole) > len(inner) else None
        ids = self.tokenizer("")["input_ids"]
        if len(ids) == 2:
            return int(ids[0]), int(ids[1])
        return (
            _token(self.tokenizer, "bos_token_id", "cls_token_id"),
            _token(self.tokenizer, "eos_token_id", "sep_token_id"),
        )

    @property
    def text_padding(self) -> Padding:
        """How the text tower meets padding."""
        return text_padding(self.model)

    @property
    def _pad_id(self) -> int:
        found = _token(self.tokenizer, "pad_token_id", "eos_token_id", "sep_token_id")
        if self.pools_at_largest_id:  # where a padding id must never be the largest
            return min(found, self._frame[1] or 0)
        return found

    @property
    def _context_length(self) -> int:
        """The most tokens of a text: what tower and tokenizer both allow."""
        count = text_positions(self.model)
        if self.text_padding == "seen":  # trained on texts of the whole context
            return count
        return min(count, int(self.tokenizer.model_max_length))

    @property
    def spec(self) -> EncoderSpec:
        """Input contract and sizes, read from the model as it is now."""
        bos_id, eos_id = self._frame
        return EncoderSpec(
            dim=self.family.dim(self.model.config),
            image=self.image_spec,
            text=TextSpec(
                context_length=self._context_length,
                vocab_size=int(self.model.config.text_config.vocab_size),
                bos_id=bos_id,
                eos_id=eos_id,
                pad_id=self._pad_id,
                pad_to_context=self.text_padding == "seen",
            ),
            logit_scale=float(self.logit_scale.detach().exp()),
        )

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess RGB pictures to float32 [N, 3, size, size] on the model's device."""
        return torch.from_numpy(preprocess_batch(images, self.image_spec)).to(self.device)

    def normalise(self, crops: NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise crops uint8 [N, size, size, 3] to float32 [N, 3, size, size] on the device."""
        spec = self.image_spec
        pixels = torch.as_tensor(crops).to(self.device, non_blocking=True)
        mean, std = (torch.tensor(own, device=self.device) for own in (spec.mean, spec.std))
        normalised = (pixels.float() * (1 / 255) - mean) / std
        return normalised.permute(0, 3, 1, 2).contiguous()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokenize captions to int64 [N, length], cut at the context length, on the device.

        The length is that of the longest caption, or of the context where the tower asks for it.
        """
        return torch.from_numpy(self.text_tokenizer.encode(captions, truncate=True)).to(self.device)

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Embed normalised pixels [N, 3, size, size] as float32 [N, dim], L2-normalised."""
        model: Any = self.model  # PreTrainedModel itself has no such method
        features = model.get_image_features(pixel_values=pixel_values).pooler_output
        return nn.functional.normalize(features.float(), dim=-1)

    def embed_image_and_patches(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pixels as `embed_image` does; return the tower's patches beside it.

        These are float32 [N, side x side, width], row by row, as the last layer leaves them: the
        tokens behind a class token, or the places of a convolution.

        Raises:
            ConfigError: the tower has no square of patches.
        """
        model: Any = self.model
        found = model.get_image_features(pixel_values=pixel_values)
        tokens = getattr(found, "last_hidden_state", None)
        if tokens is None:
            raise ConfigError("the image tower does not tell its patches: leave out --patches")
        if tokens.dim() == 4:  # a convolution: [N, width, side, side]
            tokens = tokens.flatten(2).transpose(1, 2)
        count = math.isqrt(tokens.shape[1]) ** 2
        patches = tokens[:, tokens.shape[1] - count :].float()
        return nn.functional.normalize(found.pooler_output.float(), dim=-1), patches

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embed token ids, int64 [N, length], as float32 [N, dim], L2-normalised.

        Ids are bos .. eos, then padding, as `tokenize` makes them. Unless the tower ignores padding
        or was trained to see it, it gets a mask.
        """
        mask = None
        if self.text_padding == "masked":
            padding = (input_ids == self._pad_id).long()
            if self._pad_id == self._frame[1]:  # the first of them ends the text
                padding = (padding.cumsum(dim=-1) > padding).long()
            mask = 1 - padding
        model: Any = self.model
        features = model.get_text_features(input_ids=input_ids, attention_mask=mask)
        return nn.functional.normalize(features.pooler_output.float(), dim=-1)

    @property
    def is_causal_text(self) -> bool:
        """Whether the text tower is a CLIP's, which pools at the end-of-text token."""
        return self.text_padding == "unseen"

    @property
    def pools_at_largest_id(self) -> bool:
        """Whether the text tower pools at the largest id, as CLIPs from before 2023 do.

        transformers takes the `eos_token_id` 2 for the mark of such a checkpoint (its pull request
        24773); in any other CLIP it is the id of the token to pool at.
        """
        text = self.model.config.text_config
        return bool(text.model_type == "clip_text_model" and text.eos_token_id == 2)

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass, which takes time and saves memory.

        A tower that cannot do that in transformers is left as it is, if the other one can.

        Raises:
            ConfigError: neither tower can.
        """
        how = {"use_reentrant": False}
        try:
            self.model.gradient_checkpointing_enable(how)
            return
        except ValueError:
            pass  # a model of two towers does not say whether they can
        towers: tuple[Any, ...] = (self.model.vision_model, self.model.text_model)
        able = []
        for tower in towers:
            with contextlib.suppress(ValueError):
                tower.gradient_checkpointing_enable(how)
                able.append(tower)
        if not able:
            raise ConfigError(
                f"{type(self.model).__name__} cannot compute its activations again: leave out "
                "--gradient-checkpointing"
            )

    def tower_parts(self, tower: Tower) -> tuple[str, ...]:
        """Return the prefixes of a tower's names in `named_parameters` and `named_modules`."""
        return tuple(f"model.{name}" for name in self.family.tower_names(tower))

    def project(self, tower: Tower, pooled: Tensor) -> Tensor:
        """Map what a tower pools, float32 [N, width], to embeddings [N, dim], not normalised."""
        return self.family.project(self.model, tower, pooled)

    @functools.cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The runtime's tokenizer, so that training sees the same ids as the device."""
        return TextTokenizer(Tokenizer.from_str(self.tokenizer_json()), self.spec.text)

    def tokenizer_json(self) -> str:
        """Return the `tokenizers` JSON of the tokenizer, without padding or truncation.

        transformers leaves the settings of its last call in there; they are not part of the model.
        """
        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return str(tokenizer.to_str())

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Load a model from a directory or hub id, as float32, in evaluation mode.

        A licence for research or non-commercial use only is said in a warning.

        Raises:
            ConfigError: not found, not a supported family, or a part is missing.
        """
        folder = model_folder(source)
        record = read_record(folder)
        parts = read_model(folder, source)
        dual = cls._of(parts, None if record is None else record.space)
        check_parts(dual, parts.processor, source)
        if record is not None:
            dual._space = _space_now(dual, record, source)
            dual.basis = read_basis(folder)
            if dual.basis is not None and dual.basis.space != dual.space:
                dual.basis = None  # of the space that the files were in before they were changed
                _log.warning(
                    "%s: its axes of shorter embeddings are of another embedding space, and are "
                    "left out",
                    source,
                )
        recorded = None if record is None else record.licence
        dual.licence = recorded or parts.licence
        if dual.licence is not None and is_restricted(dual.licence):
            _log.warning(
                "%s: its licence is %s, for research or non-commercial use only; so is a student "
                "that is distilled from it, and a bundle of either",
                source,
                dual.licence,
            )
        return dual

    @classmethod
    def _of(cls, parts: ModelParts, space: str | None = None) -> Self:
        return cls(parts.model, parts.image, parts.tokenizer, space=space).eval()

    def save(self, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Save weights (safetensors), config, tokenizer, processor and the record of the space.

        The directory is written whole or not at all; only a model that EdgeCLIP saved is replaced.

        Raises:
            InputError: `directory` holds anything else.
        """
        with atomic_directory(directory, replace=True, marker=MARKER) as folder:
            self.save_into(folder, dtype=dtype)
            keep_others(directory, folder)

    def save_into(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Save the files of `save` into an existing folder."""
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
        }
        self.model.config.dtype = dtype
        self.model.save_pretrained(folder, state_dict=state)
        self.save_settings(folder)
        saved = DualEncoder._of(read_model(folder, folder))
        space = self.space
        if space == space_fingerprint(self):  # its own: that of the weights as rounded
            space = space_fingerprint(saved)
        record = asdict(ModelRecord(2, space, space_fingerprint(saved), self.licence))
        if self.licence is None:  # so that older releases read it
            del record["licence"]
        text = json.dumps(record, indent=2) + "\n"
        (folder / MARKER).write_text(text, encoding="utf-8")
        if self.basis is not None:
            self.basis.save(folder / BASIS_NAME)

    def save_settings(self, folder: Path, *, texts: bool = True) -> None:
        """Save config, tokenizer and processor only, as a bundle needs them.

        Without `texts` the tokenizer is left out.
        """
        self.model.config.save_pretrained(folder)
        if texts:
            self.tokenizer.save_pretrained(folder)
            write_portable_config(folder)
        processor = json.dumps(_processor_config(self.image_spec), indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")


# Of config.json: they change an embedding, but no shape of a weight.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "pad_token_id")
# The same of convolutional and hybrid towers; they count where a tower has them, so that the others
# keep their fingerprints.
_OF_SOME = ("batch_norm_eps", "depthwise_padding", "down_stride", "output_stride", "strides")


def keep_others(old: Path, new: Path) -> None:
    """Copy what somebody put beside a model that is replaced, such as a README, to the new one."""
    for path in sorted(old.glob("*")):
        own = path.suffix in _OF_MODELS or path.name == BASIS_NAME
        if path.is_file() and not own and not (new / path.name).exists():
            shutil.copy2(path, new / path.name)


def space_fingerprint(dual: DualEncoder) -> str:
    """Return the SHA-256 (64 hex digits) of the embedding space that `dual` itself defines.

    It covers what changes an embedding: the towers' weights as float32 and their settings, the
    input contract and the tokenizer. Two files of the same weights in other formats have the same
    space. Temperature and bias are left out: they change no embedding, and exp() differs between
    machines.
    """
    config: Any = dual.model.config
    settings: list[object] = [
        [getattr(tower, name, None) for name in _SETTINGS]
        + [getattr(tower, name) for name in _OF_SOME if hasattr(tower, name)]
        for tower in (config.vision_config, config.text_config)
    ]
    settings += own_settings(config)
    text = f"{_weights_fingerprint(dual)} {json.dumps(settings)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _weights_fingerprint(dual: DualEncoder) -> str:
    """Return the SHA-256 of weights, input contract and tokenizer."""
    spec = plain_spec(dual.spec)
    del spec["logit_scale"]
    digest = hashlib.sha256()
    digest.update(json.dumps(spec, sort_keys=True).encode())
    digest.update(dual.tokenizer_json().encode())
    for name, value in sorted(dual.model.state_dict().items()):
        if name not in ("logit_scale", "logit_bias"):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _space_now(dual: DualEncoder, record: ModelRecord, source: str | Path) -> str | None:
    """Return the space of a loaded model with a record; None if it is the weights' own.

    A model that was changed since, by another program, has left the space of the record.
    """
    if record.model is None:
        _log.warning(
            "%s was saved by an older EdgeCLIP: whether its weights were changed since, and left "
            "the recorded embedding space, cannot be told; write it again with the command that "
            "made it",
            source,
        )
        return record.space
    if space_fingerprint(dual) == record.model:
        return record.space
    _log.warning(
        "%s was changed since EdgeCLIP saved it (weights, tokenizer, processor or config.json): "
        "its embedding space is a new one, and indexes and caches of the old one will be refused",
        source,
    )
    return None


def _token(tokenizer: PreTrainedTokenizerFast, *names: str) -> int:
    for name in names:
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    raise ConfigError(f"the tokenizer defines none of {', '.join(names)}")


def _processor_config(image: ImageSpec) -> dict[str, object]:
    size: dict[str, int] = {"shortest_edge": image.resize}
    if image.stretch:
        size = {"height": image.resize, "width": image.resize}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _RESAMPLE[image.resample],
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
