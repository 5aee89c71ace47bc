"""Shorter and coarser embeddings: the axes of an embedding space, and rows reduced by them.

Any embedding of the space, of an image or a text, of teacher or student, is reduced alike: it is
turned onto the space's principal axes, cut to the first `length` of them, and normalised again. So
the length of a row says nothing of who made it, and full embeddings stay as they are.

- float32: the row itself.
- int8: each row divided by its largest absolute value, times 127, and rounded. The scale need not
  be kept, as a row has length 1.
- binary: the signs, 8 in a byte, after a random rotation of the cut row. On the principal axes
  themselves most signs would be those of noise. A rotation that is fitted to the signs (ITQ, Gong
  and Lazebnik, CVPR 2011) is no better where bits outnumber the dimensions that hold something;
  `tests/benchmarks/matryoshka.py` shows both.

A query is never quantized: it meets the signs of a row as floats (asymmetric distance, Gordo et
al., IEEE TPAMI 36, 2014).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip.runtime.arrays import FloatArray, Values
from edgeclip.runtime.bundle.files import read_npz, write_npz
from edgeclip.runtime.bundle.index import check_unit_rows
from edgeclip.runtime.errors import ConfigError, InputError

BASIS_NAME = "basis.npz"
RowType = Literal["float32", "int8", "binary"]
ROW_TYPES: tuple[RowType, ...] = get_args(RowType)

_KIND = "edgeclip-basis-1"
_MOST = 127  # of an int8 value: symmetric, so without -128
_LONGEST = 1 << 16  # dimensions of any embedding
_ORTHOGONAL = 1e-3  # how far the product of two axes may be off


@dataclass(frozen=True, slots=True)
class Form:
    """A form of reduced embeddings: how many dimensions, and the type of a row."""

    length: int
    dtype: RowType

    def __post_init__(self) -> None:
        if self.length < 1 or self.dtype not in ROW_TYPES:
            raise ValueError(f"no form of embeddings: {self.length} dimensions, {self.dtype}")

    def __str__(self) -> str:
        return f"{self.length} {self.dtype}"

    @property
    def row(self) -> tuple[tuple[int, ...], DTypeLike]:
        """Shape and dtype of one row."""
        if self.dtype == "binary":
            return (-(-self.length // 8),), np.uint8
        return (self.length,), self.dtype


@dataclass(frozen=True, eq=False)
class Reducer:
    """Reduces embeddings of one space to one form.

    `axes` is float32 [length, dim] with orthonormal rows: the principal axes, rotated for binary.

    Raises:
        InputError: axes of another shape or dtype, not finite or not orthonormal.
    """

    form: Form
    axes: FloatArray
    space: str

    def __post_init__(self) -> None:
        _check_axes(self.axes, self.form.length)

    @property
    def dim(self) -> int:
        """Length of a full embedding."""
        return int(self.axes.shape[1])

    @cached_property
    def digest(self) -> str:
        """What reduced embeddings must have in common to be compared: 64 hex digits."""
        found = hashlib.sha256(f"{self.space} {self.form}".encode())
        found.update(np.ascontiguousarray(self.axes, "<f4").tobytes())
        return found.hexdigest()

    def reduce(self, embeddings: NDArray[Any]) -> FloatArray:
        """Turn, cut and normalise full embeddings [N, dim], for a query: float32 [N, length].

        Raises:
            InputError: another shape, NaN, rows not L2-normalised, or one of which nothing is left.
        """
        check_unit_rows(embeddings, "embeddings")
        if embeddings.shape[1] != self.dim:
            raise InputError(
                f"embeddings have {embeddings.shape[1]} dimensions, and {self.dim} are reduced to "
                f"{self.form.length}: give full embeddings of the space"
            )
        cut = embeddings.astype(np.float32, copy=False) @ self.axes.T
        lengths = np.linalg.norm(cut, axis=1, keepdims=True)
        if lengths.min() < 1e-6:
            raise InputError(
                f"row {int(lengths.argmin())} of the embeddings has nothing in the first "
                f"{self.form.length} dimensions: choose more of them"
            )
        found: FloatArray = cut / lengths
        return found

    def rows(self, embeddings: NDArray[Any]) -> NDArray[Any]:
        """Reduce full embeddings [N, dim] to rows of the form, as an index holds them.

        Raises:
            InputError: see `reduce`.
        """
        cut = self.reduce(embeddings)
        if self.form.dtype == "int8":
            steps: NDArray[Any] = np.rint(cut * (_MOST / np.abs(cut).max(axis=1, keepdims=True)))
            return steps.astype(np.int8)
        return np.packbits(cut > 0, axis=1) if self.form.dtype == "binary" else cut

    def restore(self, rows: NDArray[Any]) -> FloatArray:
        """Return what rows of the form stand for: float32 [N, length], L2-normalised."""
        if self.form.dtype == "float32":
            return rows
        if self.form.dtype == "binary":
            bits = np.unpackbits(rows, axis=1, count=self.form.length)
            return (bits * np.float32(2) - np.float32(1)) / np.float32(np.sqrt(self.form.length))
        wide = rows.astype(np.float32)
        found: FloatArray = wide / np.linalg.norm(wide, axis=1, keepdims=True)
        return found

    def check_rows(self, rows: NDArray[Any], count: int) -> None:
        """Refuse what `rows` cannot have made of `count` embeddings.

        Raises:
            InputError: another shape or dtype, or values that no row has.
        """
        if not count:
            raise InputError("an index needs at least one row")
        shape, dtype = self.form.row
        if rows.shape != (count, *shape) or rows.dtype != dtype:
            raise InputError(
                f"{count} rows of {self.form} are {np.dtype(dtype)} {[count, *shape]}, not "
                f"{rows.dtype} {list(rows.shape)}"
            )
        wrong = False
        if self.form.dtype == "float32":
            check_unit_rows(rows, "reduced embeddings")
        elif self.form.dtype == "int8":
            wrong = bool((np.abs(rows.astype(np.int16)).max(axis=1) != _MOST).any())
        elif self.form.length % 8:
            wrong = bool((rows[:, -1] & ((1 << (-self.form.length % 8)) - 1)).any())
        if wrong:
            raise InputError(f"rows of {self.form} hold values that no embedding has")


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Principal axes of an embedding space, and the lengths that are made of them.

    Attributes:
        space: fingerprint of the space.
        axes: float32 [dim, dim], orthonormal rows, those that hold most first.
        turns: of each length the rotation before signs are taken: float32 [length, length],
            longest first.

    Raises:
        InputError: not orthonormal, not finite, or lengths that do not fit.
    """

    space: str
    axes: FloatArray
    turns: tuple[FloatArray, ...]

    def __post_init__(self) -> None:
        _check_axes(self.axes, len(self.axes))
        for turn in self.turns:
            _check_axes(turn, len(turn))
        if len(self.axes) != self.axes.shape[1] or any(
            length != turn.shape[1] for length, turn in zip(self.lengths, self.turns, strict=True)
        ):
            raise InputError("the axes of a basis, and its rotations, are square matrices")
        check_lengths(self.lengths, len(self.axes))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of reduced embeddings, the longest first."""
        return tuple(len(turn) for turn in self.turns)

    @property
    def forms(self) -> tuple[Form, ...]:
        """All forms, without the full embedding itself."""
        every = (Form(length, dtype) for length in self.lengths for dtype in ROW_TYPES)
        return tuple(item for item in every if item != Form(len(self.axes), "float32"))

    def reducer(self, form: Form) -> Reducer:
        """Return what reduces to a form.

        Raises:
            InputError: the basis has no such length.
        """
        if form.length not in self.lengths:
            raise InputError(
                f"embeddings of {form.length} dimensions were not prepared: choose from "
                f"{', '.join(map(str, self.lengths))}"
            )
        axes = self.axes[: form.length]
        if form.dtype == "binary":
            # In float64, or its rounding, which the digest sees, would differ between processors.
            turn = self.turns[self.lengths.index(form.length)].astype(np.float64)
            axes = (turn @ axes.astype(np.float64)).astype(np.float32)
        return Reducer(form, axes, self.space)

    def save(self, path: Path) -> None:
        """Write the basis to an npz file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        meta = {"space": self.space, "lengths": self.lengths}
        turns = np.concatenate([turn.ravel() for turn in self.turns])
        write_npz(path, _KIND, meta, {"axes": self.axes, "turns": turns})

    @classmethod
    def load(cls, path: Path) -> "Basis":
        """Read a basis from an npz file.

        Raises:
            InputError: missing or damaged file, or no basis.
        """
        keys = frozenset({"axes", "turns"})
        meta, arrays = read_npz(path, _KIND, frozenset({"space", "lengths"}), keys)
        space, lengths, turns = meta["space"], meta["lengths"], arrays["turns"]
        try:
            if arrays["axes"].ndim != 2:
                raise InputError("axes of two dimensions were expected")
            if not isinstance(space, str) or not _are_lengths(lengths):
                raise InputError("a fingerprint and a list of lengths were expected")
            ends = np.cumsum([length**2 for length in lengths])
            if turns.ndim != 1 or len(turns) != ends[-1]:
                raise InputError(f"it holds no rotations of {lengths} dimensions")
            parts = zip(np.split(turns, ends[:-1]), lengths, strict=True)
            rotations = tuple(part.reshape(length, length) for part, length in parts)
            return cls(space, arrays["axes"], rotations)
        except (ConfigError, InputError) as error:
            raise InputError(f"{path} is damaged: {error}") from error


