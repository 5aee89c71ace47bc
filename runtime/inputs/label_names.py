"""Read label names: from a file with one on each line, or as typed, with commas between them."""

import csv
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

    Raises:
        InputError: the file cannot be read, holds no label, or holds one twice.
    """
    places: dict[str, int] = {}
    for number, line in enumerate(split_lines(read_text(path)), 1):
        label = line.strip()
        if label in places:
            raise InputError(
                f"{path}, line {number}: the label {label!r} stands on line {places[label]} too"
            )
        if label:
            places[label] = number
    if not places:
        raise InputError(f"{path} holds no labels: write one on each line")
    return tuple(places)


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
