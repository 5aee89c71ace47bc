"""Captions of a folder of images: one table, or a text file beside each image."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeclip.runtime.errors import InputError

TABLE_NAME = "captions.csv"


def read_captions(folder: Path, images: Sequence[Path]) -> tuple[str, ...] | None:
    """Return one caption for each image, or None where the folder has none at all.

    `captions.csv` has a header with the columns `file` and `caption`, `file` being relative
    to the folder. Without it, `NAME.txt` beside `NAME.jpg` holds the caption.

    Raises:
        InputError: some images have a caption and others none, or the table is damaged, names
            an image twice or one that is not there.
    """
    table = folder / TABLE_NAME
    found = _from_table(table, images) if table.is_file() else [_from_text(p) for p in images]
    missing = [path for path, caption in zip(images, found, strict=True) if not caption]
    if len(missing) == len(images):
        return None
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(images)} images have no caption, the first is "
            f"{missing[0].relative_to(folder)}: give every image one"
        )
    return tuple(found)


def _from_text(image: Path) -> str:
    beside = image.with_suffix(".txt")
    return _read(beside).strip() if beside.is_file() else ""


def _from_table(table: Path, images: Sequence[Path]) -> list[str]:
    captions: dict[Path, str] = {}
    known = set(images)
    for line, row in _rows(table):
        image = table.parent / (row["file"] or "")
        if image in captions:
            raise InputError(f"{table}, line {line}: {row['file']} is there twice")
        if image not in known:
            raise InputError(f"{table}, line {line}: {row['file']} is no image there")
        captions[image] = (row["caption"] or "").strip()
    return [captions.get(image, "") for image in images]


def _rows(table: Path) -> Iterator[tuple[int, dict[str | Any, str | Any]]]:
    """Yield each row of a table with the line that it ends in."""
    rows = csv.DictReader(io.StringIO(_read(table), newline=""), strict=True)
    line = 0
    try:
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise InputError(f"{table} needs a header with the columns file and caption")
        line = rows.line_num
        for row in rows:
            line = rows.line_num
            yield line, row
    except csv.Error as error:  # the reader may be far beyond the row that it failed on
        raise InputError(
            f"{table}, the row from line {line + 1} on: {error}; close every quote, and write "
            "it twice inside a quoted caption"
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from error
