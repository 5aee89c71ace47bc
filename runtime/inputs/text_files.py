"""Read text files as people's programs write them, line by line, and the names of labels.

They are UTF-8 or UTF-16, with any of the three line ends.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from edgeclip.runtime.errors import InputError

# Not `str.splitlines`: that also ends lines at form feeds, U+0085, U+2028 and others, which
# captions copied from web pages and PDF files hold.
_LINE_END = re.compile(r"\r\n|\r|\n")
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LABEL_SUFFIXES = frozenset(
    {".txt", ".csv", ".tsv", ".lst", ".names", ".json", ".yaml", ".yml", ".npz"}
)


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, or what its byte order mark says; UTF-16 also without a mark.

    Raises:
        InputError: the file cannot be read, is in another encoding, or holds a NUL character;
            the message names the line.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from None
    mark, encoding = next((item for item in _MARKS if data.startswith(item[0])), (b"", ""))
    if not encoding:
        encoding = _guess(data[:4096])
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before = data[len(mark) : len(mark) + error.start].decode(encoding, "replace")
        found = f"byte 0x{error.object[error.start]:02X} is not {encoding.upper()} text"
        raise InputError(
            f"{path}, line {len(_LINE_END.findall(before)) + 1}: {found}; save it as UTF-8"
        ) from None
    if "\0" in text:
        line = len(_LINE_END.findall(text[: text.index("\0")])) + 1
        raise InputError(f"{path}, line {line}: a NUL character; is it a text file?")
    return text


def _guess(data: bytes) -> str:
    """Tell UTF-16 by its many NUL bytes, which stand at odd or at even places alone."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) * 8 > len(data) and min(even, odd) * 4 < max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r alone; what ends the last line starts no further one."""
    lines = _LINE_END.split(text)
    return lines[:-1] if not lines[-1] else lines


def read_lines(path: Path) -> list[str]:
    """Read a text file with one item on each line, without white space around it.

    Item i is line i + 1 of the file; empty lines at its end are dropped.

    Raises:
        InputError: as `read_text`, no lines at all, or an empty one before the last.
    """
    lines = [line.strip() for line in split_lines(read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{path} holds no texts: write one per line")
    if "" in lines:
        raise InputError(
            f"{path}, line {lines.index('') + 1} is empty: delete it, so that row i is line i"
        )
    return lines


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
    if path.suffix.lower() in _LABEL_SUFFIXES and "," not in given:
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
