"""Percentiles, rates and paired ratios of run times, with 95% intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.measurement import Latency
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_MOST_STEPS, _EXACT = 100, 1e-13  # of Newton's method; some ten are needed


def chance_below(t: float, degrees: float) -> float:
    """The chance that a value of Student's distribution lies below `t`; `degrees` at least 1."""
    return _chance_below(math.atan2(t, math.sqrt(degrees)), degrees)


@lru_cache(maxsize=1024)
def quantile(chance: float, degrees: float) -> float:
    """The value below which `chance`, in (0, 1), of the distribution lies; `degrees` >= 1."""
    if chance < 0.5:
        return -quantile(1 - chance, degrees)
    angle = 0.0
    for _ in range(_MOST_STEPS):  # the chance is concave here: no step goes too far
        step = (chance - _chance_below(angle, degrees)) / _density(angle, degrees)
        angle += step
        if abs(step) < _EXACT:
            break
    return math.sqrt(degrees) * math.tan(angle)


def _chance_below(angle: float, degrees: float) -> float:
    heights = np.cos(angle * (_NODES + 1) / 2) ** (degrees - 1)
    return 0.5 + _density(0.0, degrees) * angle / 2 * float(_WEIGHTS @ heights)


def _density(angle: float, degrees: float) -> float:
    """Of the angle."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    return float(scale / math.sqrt(math.pi) * math.cos(angle) ** (degrees - 1))


_DRAWS = 1000
_TRIMMED = 5  # one of so many processes, at either end
_BATCHED = 8  # processes, from which on neighbours are taken together
_FEW_DRAWS = 200  # enough for a standard deviation
_TAIL = 0.025  # beyond each end of a 95% interval
_NORMAL = 1.959964  # standard deviations to that end
_LEAST = 1e-9  # has a logarithm, and is below what any clock tells
_VALUES_AT_ONCE = 1 << 21  # 16 MiB of indices, and as much of values
_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

Runs = NDArray[np.float64]  # of one process, in order


def latency_of(processes: Sequence[Runs], *, seed: int = 0) -> Latency:
    """Percentiles of milliseconds, one array [runs] a process, with their 95% intervals.

    They are those of a typical process: the geometric mean of the processes' own percentiles. An
    interval of a high percentile is only as good as the number of runs beyond it, and that of a
    single process tells of no other.

    Raises:
        InputError: no process, or one without runs.
    """
    p50, p90, p95, p99, p99_9 = _percentiles(processes, _PERCENTILES, seed)
    count = min(map(len, processes))
    return Latency(
        runs=sum(map(len, processes)),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if count >= 100 else None,
        p99_9_ms=p99_9 if count >= 1000 else None,
    )


def percentile_interval(values: Runs, percent: float, *, seed: int = 0) -> Interval:
    """The `percent`th percentile of `values` [N], with its 95% interval, in their unit.

    An interval of a high percentile is only as good as the number of runs beyond it: the
    99th of 100 runs rests on a single one.
    """
    return _percentiles([values], [percent], seed)[0]


def paired_ratio(values: Runs, reference: Runs, *, seed: int = 0) -> Interval:
    """Median of values[i] / reference[i], both [N] from the same rounds, with its 95% interval."""
    return percentile_interval(values / reference, 50, seed=seed)


def paired_ratio_of(
    values: Sequence[Runs], reference: Sequence[Runs], *, seed: int = 0
) -> Interval:
    """Median of the ratios of the same rounds, over some processes, with its 95% interval.

    Args:
        values, reference: one array [rounds] a process; round i of both is the same moment.
        seed: of the draws.

    Raises:
        InputError: they do not hold the same processes and rounds.
    """
    return _percentiles(round_ratios(values, reference), [50], seed)[0]


def round_ratios(values: Sequence[Runs], reference: Sequence[Runs]) -> list[Runs]:
    """values / reference, round by round: one array [rounds] a process.

    Raises:
        InputError: they do not hold the same processes and rounds.
    """
    if [len(item) for item in values] != [len(item) for item in reference]:
        raise InputError(
            "runs can be paired only where both were made in the same processes and rounds: "
            f"got {_counts(values)} and {_counts(reference)}"
        )
    return [ours / theirs for ours, theirs in zip(values, reference, strict=True)]


def rate_interval(seconds: Runs, items: int, *, seed: int = 0) -> Interval:
    """Items per second at the median of the run times [N] of `items` each."""
    median = percentile_interval(seconds, 50, seed=seed)
    return Interval(items / median.value, items / median.high, items / median.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSummary:
    """The logarithms of one value of each of some processes, summed up without their extremes.

    On a shared machine now and then a whole process is disturbed. Of five processes and more a
    fifth is left out at either end (Yuen, "The two-sample trimmed t for unequal population
    variances", Biometrika 61, 1974).

    Attributes:
        processes: how many.
        mean: of the logarithms of those that are kept.
        spread: so large that spread / sqrt(processes) is the standard error of `mean`; without
            trimming the standard deviation. None for one process, which tells of no other.
        degrees: of freedom of `spread`.
        noise: the standard deviation that a process's own runs explain; 0 where they cannot tell.
    """

    processes: int
    mean: float
    spread: float | None
    degrees: int
    noise: float


def process_medians(processes: Sequence[Runs], *, seed: int = 0) -> ProcessSummary:
    """Sum up the medians of positive values, one array [runs] a process.

    Raises:
        InputError: no process, or one without runs.
    """
    _check(processes)
    return _summed_up(_logs(processes, [50])[:, 0], float(_noise(processes, [50], seed)[0]))


def process_minima(processes: Sequence[Runs]) -> ProcessSummary:
    """Sum up the fastest of positive values, one array [runs] a process.

    Other programs only ever add time, so the fastest run is the one they disturbed least (Chen
    and Revels, "Robust benchmarking in noisy environments", arXiv:1608.04295, 2016).

    Raises:
        InputError: no process, or one without runs.
    """
    _check(processes)
    return _summed_up(_logs(processes, [0])[:, 0], noise=0.0)


def _summed_up(values: Runs, noise: float) -> ProcessSummary:
    logs = np.sort(values)
    count, trim = len(logs), len(logs) // _TRIMMED
    kept = logs[trim : count - trim]
    spread = None
    if count > 1:
        variance = np.clip(logs, kept[0], kept[-1]).var(ddof=1)
        degrees = len(kept) - 1
        spread = math.sqrt(count * (count - 1) * variance / (len(kept) * degrees))
    return ProcessSummary(
        processes=count,
        mean=float(kept.mean()),
        spread=spread,
        degrees=len(kept) - 1,
        noise=noise,
    )


def _percentiles(
    processes: Sequence[Runs], percents: Sequence[float], seed: int
) -> tuple[Interval, ...]:
    _check(processes)
    if len(processes) == 1:
        values = _at(processes[0], percents)
        draws = _draw(processes[0], percents, seed, _DRAWS)
        low, high = np.quantile(draws, [_TAIL, 1 - _TAIL], axis=1)
    else:
        logs = _logs(processes, percents)
        half = _half(logs, _noise(processes, percents, seed))
        values, low, high = (np.exp(logs.mean(axis=0) + side * half) for side in (0, -1, 1))
    ends = zip(values, np.minimum(low, values), np.maximum(high, values), strict=True)
    return tuple(Interval(*map(float, item)) for item in ends)


def _half(logs: Runs, noise: Runs) -> Runs:
    """Half the width of Student's interval of the mean of `logs` [processes, N]: [N]."""
    batches = logs
    if len(logs) >= _BATCHED:
        parts = np.array_split(logs, len(logs) // 2)
        batches = np.array([part.mean(axis=0) for part in parts])
    between = batches.std(axis=0, ddof=1) / math.sqrt(len(batches))
    within = noise / math.sqrt(len(logs))
    return np.asarray(np.maximum(quantile(1 - _TAIL, len(batches) - 1) * between, _NORMAL * within))


def _logs(processes: Sequence[Runs], percents: Sequence[float]) -> Runs:
    """Logarithms of percentiles: [processes, percentiles]."""
    return np.log(np.maximum([_at(runs, percents) for runs in processes], _LEAST))


def _noise(processes: Sequence[Runs], percents: Sequence[float], seed: int) -> Runs:
    """Standard deviation of one process's log percentiles from its runs alone: [percentiles]."""
    variances = []
    for number, runs in enumerate(processes):
        draws = _draw(runs, percents, seed + number, _FEW_DRAWS)
        variances.append(np.log(np.maximum(draws, _LEAST)).var(axis=1))
    return np.asarray(np.sqrt(np.mean(variances, axis=0)))


def _at(values: Runs, percents: Sequence[float]) -> Runs:
    """Percentiles of the last axis: [percentiles, ...]. See Hyndman and Fan (1996) for "8"."""
    return np.asarray(np.percentile(values, percents, axis=-1, method="median_unbiased"))


def _draw(values: Runs, percents: Sequence[float], seed: int, draws: int) -> Runs:
    """Percentiles of block resamples of `values` [N]: [percentiles, draws]."""
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    generator = np.random.default_rng(seed)
    found, chunk = [], max(1, _VALUES_AT_ONCE // count)
    for done in range(0, draws, chunk):
        size = min(chunk, draws - done)
        starts = generator.integers(count, size=(size, -(-count // block)))
        at = (starts[:, :, None] + np.arange(block)) % count
        found.append(_at(values[at.reshape(size, -1)[:, :count]], percents))
    return np.concatenate(found, axis=1)


def _check(processes: Sequence[Runs]) -> None:
    if not processes or min(map(len, processes)) == 0:
        raise InputError("no run was timed: there is nothing to take a percentile of")


def _counts(processes: Sequence[Runs]) -> str:
    return f"{len(processes)} processes of {'/'.join(str(len(item)) for item in processes)} runs"
