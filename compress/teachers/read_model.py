"""Read a model's directory, in whatever layout, as a model of transformers with its inputs."""

import logging
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from edgeclip.compress.teachers.families import FAMILIES
from edgeclip.compress.teachers.licence import joined, read_licence
from edgeclip.compress.teachers.model_folder import (
    ADAPTER_CONFIG,
    OPEN_CLIP_CONFIG,
    model_folder,
    read_config,
    read_json,
)
from edgeclip.compress.teachers.open_clip import read_open_clip
from edgeclip.compress.teachers.read_tokenizer import read_tokenizer
from edgeclip.runtime.errors import ConfigError, MissingExtraError
from edgeclip.runtime.inputs.preprocess import image_spec_from_hugging_face
from edgeclip.runtime.spec import ImageSpec

_log = logging.getLogger(__name__)
_NAFLEX = "siglip2"


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a directory holds.

    Attributes:
        model: as float32.
        image: the preprocessing of its pictures.
        tokenizer: its tokenizer.
        processor: the directory of transformers' image processor; None if it has none that does the
            same.
        licence: of the weights; None if nothing tells it.
    """

    model: PreTrainedModel
    image: ImageSpec
    tokenizer: PreTrainedTokenizerFast
    processor: Path | None
    licence: str | None = None


def read_model(folder: Path, source: str | Path) -> ModelParts:
    """Read a model of transformers or OpenCLIP, or a LoRA adapter with its base merged.

    Args:
        folder: the directory, see `model_folder`.
        source: how the user named it, for the messages.

    Raises:
        ConfigError: not a supported family, or a part is missing, damaged or of another model.
        MissingExtraError: an adapter, and peft is not installed.
    """
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return _read_adapter(folder, source)
        if (folder / OPEN_CLIP_CONFIG).is_file() and not (folder / "config.json").is_file():
            found = ModelParts(*read_open_clip(folder, source), processor=None)
        else:
            found = _read_transformers(folder, source)
        return replace(found, licence=read_licence(folder, source))
    except (ConfigError, MissingExtraError):
        raise
    except BaseException as error:  # transformers raises many kinds on damaged files
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # the Rust code in safetensors and tokenizers raises a BaseException
        raise ConfigError(f"{source} cannot be loaded: {_reason(error)}") from error


def _read_transformers(folder: Path, source: str | Path) -> ModelParts:
    known: dict[str, object] = {**FAMILIES, _NAFLEX: None}
    name = read_config(folder, source, known)
    loaded: type[PreTrainedModel] = Siglip2Model
    if name != _NAFLEX:
        image = _image_spec(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loaded = FAMILIES[name].model_class(config)
    made: Any = loaded.from_pretrained(
        folder,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # told apart below, in one line
        output_loading_info=True,
    )
    model, found = made
    _refuse_other_weights(found, source)
    tokenizer = read_tokenizer(folder, source)
    if name == _NAFLEX:
        image = _naflex_spec(folder, model)
        _log.warning(
            "%s sees pictures of any shape (NaFlex), a device those of one: here it is the SigLIP "
            "of %d x %d pixels in it, to which pictures are stretched",
            source,
            image.size,
            image.size,
        )
        return ModelParts(_of_one_size(model, image.size), image, tokenizer, None)
    return ModelParts(model, image, tokenizer, folder)


def _naflex_spec(folder: Path, model: Any) -> ImageSpec:
    """Return the preprocessing of a NaFlex model's own grid of positions."""
    path = folder / "preprocessor_config.json"
    given: dict[str, Any] = read_json(path) if path.is_file() else {}
    vision = model.config.vision_config
    side = math.isqrt(vision.num_patches) * vision.patch_size
    kept: dict[str, Any] = {
        name: given[name] for name in ("image_mean", "image_std", "resample") if name in given
    }
    settings: dict[str, Any] = {"resample": 2, **kept, "size": side}
    settings["image_processor_type"] = "SiglipImageProcessor"
    return image_spec_from_hugging_face(settings, source=str(path))


