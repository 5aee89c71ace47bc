"""Group pictures by a column of a table, such as where they were taken."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.sources import FolderSource, Source
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import is_table
from edgeclip.runtime.inputs.text_files import read_text, split_lines


@dataclass(frozen=True, slots=True)
class Groups:
    """The group of each picture.

    Attributes:
        column: what groups are by.
        names: names of the groups, ascending.
        number: of each picture, the place of its group in `names`, int64 [N]; -1 for none.
    """

    column: str
    names: tuple[str, ...]
    number: NDArray[np.int64]


def read_groups(source: Source, table: Path | None, column: str) -> Groups:
    """Read the groups of a folder's pictures.

    Args:
        source: a folder of pictures.
        table: CSV with a header (comma, TAB, semicolon or bar), or JSON lines (`.jsonl`); of its
            columns one names the pictures, whatever it is called. None for the table of the
            captions.
        column: the column of the groups.

    Raises:
        InputError: the source is no folder, the table is missing or damaged, or has no such
            column, or names none of the pictures.
    """
    if not isinstance(source, FolderSource):
        raise InputError(f"{source.name}: only the pictures of a folder can be grouped by a column")
    paths = source.paths
    table = table or _caption_table(paths)
    rows = list(_rows(table, column))
    index = _index(paths, table.parent)
    ours = _name_column(rows, index, table, paths)
    found = np.full(len(paths), -1, np.int64)
    names = sorted({row[column] for row in rows if row.get(column)})
    numbers = {name: number for number, name in enumerate(names)}
    for row in rows:
        place = _place(row.get(ours, ""), index)
        if place is not None and row.get(column):
            found[place] = numbers[row[column]]
    return Groups(column, tuple(names), found)


def _caption_table(paths: Sequence[Path]) -> Path:
    common = Path(os.path.commonpath([path.parent for path in paths]))
    # A table for all splits lies in the folder above.
    for folder in (common, common.parent):
        tables = [path for path in sorted(folder.iterdir()) if is_table(path)]
        if tables:
            return tables[0]
    raise InputError(
        f"there is no table of captions beside {paths[0]} to group pictures by: give one with "
        "--group-table"
    )


def _rows(table: Path, column: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table, as text by column."""
    text = read_text(table)
    if table.suffix.lower() == ".jsonl":
        for number, line in enumerate(split_lines(text), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    cells = {name: str(value) for name, value in row.items() if value is not None}
                except (ValueError, AttributeError):
                    raise InputError(
                        f"{table}, line {number}: needs a JSON object, such as "
                        f'{{"file": "a.jpg", "{column}": "..."}}'
                    ) from None
                yield cells
        return
    lines = split_lines(text)
    for delimiter in "\t;|,":
        header = next(csv.reader(lines[:1], delimiter=delimiter, skipinitialspace=True), [])
        if column in header:
            break
    else:
        raise InputError(
            f"{table}: no column is called {column!r}: its header is {', '.join(header) or 'empty'}"
        )
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    try:
        for cells_of in reader:
            if None in cells_of or None in cells_of.values():
                raise InputError(
                    f"{table}, line {reader.line_num}: not as many cells as the header: put a cell "
                    'that holds the separator into "quotes"'
                )
            yield {name: value.strip() for name, value in cells_of.items()}
    except csv.Error as error:
        raise InputError(f"{table}, line {reader.line_num}: {error}; close every quote") from error


def _index(paths: Sequence[Path], folder: Path) -> dict[str, int]:
    """Return the number of each picture by its path in the folder, and by its name if unique."""
    found: dict[str, int] = {}
    for number, path in enumerate(paths):
        found[path.name] = -1 if path.name in found else number
    for number, path in enumerate(paths):
        if path.is_relative_to(folder):
            found[path.relative_to(folder).as_posix()] = number
    return found


def _name_column(
    rows: Sequence[dict[str, str]], index: dict[str, int], table: Path, paths: Sequence[Path]
) -> str:
    """Return the column that names pictures."""
    for row in rows:
        for name, value in row.items():
            if _place(value, index) is not None:
                return name
    raise InputError(f"{table} names none of the {len(paths)} pictures, such as {paths[0].name}")


def _place(name: str, index: dict[str, int]) -> int | None:
    plain = name.replace("\\", "/").removeprefix("./")
    for spelling in (plain, plain.rpartition("/")[2]):
        number = index.get(spelling, -1)
        if number >= 0:
            return number
    return None
