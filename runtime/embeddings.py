"""Checks shared by everything that takes embeddings or compares them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError, SpaceMismatchError

# Rounding to fp16 moves a unit vector's length by less than this.
_UNIT_TOLERANCE = 5e-3


def check_matrix(array: object, what: str) -> None:
    """Refuse anything but a finite floating-point matrix [rows >= 1, dim >= 1].

    Args:
        array: the embeddings.
        what: their name in the message.

    Raises:
        InputError: not an array, not floats, another shape, empty, NaN or infinity.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"{what} must be a numpy array of floats, not {kind}")
    if array.ndim == 1:
        raise InputError(f"{what} must have shape [N, dim], not {array.shape}: use array[None]")
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"{what} must have shape [N, dim] with at least one row, not {array.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(
            f"NaN or infinity in {bad.size} of {len(array)} rows of {what}, "
            f"first in row {bad[0]}: look for what put it there"
        )


def check_unit_rows(array: NDArray[Any], what: str) -> None:
    """Refuse anything but a finite matrix whose rows have length 1.

    Raises:
        InputError: as `check_matrix`, or a row that is not L2-normalised.
    """
    check_matrix(array, what)
    lengths = np.linalg.norm(array.astype(np.float32, copy=False), axis=1)
    off = np.flatnonzero(np.abs(lengths - 1) > _UNIT_TOLERANCE)
    if off.size:
        raise InputError(
            f"{what} must be L2-normalised, but row {off[0]} has length "
            f"{lengths[off[0]]:.4g}: divide each row by its length"
        )


def check_embeddings(array: object, dim: int, what: str) -> None:
    """Refuse anything but float32 [N, dim] with rows of length 1; N may be 0.

    Raises:
        InputError: as `check_unit_rows`, or another shape or dtype.
    """
    wanted = f"{what} must be a float32 array [N, {dim}] of embeddings"
    if not isinstance(array, np.ndarray):
        raise InputError(f"{wanted}, not {type(array).__name__}")
    if array.ndim != 2 or array.shape[1] != dim or array.dtype != np.float32:
        raise InputError(f"{wanted}, not {array.dtype} {list(array.shape)}")
    if len(array):
        check_unit_rows(array, what)


def check_space(expected: str, found: str, what: str) -> None:
    """Refuse to compare embeddings of two embedding spaces.

    Args:
        expected: fingerprint of the encoder's embedding space.
        found: fingerprint that `what` carries.
        what: its name in the message, such as "the index photos.npz".

    Raises:
        SpaceMismatchError: the two differ.
    """
    if expected != found:
        raise SpaceMismatchError(
            f"{what} was made in the embedding space {found[:12]}, not in {expected[:12]}: "
            "make it again with an encoder of this space"
        )


def check_keyed(what: str, keys: Sequence[object], embeddings: NDArray[Any], space: object) -> None:
    """Check that unique texts name the rows of unit float32 embeddings.

    Raises:
        InputError: repeated, empty or too few keys, or embeddings that are not float32
            [len(keys), dim] with rows of length 1, or no space.
    """
    check_unit_rows(embeddings, f"{what} embeddings")
    if embeddings.dtype != np.float32:
        raise InputError(f"{what} embeddings must be float32, not {embeddings.dtype}")
    if len(keys) != len(embeddings):
        raise InputError(f"{len(keys)} {what} names cannot name {len(embeddings)} embeddings")
    if not all(isinstance(key, str) and key for key in keys):
        raise InputError(f"every {what} name must be a text that is not empty")
    if len(set(keys)) != len(keys):
        first = Counter(keys).most_common(1)[0][0]
        raise InputError(f"the {what} name {first!r} comes twice: make the names unique")
    if not isinstance(space, str) or not space:
        raise InputError(f"{what} embeddings need the fingerprint of their embedding space")


def text_tuple(value: object) -> tuple[str, ...]:
    """Turn what JSON gave for a list of texts into a tuple.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError("a list of texts was expected")
    return tuple(value)
