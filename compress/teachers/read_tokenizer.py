"""Read the tokenizer of a model as one that a device can run: a tokenizer.json."""

import json
import logging
import string
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from edgeclip.runtime.errors import ConfigError

_log = logging.getLogger(__name__)
_SIGLIP = "SiglipTokenizer"  # written in Python, on the package sentencepiece
_SIGLIP_2 = "Siglip2Tokenizer"
_T5 = ("T5Tokenizer", "T5TokenizerFast")  # of SigLIPs in timm's repositories
_PIECES = "spiece.model"


def read_tokenizer(
    folder: Path, source: str | Path, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerFast:
    """Read the tokenizer in a directory.

    SigLIP's is written in Python: its rules are put into the normalizer of its tokenizer.json,
    which is made from spiece.model where there is none.

    Args:
        folder: the directory.
        source: how the user named it, for the messages.
        config: of the model, where the directory has no config.json.

    Raises:
        ConfigError: a tokenizer that only Python can run.
    """
    settings = _settings(folder)
    made_by = settings.get("tokenizer_class")
    only_pieces = (folder / _PIECES).is_file() and not (folder / "tokenizer.json").is_file()
    if made_by == _SIGLIP or (made_by is None and only_pieces):
        return _siglip(folder, settings)
    given = {} if config is None else {"config": config}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{source}: its {type(tokenizer).__name__} is written in Python, and a device "
            "needs a tokenizer.json: save a fast tokenizer of the same vocabulary there"
        )
    if made_by == _SIGLIP_2:
        return as_generic(tokenizer)
    if made_by in _T5 and (folder / "tokenizer.json").is_file():
        # It would get 100 tokens more, which the model has no vectors for (`extra_ids`).
        return as_generic(tokenizer, Tokenizer.from_file(str(folder / "tokenizer.json")))
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def as_generic(tokenizer: Any, backend: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer as one of the class that takes its tokenizer.json as it is.

    Classes of their own make the normalizer anew when they are loaded, or add to it each time.

    Args:
        tokenizer: of transformers.
        backend: its tokenizer.json, where the class has added to that.
    """
    marks = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "mask", "cls", "sep"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend or tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        **{name: getattr(tokenizer, name) for name in marks if getattr(tokenizer, name)},
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _siglip(folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = unigram_tokenizer((folder / _PIECES).read_bytes(), str(folder / _PIECES))
    eos = _token(settings, "eos_token", "</s>")
    canonicalise(tokenizer, lower=bool(settings.get("do_lower_case", True)))
    if tokenizer.encode("a").ids[-1] != tokenizer.token_to_id(eos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        unk_token=_token(settings, "unk_token", "<unk>"),
        pad_token=_token(settings, "pad_token", "</s>"),
        model_max_length=int(settings.get("model_max_length", 64)),
        model_input_names=["input_ids"],
    )


def _token(settings: dict[str, Any], name: str, usual: str) -> str:
    value = settings.get(name) or usual
    return str(value["content"] if isinstance(value, dict) else value)


def canonicalise(tokenizer: Any, *, lower: bool, punctuation: bool = False) -> bool:
    """Let a normalizer make texts canonical before all else, in place, unless it does already.

    That is lower case, no ASCII punctuation, single spaces: `canonicalize_text` of SigLIP's
    tokenizer, from https://github.com/google-research/big_vision, `prompt_engineering.py`.

    Args:
        tokenizer: of `tokenizers`, or one of transformers around it.
        lower: whether to use lower case.
        punctuation: whether to keep punctuation.

    Returns:
        Whether there was anything to do.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    usual = backend.normalizer
    done = "A," if usual is None else usual.normalize_str("A,")
    if (punctuation or "," not in done) and (not lower or "A" not in done):
        return False
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lower else []
    if not punctuation:
        marks = "".join(f"\\{mark}" for mark in string.punctuation)
        steps.append(normalizers.Replace(Regex(f"[{marks}]"), ""))
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*steps, *([usual] if usual else [])])
    return True


@dataclass(slots=True)
class _Pieces:
    """What a SentencePiece model holds, as far as a Unigram tokenizer needs it."""

    vocabulary: list[tuple[str, float]] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    unknown: int = 0
    charsmap: bytes = b""
    is_unigram: bool = True


def unigram_tokenizer(content: bytes, source: str) -> Tokenizer:
    """Make a tokenizer of a SentencePiece Unigram model, without the package of that name.

    Args:
        content: bytes of a `spiece.model`, a protocol buffer: `ModelProto` in
            https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
        source: its path, for the message.

    Raises:
        ConfigError: damaged, or a model that is not Unigram.
    """
    try:
        found = _read_pieces(content)
    except (IndexError, ValueError, struct.error) as error:
        raise ConfigError(f"{source} is no SentencePiece model: download it again") from error
    if not found.is_unigram or not found.vocabulary:
        raise ConfigError(
            f"{source} is no Unigram model: bring the tokenizer.json of the same model"
        )
    tokenizer = Tokenizer(models.Unigram(found.vocabulary, found.unknown, False))
    steps: list[normalizers.Normalizer] = []
    if found.charsmap:
        steps.append(normalizers.Precompiled(found.charsmap))
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = [AddedToken(piece, normalized=False, special=True) for piece in found.special]
    tokenizer.add_special_tokens(marks)
    return tokenizer


_UNKNOWN, _CONTROL, _UNIGRAM = 2, 3, 1  # SentencePiece.Type, and TrainerSpec.ModelType


def _read_pieces(content: bytes) -> _Pieces:
    """Read `pieces` (field 1), `trainer_spec` (2) and `normalizer_spec` (3) of a ModelProto."""
    found = _Pieces()
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            text, kind = piece[1].decode(), piece.get(3, 1)
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            if kind == _UNKNOWN:
                found.unknown = len(found.vocabulary)
            if kind == _CONTROL:
                found.special.append(text)
            found.vocabulary.append((text, score))
        elif number == 2:
            found.is_unigram = dict(_fields(value)).get(3, _UNIGRAM) == _UNIGRAM
        elif number == 3:
            found.charsmap = dict(_fields(value)).get(2, b"")
    return found


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer: an int, or its bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(content, place)
        else:
            size = {1: 8, 5: 4}.get(kind, len(content) + 1)
        if place + size > len(content):
            raise ValueError("cut short")
        yield key >> 3, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
