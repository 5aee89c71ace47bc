"""Percentile bootstrap intervals (Efron 1979) of means, differences, ratios and percentiles.

Items are drawn with replacement. Paired statistics draw the same items for both models, which
makes the interval of their difference much narrower than those of the two values alone.
Everything is deterministic given the seed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval

_INDICES_AT_ONCE = 1 << 21  # 16 MiB of indices, and as much of values


def bootstrap(
    per_item: NDArray[Any], *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """Return the mean of per-item values [N] and its interval.

    Args:
        per_item: one number or boolean per item.
        seed: seed of the random draws.
        draws: how many resamples.
        level: coverage of the interval, in (0, 1).

    Raises:
        InputError: an empty array, another shape, NaN, or draws or level out of range.
    """
    return _bootstrap((per_item,), lambda drawn: drawn[0].mean(axis=1), seed, draws, level)


def bootstrap_difference(
    ours: NDArray[Any],
    reference: NDArray[Any],
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return mean(ours) - mean(reference) over the same items [N], and its interval.

    Raises:
        InputError: as `bootstrap`, or the two differ in length.
    """
    return _bootstrap(
        (ours, reference),
        lambda drawn: drawn[0].mean(axis=1) - drawn[1].mean(axis=1),
        seed,
        draws,
        level,
    )


def bootstrap_ratio(
    ours: NDArray[Any],
    reference: NDArray[Any],
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return mean(ours) / mean(reference) over the same items [N], and its interval.

    The retention of a student is this ratio of its hits to the teacher's.

    Raises:
        InputError: as `bootstrap_difference`, or the reference's mean is not positive in
            every draw (it has too few hits for a ratio to mean anything).
    """
    return _bootstrap((ours, reference), _ratio_of_means, seed, draws, level)


def bootstrap_percentile(
    per_item: NDArray[Any],
    percentile: float,
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return a percentile (0 to 100) of per-item values [N] and its interval.

    Raises:
        InputError: as `bootstrap`, or a percentile outside 0 to 100.
    """
    if not 0 <= percentile <= 100:
        raise InputError(f"a percentile lies between 0 and 100, not at {percentile}")

    def statistic(drawn: tuple[Values, ...]) -> Values:
        return np.asarray(np.percentile(drawn[0], percentile, axis=1), dtype=np.float64)

    return _bootstrap((per_item,), statistic, seed, draws, level)


def _ratio_of_means(drawn: tuple[Values, ...]) -> Values:
    below = drawn[1].mean(axis=1)
    if below.min() <= 0:
        raise InputError(
            "a ratio needs a reference whose mean is positive in every draw: use more items"
        )
    ratio: Values = drawn[0].mean(axis=1) / below
    return ratio


def _bootstrap(
    arrays: tuple[NDArray[Any], ...],
    statistic: Callable[[tuple[Values, ...]], Values],
    seed: int,
    draws: int,
    level: float,
) -> Interval:
    """Compute a statistic of the items and its interval; it maps drawn values [D, N] to [D]."""
    values = _check_values(arrays)
    if draws < 1 or not 0 < level < 1:
        raise InputError(f"need draws >= 1 and 0 < level < 1, got {draws} and {level}")
    count = len(values[0])
    generator = np.random.default_rng(seed)
    chunk = max(1, _INDICES_AT_ONCE // count)
    drawn = []
    for start in range(0, draws, chunk):
        items = generator.integers(0, count, size=(min(chunk, draws - start), count))
        drawn.append(statistic(tuple(array[items] for array in values)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), (tail, 1 - tail))
    value = statistic(tuple(array[None] for array in values))[0]
    return Interval(float(value), float(low), float(high))


def _check_values(arrays: tuple[NDArray[Any], ...]) -> tuple[Values, ...]:
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
