"""Read WebDataset shards at random, a picture at a time."""

import functools
import glob
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.fetch_shards import fetch_shards, is_remote
from edgeclip.compress.data.shard_index import BLOCK, SPLITS, OpenFile, open_index
from edgeclip.compress.data.sources import KnownContents, Pair, Source, content_of, subset
from edgeclip.compress.data.splits import EmptySplitError
from edgeclip.runtime.console import escape_controls
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import load_image

KEPT_CONTENTS = 1 << 20  # pictures: 32 MB in each process
MOST_JUDGED = 5000  # pictures of a split that is not trained on: the largest usual test set
_OPEN = 64  # shards that a process keeps open
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def open_shards(data: str, *, split: Split, size: int) -> Source:
    """Open WebDataset shards; of a split that is not trained on, at most `MOST_JUDGED` pictures.

    Args:
        data: a folder of .tar files, or a pattern with `*`, `?` or braces as in `{000..099}`;
            `https://...` or `pipe:COMMAND`, with braces too, is fetched first, see `fetch_shards`.
        split: by a hash of each sample's key.
        size: the shortest side that will be needed, in pixels.

    Raises:
        InputError: no shards, a shard that is no tar file or is cut off, or it cannot be fetched.
        ConfigError: a kind of address that cannot be fetched, or no sample is of the split.
    """
    shards = fetch_shards(expand_braces(data)) if is_remote(data) else find_shards(data)
    found = ShardSource(shards, split=split, min_side=size, name=data)
    return judged(found) if split != "train" else found


def judged(source: Source) -> Source:
    """Return at most `MOST_JUDGED` pairs of a source, evenly spaced."""
    count = len(source)
    if count <= MOST_JUDGED:
        return source
    rows = np.arange(MOST_JUDGED, dtype=np.int64) * count // MOST_JUDGED
    return subset(source, rows, name=f"{source.name}, {MOST_JUDGED} of them")


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern with `{a,b}` or `{00..99}` stands for, as in a shell without nesting.

    The left number of a range tells how many digits there are at least.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _RANGE.fullmatch(match[1])
    if numbers is None and "," not in match[1]:  # braces that mean nothing, as in a command
        rest = expand_braces(pattern[match.end() :])
        return [pattern[: match.end()] + end for end in rest]
    items = match[1].split(",")
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1
        digits = (
            max(len(numbers[1]), len(numbers[2])) if "0" in (numbers[1][0], numbers[2][0]) else 0
        )
        items = [f"{number:0{digits}d}" for number in range(first, last + step, step)]
    return [
        found
        for item in items
        for found in expand_braces(pattern[: match.start()] + item + pattern[match.end() :])
    ]


def find_shards(data: str) -> tuple[Path, ...]:
    """Return the shards that a folder or a pattern stands for, sorted by name within a pattern.

    Raises:
        InputError: there are none, or one of them is compressed.
    """
    if Path(data).is_dir():
        found = sorted(Path(data).glob("*.tar"))
    else:
        found = []
        for pattern in expand_braces(data):
            matched = sorted(glob.glob(pattern)) or ([pattern] if Path(pattern).exists() else [])
            if not matched:
                raise InputError(f"{pattern} matches no shard: check the path")
            found += map(Path, matched)
    packed = [path for path in found if path.suffix in (".gz", ".tgz", ".zst", ".xz", ".bz2")]
    if packed:
        raise InputError(
            f"{packed[0]} is compressed, so its pictures cannot be read one by one: unpack it to a "
            ".tar file (pictures hardly shrink)"
        )
    if not found:
        raise InputError(f"{data} holds no .tar file: give a folder or a pattern of shards")
    return tuple(dict.fromkeys(found))


class ShardSource:
    """The samples of WebDataset shards that have a picture.

    Args:
        shards: local .tar files.
        split: take the samples of this split, by the hash of their key; None for all.
        min_side: the shortest side that will be needed, in pixels; see `load_image`.
        name: the name for messages and records; by default the first shard's.

    Raises:
        InputError: a shard is no tar file or is cut off, or none holds a picture.
        EmptySplitError: no sample is of that split.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        split: Split | None = None,
        min_side: int | None = None,
        name: str | None = None,
    ) -> None:
        self.split = split
        self._shards = tuple(shards)
        self._given_name = name
        self._min_side = min_side
        self._index = open_index(self._shards)
        everything = len(self._index.offset)
        shown = escape_controls(name or str(self._shards[0]))
        if not everything:
            raise InputError(f"{shown}: none of {len(shards)} shards holds a picture")
        self._rows: NDArray[np.uint32] | NDArray[np.int64] | None = None  # None for all
        if split is not None:
            code = SPLITS.index(split) if split in SPLITS else len(SPLITS)
            rows = np.flatnonzero(self._index.split == code)
            self._rows = rows.astype(np.uint32) if everything < 2**32 else rows
            if not len(self._rows):
                raise EmptySplitError(
                    f"none of the {everything} samples in {shown} falls to {split}: give more"
                )
        part = "" if split is None else f" of {everything}, for {split}"
        self.name = f"{shown}, {len(self)} pictures{part}"
        self._opened = functools.lru_cache(maxsize=_OPEN)(OpenFile)
        self._contents = KnownContents(len(self), most=KEPT_CONTENTS)
        self._last: tuple[int, bytes] = (-1, b"")  # a picture's content and pixels need one read

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the index itself, and opens the shards.
        make = functools.partial(
            ShardSource, split=self.split, min_side=self._min_side, name=self._given_name
        )
        return make, (self._shards,)

    @property
    def identity(self) -> str:
        """A string that changes with the name, size, time or caption of any member."""
        return f"shards:{self._min_side}:{self.split}:{self._index.digest}"

    @property
    def has_captions(self) -> bool:
        return self._index.captions.any()

    @property
    def most_captions(self) -> int:
        """The most captions of a picture."""
        return self._index.captions.most()

    def __len__(self) -> int:
        return len(self._index.offset) if self._rows is None else len(self._rows)

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self._rows is None else int(self._rows[index])

    def __getitem__(self, index: int) -> Pair:
        row = self._row(index)
        data = self._read(row)
        try:
            return Pair(load_image(data, min_side=self._min_side), self.caption(index))
        except InputError as error:
            raise InputError(f"{self._named(row)}: {error}") from error

    def caption(self, index: int) -> str | None:
        return next(iter(self.captions(index)), None)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._index.captions[self._row(index)]

    def content(self, index: int) -> str:
        """Return a hash of the picture's bytes and of how they are decoded."""
        row = self._row(index)
        return self._contents.of(
            index, lambda: content_of(hashlib.sha256(self._read(row)).digest(), self._min_side)
        )

    def _read(self, row: int) -> bytes:
        last, data = self._last
        if last == row:
            return data
        path = self._shards[self._index.shard_of(row)]
        size = int(self._index.size[row])
        try:
            data = self._opened(path).read(int(self._index.offset[row]), size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise InputError(f"{path} has become shorter while it was used: restore it")
        self._last = (row, data)
        return data

    def _named(self, row: int) -> str:
        """Return the shard and the name of a picture, from the tar header before its bytes."""
        path = self._shards[self._index.shard_of(row)]
        head = self._opened(path).read(int(self._index.offset[row]) - BLOCK, 100)
        return f"{path}, {escape_controls(head.split(bytes(1))[0].decode('utf-8', 'replace'))}"
