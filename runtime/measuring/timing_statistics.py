"""Percentiles and paired ratios of run times, with bootstrap intervals.

Run times close to each other in time are alike (clock, temperature, neighbours), so whole
blocks are resampled: the circular block bootstrap (Politis and Romano, 1992) with blocks
of about the cube root of the number of runs. Single draws would claim too narrow intervals.
"""

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.intervals import Interval

_DRAWS = 1000
_LEVEL = 0.95


def percentile_interval(values: NDArray[np.float64], percent: float, *, seed: int = 0) -> Interval:
    """The `percent`th percentile of `values` [N], with its 95% interval, in their unit.

    An interval of a high percentile is only as good as the number of runs beyond it: the
    99th of 100 runs rests on a single one.
    """
    return Interval(
        float(np.percentile(values, percent)),
        *_bounds(np.percentile(_resamples(values, seed), percent, axis=1)),
    )


def paired_ratio(
    values: NDArray[np.float64], reference: NDArray[np.float64], *, seed: int = 0
) -> Interval:
    """Median of values[i] / reference[i], both [N] from the same rounds, with its 95% interval."""
    return percentile_interval(values / reference, 50, seed=seed)


def rate_interval(seconds: NDArray[np.float64], items: int, *, seed: int = 0) -> Interval:
    """Items per second at the median of the run times [N] of `items` each."""
    median = percentile_interval(seconds, 50, seed=seed)
    return Interval(items / median.value, items / median.high, items / median.low)


def _resamples(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Block resamples of `values` [N]: [draws, N]."""
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(count, size=(_DRAWS, -(-count // block)))
    at = (starts[:, :, None] + np.arange(block)) % count
    return values[at.reshape(_DRAWS, -1)[:, :count]]


def _bounds(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
