"""Label sets made by the teacher's text tower, for bundles that may have no text tower at all."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.embed_pairs import FloatArray, torch_embedder
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.labels import LabelSet, bake_labels, split_names

_AT_ONCE = 64  # texts
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # it becomes the name of a file


def bake_by_teacher(
    teacher: DualEncoder,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    truncate: bool = False,
) -> LabelSet:
    """Embed labels in all templates with the teacher's text tower; see `labels.bake_labels`.

    Raises:
        InputError: no names, a name twice, a template without its one `{}`, or a text that is
            too long for the teacher, unless `truncate`.
    """
    tokenizer, embed = teacher.text_tokenizer, torch_embedder(teacher, "text")

    def encode(texts: list[str]) -> FloatArray:
        starts = range(0, len(texts), _AT_ONCE)
        parts = (
            tokenizer.encode(texts[start : start + _AT_ONCE], truncate=truncate, first=start)
            for start in starts
        )
        return np.concatenate([embed(part) for part in parts])

    return bake_labels(names, templates, encode, teacher.space)


def read_label_names(given: str) -> tuple[str, tuple[str, ...]]:
    """Read what `--labels` names: a label set's name, and its labels.

    Args:
        given: labels with commas between them, or a text file with a label on each line;
            `NAME=` before it names the set, which is else called after the file, or "labels".

    Raises:
        InputError: a name that cannot be a file's, an empty label, or a file that cannot be
            read.
    """
    name, equals, what = given.partition("=")
    if not equals:
        name, what = "", given
    path = Path(what)
    if path.suffix != ".txt":
        return _plain(name or "labels"), split_names(what)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the labels in {path}: {error}") from None
    return _plain(name or path.stem), tuple(line.strip() for line in lines if line.strip())


def _plain(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a label set: use letters, digits, '.', '-' and '_'")
    return name
