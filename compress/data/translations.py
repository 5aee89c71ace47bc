"""Captions that a student reads in other words than its teacher, such as in other languages.

The teacher embeds the caption, the student one of its translations, and learns the same embedding
(cross-lingual distillation, Reimers and Gurevych 2020, section 2).
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeclip.compress.data.mixture import Mixture
from edgeclip.compress.data.sources import Pair, Source, most_captions
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.text_files import read_text

TRANSLATIONS_NAME = "translations.csv"
COLUMNS = ("caption", "translation")
_LOOKED_AT = 1000  # captions that are looked up before any work begins


def read_translations(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a CSV table with the columns `caption` and `translation`, one translation a line.

    Raises:
        InputError: it cannot be read, lacks a column, or has an empty cell.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r}: its first line must be {','.join(COLUMNS)}"
        )
    found: dict[str, list[str]] = {}
    for row in rows:
        caption, translation = ((row[name] or "").strip() for name in COLUMNS)
        if not caption or not translation:
            raise InputError(f"{path}, line {rows.line_num}: a cell is empty: fill or delete it")
        found.setdefault(caption, []).append(translation)
    if not found:
        raise InputError(f"{path} holds no translations: write one per line")
    return {caption: tuple(own) for caption, own in found.items()}


class Translated:
    """A source whose captions are replaced by a translation, or stay as they are, by turns.

    It has the identity of its base, for the teacher cache: that is of the base's captions.
    """

    def __init__(self, base: Source, translations: Mapping[str, tuple[str, ...]]) -> None:
        self._base, self._translations = base, translations
        self.name, self.split, self.has_captions = base.name, base.split, base.has_captions

    @property
    def identity(self) -> str:
        return self._base.identity

    @property
    def most_captions(self) -> int:
        """The most captions of a picture."""
        return most_captions(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self._base[index].image, self.caption(index))

    def caption(self, index: int) -> str | None:
        return next(iter(self.captions(index)), None)

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self._turn(caption, index) for caption in self._base.captions(index))

    def _turn(self, caption: str, index: int) -> str:
        choices = (caption, *self._translations.get(caption, ()))
        return choices[index % len(choices)]

    def content(self, index: int) -> str:
        """Return the content of a picture; see `Source`."""
        return self._base.content(index)


def translated(source: Source, path: Path) -> tuple[Source, str]:
    """Return a source with the translations of a table, and how much of it they cover.

    Raises:
        InputError: see `read_translations`; or none of the first captions has a translation.
    """
    table = read_translations(path)
    first: list[Any] = [source.caption(index) for index in range(min(len(source), _LOOKED_AT))]
    known = sum(caption in table for caption in first)
    if not known:
        raise InputError(
            f"{path} translates none of the first {len(first)} captions of {source.name}: its "
            "column caption must hold them letter by letter"
        )
    says = f"{path} translates {known} of the first {len(first)} captions of {source.name}"
    if not isinstance(source, Mixture):
        return Translated(source, table), says
    parts = [Translated(own, table) for own in source.sources]
    return Mixture(parts, [part.weight for part in source.parts]), says
