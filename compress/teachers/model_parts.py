"""Check that weights, config, tokenizer and processor of a loaded model belong together.

The model is held against transformers' own tokenizer, image processor and forward pass, so that
what EdgeCLIP reads from their settings cannot answer otherwise than they do.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from edgeclip.compress.teachers.families import Padding
from edgeclip.runtime.errors import ConfigError, first_line
from edgeclip.runtime.spec import EncoderSpec

_log = logging.getLogger(__name__)
# Common words in several scripts, for few vocabularies know them all.
_WORDS = (
    "a photo of a dog",
    "two red cars",
    "собака",
    "一只狗",
    "كلب",
    "कुत्ता",
    "犬の写真",
    "강아지",
)
_SAME = 1e-4  # values of an embedding that may differ between two ways to compute it
_APART = 1e-5  # embeddings of two inputs whose values are all closer are the same
_LEVELS = 2.0  # mean difference of a pixel, of 255: Pillow and torchvision do not resize alike


class Parts(Protocol):
    """A `DualEncoder`, as far as its parts are looked at here."""

    model: Any
    tokenizer: Any

    @property
    def spec(self) -> EncoderSpec: ...

    @property
    def is_causal_text(self) -> bool: ...

    @property
    def text_padding(self) -> Padding: ...

    @property
    def pools_at_largest_id(self) -> bool: ...

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor: ...

    def embed_image(self, pixel_values: Tensor) -> Tensor: ...

    def embed_text(self, input_ids: Tensor) -> Tensor: ...


def check_parts(dual: Parts, folder: Path | None, source: str | Path) -> None:
    """Refuse a model whose parts cannot work together; warn where transformers is wrong as well.

    Args:
        dual: the model, on the CPU and in evaluation mode.
        folder: the directory of transformers' image processor; None if there is none.
        source: how the user named it, for the messages.

    Raises:
        ConfigError: the first thing found, and how to mend it.
    """
    for name, value in dual.model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigError(
                f"{source}: weights are not finite, such as those of {name}: the training "
                "diverged, or the file is damaged; take an earlier checkpoint, or download it again"
            )
    try:
        _check_vocabulary(dual, source)
        _check_end_of_text(dual, source)
        with torch.inference_mode():
            _check_texts(dual, source)
            _check_pictures(dual, folder, source)
    except ConfigError:
        raise
    except Exception as error:  # of any kind, from settings that no one has foreseen
        raise _misfit(source, "its parts do not belong together", error) from error


def _check_vocabulary(dual: Parts, source: str | Path) -> None:
    """Refuse token ids without a vector, and texts without room for a token."""
    vocabulary, spec = dual.tokenizer.get_vocab(), dual.spec.text
    largest = max(vocabulary.values(), default=-1)
    if largest >= spec.vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer has token ids up to {largest}, the text tower has vectors "
            f"for {spec.vocab_size} tokens: they do not belong together; take both from one model"
        )
    if spec.context_length < 3:
        raise ConfigError(
            f"{source}: a text may have {spec.context_length} tokens, start and end included: "
            "correct model_max_length in tokenizer_config.json"
        )
    if len(vocabulary) < 0.9 * spec.vocab_size:
        _log.warning(
            "%s: the tokenizer has %d tokens, the text tower vectors for %d: unless it was trained "
            "so, the tokenizer is of another model, and texts mean nothing to the tower",
            source,
            len(vocabulary),
            spec.vocab_size,
        )
    pads, configured = dual.tokenizer.pad_token_id, dual.model.config.text_config.pad_token_id
    is_masked = dual.text_padding == "masked"
    if is_masked and None not in (pads, configured) and pads != configured:
        _log.warning(
            "%s: the tokenizer pads with token %d, text_config.pad_token_id in config.json is %d: "
            "unless it was trained so, the tokenizer is of another model",
            source,
            pads,
            configured,
        )


def _check_end_of_text(dual: Parts, source: str | Path) -> None:
    """Refuse a CLIP that would not pool at the tokenizer's end token, see `CLIPTextModel`."""
    if not dual.is_causal_text:
        return
    ends, configured = dual.spec.text.eos_id, dual.model.config.text_config.eos_token_id
    if dual.pools_at_largest_id:
        larger = sum(number > ends for number in dual.tokenizer.get_vocab().values())
        if larger:
            _log.warning(
                "%s: text_config.eos_token_id in config.json is 2, for which transformers pools at "
                "the largest token id of a text; %d tokens are larger than the end token %d. "
                "Unless it was trained so, write %d there",
                source,
                larger,
                ends,
                ends,
            )
    elif configured != ends:
        raise ConfigError(
            f"{source}: text_config.eos_token_id in config.json is {configured}, but the tokenizer "
            f"ends a text with {ends}: CLIP would give every text the embedding of its first "
            f"token; write {ends} there, or bring the tokenizer of this model"
        )


