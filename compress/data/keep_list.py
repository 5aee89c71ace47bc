"""A list of the pictures to train on: a text file of their contents, one a line."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.compress.data.sources import Source
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.console import on_one_line
from edgeclip.runtime.errors import InputError

_log = logging.getLogger(__name__)
_BYTES = 32  # of a content
_WRONG = re.compile(r"^(?![ \t]*#|[0-9a-fA-F]{64}[ \t]*$|[ \t]*$).*$", re.MULTILINE)
_COMMENT = re.compile(r"^[ \t]*#(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KeepList:
    """Pictures to keep, by their content.

    Attributes:
        path: where it was read, for messages.
        contents: uint8 [N, 32], ascending, each once.
        comments: how it was made.
    """

    path: Path
    contents: NDArray[np.uint8]
    comments: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.contents)

    def holds(self, contents: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Tell which contents, uint8 [M, 32], are on the list: bool [M]."""
        ours, theirs = _whole(self.contents), _whole(contents)
        places = np.minimum(np.searchsorted(ours, theirs), len(ours) - 1)
        found: NDArray[np.bool_] = ours[places] == theirs
        return found


def _whole(contents: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """One item for each row, which compares by all of its bytes."""
    found: NDArray[np.bytes_] = np.ascontiguousarray(contents).view(f"S{_BYTES}").reshape(-1)
    return found


def write_keep_list(path: Path, contents: NDArray[np.uint8], comments: Sequence[str]) -> None:
    """Write contents, uint8 [N, 32], below `comments`, one a line; whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"# {on_one_line(line)}\n" for line in comments)
        file.writelines(f"{row.tobytes().hex()}\n" for row in contents)


def read_keep_list(path: Path) -> KeepList:
    """Read a list of 64 hexadecimal digits a line, with blank lines and comments behind #.

    Raises:
        InputError: the file cannot be read, a line is anything else (the message says which), or
            nothing is on the list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no list of pictures: it is not UTF-8; `edgeclip data-report` writes one"
        ) from error
    wrong = _WRONG.search(text)
    if wrong is not None:
        line = text.count("\n", 0, wrong.start()) + 1
        shown = on_one_line(wrong[0][:70])
        raise InputError(
            f"{path}, line {line}: {shown!r} is not the content of a picture (64 hexadecimal "
            "digits); `edgeclip data-report` writes such a list"
        )
    digits = _COMMENT.sub("", text)
    contents = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(-1, _BYTES)
    if not len(contents):
        raise InputError(f"{path} lists no picture, so nothing would be left to train on")
    contents = np.unique(_whole(contents)).view(np.uint8).reshape(-1, _BYTES)
    comments = tuple(found.strip() for found in _COMMENT.findall(text))
    return KeepList(path, contents, comments)


def kept_rows(source: Source, keep: KeepList) -> NDArray[np.int64]:
    """Return the indices of a source's pictures that are on the list, ascending: int64 [K].

    Of pictures with the same content only the first is kept. Pictures that cannot be read are not;
    those of the list that the source lacks are counted in a warning.

    Raises:
        InputError: none of the source's pictures is on the list.
    """
    contents = np.zeros((len(source), _BYTES), np.uint8)
    can_be_read = np.zeros(len(source), bool)
    for index in tqdm(range(len(source)), desc="keep", unit="img", dynamic_ncols=True):
        try:
            contents[index] = np.frombuffer(bytes.fromhex(source.content(index)), np.uint8)
            can_be_read[index] = True
        except InputError:
            continue
    rows = np.flatnonzero(can_be_read & keep.holds(contents))
    _, first = np.unique(_whole(contents[rows]), return_index=True)
    rows = np.sort(rows[first]).astype(np.int64)
    if not len(rows):
        told = f" It says: {keep.comments[0]}." if keep.comments else ""
        raise InputError(
            f"none of the {len(source)} pictures of {source.name} is on the list {keep.path}, "
            "which was made of other pictures, or with a teacher of another resolution: make it "
            f"again with `edgeclip data-report`.{told}"
        )
    if len(rows) < len(keep):
        _log.warning(
            "%d of the %d pictures on %s are not in %s",
            len(keep) - len(rows), len(keep), keep.path, source.name,
        )  # fmt: skip
    return rows