def _of_one_size(model: Any, side: int) -> SiglipModel:
    """Return the `SiglipModel` that computes what a `Siglip2Model` does for a square picture.

    A patch goes through a linear layer there, rows, columns and channels in this order; here it is
    a convolution. On the grid of the position embeddings nothing is resampled.
    """
    vision = {**model.config.vision_config.to_dict(), "image_size": side}
    for name in ("model_type", "num_patches"):
        vision.pop(name, None)
    text = {**model.config.text_config.to_dict()}
    text.pop("model_type", None)
    made = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    state = model.state_dict()
    name, patch = "vision_model.embeddings.patch_embedding.weight", int(vision["patch_size"])
    state[name] = state[name].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    made.load_state_dict(state)
    return made


def _read_adapter(folder: Path, source: str | Path) -> ModelParts:
    """Read the model that a LoRA adapter was trained on, and merge the adapter into it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError(
            f"{source} is a LoRA adapter, which the Python package peft merges into its model: "
            "run `pip install 'edgeclip[lora]'`"
        ) from error
    settings = read_json(folder / ADAPTER_CONFIG)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{source}: {ADAPTER_CONFIG} does not name its base model: write it there, as "
            "base_model_name_or_path"
        )
    beside = folder / name
    where = str(beside) if beside.is_dir() else name
    if revision and not Path(where).is_dir():
        where = f"{name}@{revision}"
    parts = read_model(model_folder(where), name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about what transformers will rename
        merged: Any = PeftModel.from_pretrained(parts.model, str(folder)).merge_and_unload()
    licence = joined(read_licence(folder, source), parts.licence)
    return replace(parts, model=merged, licence=licence)


def _reason(error: BaseException) -> str:
    """Return another library's message as one line, cut where it gets long."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text:  # torch then advises to run whatever the file holds
        return (
            "its weights in PyTorch's format are damaged, or hold more than tensors, which is not "
            "loaded because it could run any program; save them as safetensors (`save_pretrained`)"
        )
    if isinstance(error, ArithmeticError | AttributeError | LookupError | TypeError):
        # Not raised on purpose: the message alone would be a riddle, such as a missing key.
        text = (
            "transformers cannot use a setting in config.json or tokenizer_config.json "
            f"({type(error).__name__}: {text})"
        )
    return textwrap.shorten(text, 400, placeholder=" ...")


def _refuse_other_weights(found: Mapping[str, Iterable[Any]], source: str | Path) -> None:
    """Refuse weights that do not fit the config: transformers would fill in random numbers."""
    amiss = {
        "missing": sorted(map(str, found["missing_keys"])),
        "of another size": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "unknown": sorted(
            str(key) for key in found["unexpected_keys"] if not str(key).endswith("position_ids")
        ),
    }
    problems = [f"{len(names)} {how} (such as {names[0]})" for how, names in amiss.items() if names]
    if problems:
        mend = "both files must come from one model"
        if any(re.search(r"lora_|\.base_layer\.|^base_model\.", key) for key in amiss["unknown"]):
            mend = (
                "these hold a LoRA adapter: merge it with peft (`merge_and_unload()`), save again"
            )
        elif any(name.startswith(("module.", "_orig_mod.")) for name in amiss["unknown"]):
            mend = (
                "these were saved through a wrapper (DDP, torch.compile): save the model inside it"
            )
        raise ConfigError(
            f"{source}: the weights do not fit config.json: {', '.join(problems)}; {mend}"
        )


def _image_spec(folder: Path) -> ImageSpec:
    """Read the image preprocessing; in processor_config.json of transformers 5 it goes first."""
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    nested = read_json(whole).get("image_processor") if whole.exists() else None
    if isinstance(nested, dict):
        return image_spec_from_hugging_face(nested, source=str(whole))
    if whole.exists() and not path.exists():
        raise ConfigError(f"{whole} has no image_processor, and there is no {path.name}")
    return image_spec_from_hugging_face(read_json(path), source=str(path))