def _check_texts(dual: Parts, source: str | Path) -> None:
    """Refuse other token ids or embeddings than transformers gives, and one for all texts."""
    spec, tokenizer = dual.spec.text, dual.tokenizer
    (before, behind), length = spec.frame, spec.context_length
    marks = len(before) + len(behind)
    long = " ".join([_WORDS[0]] * length)
    rows: dict[str, list[int]] = {}
    for text in (*_WORDS, "", long):
        inner = tokenizer(text, add_special_tokens=False)["input_ids"][: length - marks]
        rows[text] = [*before, *inner, *behind]
        theirs = list(_tokens_of_transformers(dual, text)["input_ids"])
        ours = rows[text]
        if spec.pad_to_context:
            ours = ours + [spec.pad_id] * (length - len(ours))
        if theirs != ours:
            mend = "put one token before and one behind a text, and truncation_side be right"
            if spec.pad_to_context:
                mend = "put one token behind a text, and truncation_side and padding_side be right"
            raise ConfigError(
                f"{source}: transformers' tokenizer makes {_few(theirs)} of {text[:20]!r}, where a "
                f"device makes {_few(ours)}: its post-processor must {mend}"
            )
    words = [rows[text] for text in _WORDS]
    if all(row == words[0] for row in words):
        raise ConfigError(
            f"{source}: the tokenizer makes {_few(words[0])} of every text, so that all would have "
            "one embedding: its vocabulary is missing, or of another model"
        )
    unknown = [row.count(tokenizer.unk_token_id) / max(len(row) - marks, 1) for row in words]
    if min(unknown) > 0.5:
        _log.warning(
            "%s: the tokenizer knows less than half of common words, such as those of %r: unless "
            "it is meant for other texts, it is of another model",
            source,
            _WORDS[0],
        )
    probes = (_WORDS[0], "", long)
    padded = _padded([rows[text] for text in probes], dual)
    what = f"text of {length} tokens"
    here = _embedded(lambda: dual.embed_text(padded), source, what)
    there = _embedded(lambda: _as_transformers(dual, probes), source, what)
    if (here - there).abs().max() > _SAME:
        raise ConfigError(
            f"{source}: the text tower answers otherwise for a text with padding behind it than "
            "transformers for the text alone: a tower that minds the padding is not supported"
        )
    special = set(tokenizer.all_special_ids)
    plain = sorted(number for number in tokenizer.get_vocab().values() if number not in special)
    chosen = plain[:: max(1, len(plain) // 8)]
    texts = _padded([[*before, number, *behind] for number in chosen], dual)
    _refuse_collapse(dual.embed_text(texts), source, "text")


def _padded(rows: list[list[int]], dual: Parts) -> Tensor:
    """Pad token ids to the whole context: int64 [N, context_length]."""
    spec = dual.spec.text
    padded = torch.full((len(rows), spec.context_length), spec.pad_id)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    return padded


def _tokens_of_transformers(dual: Parts, text: str, **options: Any) -> Any:
    """Tokenize a text as the documents of transformers say for this family."""
    spec = dual.spec.text
    padding = "max_length" if spec.pad_to_context else False
    return dual.tokenizer(
        text, truncation=True, max_length=spec.context_length, padding=padding, **options
    )


def _as_transformers(dual: Parts, texts: tuple[str, ...]) -> Tensor:
    """Embed texts one by one, by transformers' own tokenizer and forward pass."""
    model: Any = dual.model
    known = set(inspect.signature(model.get_text_features).parameters)
    if dual.text_padding == "seen":
        known.discard("attention_mask")  # as in training
    found = []
    for text in texts:
        given = _tokens_of_transformers(dual, text, return_tensors="pt")
        taken = {name: value for name, value in given.items() if name in known}
        found.append(model.get_text_features(**taken).pooler_output)
    return nn.functional.normalize(torch.cat(found).float(), dim=-1)


def _check_pictures(dual: Parts, folder: Path | None, source: str | Path) -> None:
    """Refuse pixels that the tower cannot take or transformers computes otherwise."""
    spec = dual.spec.image
    pictures = _pictures(spec.resize)
    pixels = dual.preprocess(pictures)
    side = getattr(dual.model.config.vision_config, "image_size", None)
    what = f"picture of {spec.size} x {spec.size} pixels, the processor's crop_size"
    if side != spec.size:
        what += f", where config.json has image_size {side}"
    found = _embedded(lambda: dual.embed_image(pixels), source, what)
    _refuse_collapse(found, source, "picture")
    if not all(0 <= value <= 1 for value in spec.mean) or max(spec.std) > 1:
        _log.warning(
            "%s: image_mean %s and image_std %s are not those of pixels from 0 to 1: the processor "
            "may be of another model",
            source,
            spec.mean,
            spec.std,
        )
    if folder is None:
        return
    try:
        processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        theirs = processor(images=pictures, return_tensors="pt")["pixel_values"]
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"{source}: transformers cannot use its image processor ({first_line(error)}): correct "
            "preprocessor_config.json"
        ) from error
    if theirs.shape == pixels.shape:
        scale = 255 * torch.tensor(spec.std).view(3, 1, 1)
        if ((theirs - pixels).abs() * scale).mean() <= _LEVELS:
            return
    raise ConfigError(
        f"{source}: transformers' {type(processor).__name__} makes other pixels of a picture: the "
        "processor has an option that EdgeCLIP does not carry to a device"
    )


def _pictures(side: int) -> list[Image.Image]:
    """Two smooth pictures that are not square."""
    height, width = side + 11, side * 3 // 2 + 7
    y, x = np.mgrid[0:height, 0:width]
    waves = 127.5 + 127.5 * np.sin(8 * x / width + 5 * y / height)
    pixels = np.stack([255 * x / width, 255 * y / height, waves], axis=-1).astype(np.uint8)
    return [Image.fromarray(pixels), Image.fromarray(255 - pixels[::-1, :, ::-1])]


def _embedded(embed: Callable[[], Tensor], source: str | Path, what: str) -> Tensor:
    """Embed; a tower that cannot is the user's to mend."""
    try:
        return embed()
    except Exception as error:  # torch raises several kinds
        raise _misfit(source, f"the model cannot embed a {what}", error) from error


def _misfit(source: str | Path, what: str, error: Exception) -> ConfigError:
    why = first_line(error)
    return ConfigError(f"{source}: {what} ({why}); take all of its files from one model")


def _refuse_collapse(embeddings: Tensor, source: str | Path, what: str) -> None:
    if not embeddings.isfinite().all():
        raise ConfigError(f"{source}: the embedding of a {what} is not finite: it was not trained")
    if len(embeddings) > 1 and (embeddings - embeddings[0]).abs().max() < _APART:
        raise ConfigError(
            f"{source}: every {what} gets the same embedding: weights, config.json and tokenizer "
            "or processor do not belong together, or the training collapsed"
        )


def _few(ids: list[int]) -> str:
    return f"the tokens {', '.join(map(str, ids[:5]))}{' ...' if len(ids) > 5 else ''}"