def _are_lengths(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 1 <= item <= _LONGEST for item in value)
    )


def check_lengths(lengths: Sequence[int], dim: int) -> None:
    """Check the lengths that embeddings of `dim` numbers are to have besides.

    Raises:
        ConfigError: none, one twice, or one that is not from 1 to `dim`.
    """
    wrong = [length for length in lengths if not 1 <= length <= dim]
    if wrong or not lengths:
        raise ConfigError(
            f"embeddings have {dim} dimensions, and cannot be cut to "
            f"{', '.join(map(str, wrong)) or 'nothing'}: choose lengths from 1 to {dim}"
        )
    if len(set(lengths)) < len(lengths):
        raise ConfigError(f"a length is named twice: {', '.join(map(str, lengths))}")


def make_basis(moment: Values, space: str, lengths: Sequence[int], *, seed: int = 0) -> Basis:
    """Make the basis of a space from the second moment of its embeddings, float64 [dim, dim].

    The moment is about the origin, summed over as many images as texts: where both lie in cones of
    their own, the direction between these is an axis like any other. It stays with its cosines, so
    nothing is subtracted that another data set would not have.

    Args:
        moment: sum of the products of an embedding with itself.
        space: fingerprint.
        lengths: in any order; the full length is always among those of the basis.
        seed: of the rotations.

    Raises:
        ConfigError: see `check_lengths`.
    """
    dim = len(moment)
    check_lengths(lengths, dim)
    _, vectors = np.linalg.eigh(moment)
    axes = vectors[:, ::-1].T
    # The sign of an axis is free: the largest value is made positive, or machines would differ.
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(dim), largest])[:, None]
    random = np.random.default_rng(seed)
    turns = []
    for length in sorted({dim, *lengths}, reverse=True):
        turn, triangle = np.linalg.qr(random.normal(size=(length, length)))
        turns.append((turn * np.sign(np.diag(triangle))).astype(np.float32))
    return Basis(space, np.ascontiguousarray(axes, np.float32), tuple(turns))


def read_basis(folder: Path) -> Basis | None:
    """Read the basis in a model's directory; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / BASIS_NAME
    return Basis.load(path) if path.is_file() else None


def _check_axes(axes: NDArray[Any], count: int) -> None:
    if axes.dtype != np.float32 or axes.ndim != 2 or len(axes) != count or count > axes.shape[1]:
        raise InputError(f"axes must be float32 [{count}, dim], not {axes.dtype} {axes.shape}")
    off = np.abs(axes @ axes.T - np.eye(count, dtype=np.float32)).max(initial=0)
    if not off <= _ORTHOGONAL:  # NaN too
        raise InputError("axes are not orthonormal")
