"""Keep the texts of very many items in a few arrays, instead of an object for each."""

import itertools
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

# File names that are no UTF-8, and captions from JSON, may hold halves of surrogate pairs.
_ERRORS = "surrogatepass"


@dataclass(frozen=True, slots=True)
class PackedTexts(Sequence[tuple[str, ...]]):
    """Some texts for each of N items, M in all; the arrays may be memory-mapped.

    Attributes:
        first: number of the first text of each item, and M at the end: int64 [N + 1].
        start: where each text begins, and the end of the last: int64 [M + 1].
        text: the texts in UTF-8, one behind the other: uint8.
    """

    first: NDArray[np.int64]
    start: NDArray[np.int64]
    text: NDArray[np.uint8]

    @classmethod
    def of(cls, items: Iterable[Sequence[str]]) -> "PackedTexts":
        """Pack the texts of each item."""
        counts, lengths, joined = array("q", [0]), array("q", [0]), bytearray()
        for texts in items:
            counts.append(len(texts))
            for text in texts:
                encoded = text.encode("utf-8", _ERRORS)
                lengths.append(len(encoded))
                joined += encoded
        return cls(
            np.cumsum(np.frombuffer(counts, np.int64)),
            np.cumsum(np.frombuffer(lengths, np.int64)),
            np.frombuffer(bytes(joined), np.uint8),
        )

    @classmethod
    def joined(cls, parts: Sequence["PackedTexts"]) -> "PackedTexts":
        """Return the items of all parts, in order."""
        counts = [np.diff(part.first) for part in parts]
        lengths = [np.diff(part.start) for part in parts]
        none = np.zeros(1, np.int64)
        return cls(
            np.cumsum(np.concatenate([none, *counts])),
            np.cumsum(np.concatenate([none, *lengths])),
            np.concatenate([np.empty(0, np.uint8), *(part.text for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.first) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[str, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = _checked(index, len(self))
        start = self.start[self.first[number] : self.first[number + 1] + 1].tolist()
        return tuple(
            self.text[begin:end].tobytes().decode("utf-8", _ERRORS)
            for begin, end in itertools.pairwise(start)
        )

    def take(self, rows: NDArray[np.int64]) -> "PackedTexts":
        """Return the items of some rows."""
        return PackedTexts.of(self[row] for row in rows.tolist())

    def any(self) -> bool:
        """Tell whether any item has a text."""
        return len(self.start) > 1

    def most(self) -> int:
        """Return the most texts that an item has."""
        return int(np.diff(self.first).max(initial=0))


@dataclass(frozen=True, slots=True)
class PackedPaths(Sequence[Path]):
    """Paths below a folder."""

    folder: Path
    names: PackedTexts

    @classmethod
    def of(cls, folder: Path, paths: Iterable[Path]) -> "PackedPaths":
        """Pack paths, all of which begin with the folder."""
        return cls(folder, PackedTexts.of((str(path.relative_to(folder)),) for path in paths))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Path, ...]: ...
    def __getitem__(self, index: int | slice) -> Path | tuple[Path, ...]:
        if isinstance(index, slice):
            return tuple(self.folder / name for (name,) in self.names[index])
        return self.folder / self.names[index][0]

    def take(self, rows: NDArray[np.int64]) -> "PackedPaths":
        """Return the paths of some rows."""
        return PackedPaths(self.folder, self.names.take(rows))


def _checked(index: int, count: int) -> int:
    """Return a place from the start; an index below 0 counts from the end."""
    number = operator.index(index)
    number += count if number < 0 else 0
    if not 0 <= number < count:
        raise IndexError(index)
    return number
