"""Read label names: from a file with one on each line, or as typed, with commas between them."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.text_files import read_text, split_lines

_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".lst", ".names", ".json", ".yaml", ".yml", ".npz"})


def labels_file(given: str) -> Path | None:
    """Return the file that an option for labels means; None if it holds the names themselves.

    Raises:
        InputError: it is a folder, or looks like the name of a file that does not exist.
    """
    path = Path(given)
    try:
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except (OSError, ValueError):  # too long, or a NUL character
        return None
    if is_folder and ("/" in given or "\\" in given):
        raise InputError(f"{given} is a folder: give labels, or a file with one on each line")
    if path.suffix.lower() in _SUFFIXES and "," not in given:
        raise InputError(f"{given} does not exist: give a file of labels, or the labels themselves")
    return None


def read_label_file(path: Path) -> tuple[str, ...]:
    """Read labels, one on each line, which may hold commas; empty lines are skipped.

    In a .csv or .tsv file each row is one cell, in a .json file the labels are a list.

    Raises:
        InputError: the file cannot be read, holds no label or one twice, or looks as if several
            stood on one line.
    """
    places: dict[str, int] = {}
    for number, label in _labels(path):
        if label in places:
            raise InputError(
                f"{path}, line {number}: the label {label!r} stands on line {places[label]} too"
            )
        places[label] = number
    if not places:
        raise InputError(f"{path} holds no labels: write one on each line")
    if len(places) == 1 and "," in next(iter(places)):
        raise InputError(
            f"{path}, line {min(places.values())}: one label, {next(iter(places))!r}: write one on "
            "each line"
        )
    return tuple(places)


def _labels(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each label with its line; an entry of a JSON list counts as a line."""
    text, suffix = read_text(path), path.suffix.lower()
    if suffix in {".yaml", ".yml", ".npz"}:
        raise InputError(f"{path} is no text file of labels: write one on each line of a .txt file")
    items = split_lines(text)
    if suffix == ".json":
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {getattr(error, 'lineno', 1)}: no JSON") from None
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise InputError(f"{path}, line 1: give a list of labels")
    for number, item in enumerate(items, 1):
        cells = [item]
        if suffix in {".csv", ".tsv"}:
            try:
                ((*cells,),) = csv.reader([item], delimiter="," if suffix == ".csv" else "\t")
            except (csv.Error, ValueError):
                cells = []
        if len(cells) > 1:
            raise InputError(
                f"{path}, line {number}: {len(cells)} cells: write one label on each line, in "
                '"quotes" if it holds the separator'
            )
        if cells and cells[0].strip():
            yield number, cells[0].strip()


def split_names(text: str) -> tuple[str, ...]:
    """Split "red, blue" at the commas into names; a name in "quotes" may hold a comma.

    Raises:
        InputError: a name is empty, or a quote is not closed.
    """
    try:
        rows = list(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:
        raise InputError(f"{text!r} cannot be split into names: {error}") from None
    names = tuple(name.strip() for row in rows for name in row)
    if not names or not all(names):
        raise InputError(f"{text!r} holds an empty name: write NAME,NAME,...")
    return names
