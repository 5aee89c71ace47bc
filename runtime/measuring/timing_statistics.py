"""Percentiles and paired ratios of run times, with bootstrap intervals.

Run times close to each other in time are alike (clock, temperature, neighbours), so whole
blocks are resampled: the circular block bootstrap (Politis and Romano, 1992) with blocks
of about the cube root of the number of runs. Single draws would claim too narrow intervals.
Runs of several processes are drawn in two steps, first the processes: how memory came to lie
makes two processes differ more than two runs of one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.measurement import Latency

_DRAWS = 1000
_LEVEL = 0.95


def latency_of(processes: Sequence[NDArray[np.float64]], *, seed: int = 0) -> Latency:
    """Percentiles of milliseconds, one array [runs] a process, with their 95% intervals."""
    count = sum(map(len, processes))
    draws = _draws(processes, seed)
    every = np.concatenate(processes)

    def at(percent: float) -> Interval:
        found = _bounds(np.array([np.percentile(drawn, percent) for drawn in draws]))
        return Interval(float(np.percentile(every, percent)), *found)

    return Latency(
        runs=count,
        p50_ms=at(50),
        p90_ms=at(90),
        p95_ms=at(95),
        p99_ms=at(99) if count >= 100 else None,
        p99_9_ms=at(99.9) if count >= 1000 else None,
    )


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


def _draws(processes: Sequence[NDArray[np.float64]], seed: int) -> list[NDArray[np.float64]]:
    """Block resamples of the runs of resampled processes."""
    resampled = [_resamples(values, seed + at) for at, values in enumerate(processes)]
    if len(processes) == 1:
        return list(resampled[0])
    chosen = np.random.default_rng(seed).integers(len(processes), size=(_DRAWS, len(processes)))
    return [
        np.concatenate([resampled[at][number] for at in row]) for number, row in enumerate(chosen)
    ]


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
