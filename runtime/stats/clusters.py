"""Check per-item values, and sum them over clusters of items that are not independent."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError

Clusters = NDArray[np.int64]
_ROUNDING = 1e-9


def check_values(*arrays: NDArray[Any]) -> tuple[Values, ...]:
    """Return per-item values as float64 arrays of one length [N].

    Raises:
        InputError: an empty array, another shape, NaN or infinity, or arrays of different lengths.
    """
    values = tuple(np.asarray(array, dtype=np.float64) for array in arrays)
    for array in values:
        if array.ndim != 1 or array.size == 0:
            raise InputError(f"per-item values have shape {array.shape}: give [N] with N >= 1")
        if not np.isfinite(array).all():
            raise InputError("per-item values hold NaN or infinity: look for what made them")
        if len(array) != len(values[0]):
            raise InputError(
                f"paired values have {len(values[0])} and {len(array)} items: "
                "measure both on the same items"
            )
    return values


def check_shares(*arrays: NDArray[Any]) -> tuple[Values, ...]:
    """Return per-item values as `check_values`; each is 0 or more, and their mean a share.

    An item of which more is asked than of others, such as a picture with more captions, may have
    more than 1.

    Raises:
        InputError: as `check_values`, or values that are no hits.
    """
    values = check_values(*arrays)
    for array in values:
        if array.min() < 0 or array.mean() > 1 + _ROUNDING:
            raise InputError(
                f"hits span {array.min():g} to {array.max():g}: give shares from 0 to 1, "
                "such as whether each item was found"
            )
    return values


def effective_count(sizes: Values) -> float:
    """Return how many equal clusters tell as much as clusters of these sizes [C] at least.

    It is Kish's effective sample size ("Survey Sampling", 1965), for items of a cluster that are
    all alike.
    """
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def cluster_sums(clusters: Clusters | None, *values: Values) -> tuple[Values, tuple[Values, ...]]:
    """Sum values [N] over the items of each cluster.

    Args:
        clusters: integers [N], equal for items that belong together; None where each item is a
            cluster of its own.
        values: per-item values.

    Returns:
        The size of each cluster [C], and the sums of each of `values` [C].

    Raises:
        InputError: `clusters` do not fit the values.
    """
    count = len(values[0])
    if clusters is None:
        return np.ones(count), values
    if clusters.shape != (count,) or clusters.dtype.kind not in "iu":
        raise InputError(
            f"clusters have shape {clusters.shape} and dtype {clusters.dtype}: give one integer "
            f"for each of the {count} items"
        )
    _, which = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(which).astype(np.float64)
    return sizes, tuple(np.bincount(which, item).astype(np.float64) for item in values)
