"""Percentiles, throughput and paired ratios of run times, with 95% confidence intervals.

Run times of one process are resampled in blocks (moving block bootstrap), since neighbours are
alike. Over several processes an interval is Student's t interval of the logarithms of the
processes' own percentiles, because two processes differ more than two runs of one process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.measurement import Latency
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import student_t_quantile

Runs = NDArray[np.float64]  # run times of one process, in order: [runs]

_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_TAIL = 0.025  # probability beyond each end of a 95% interval
_NORMAL = 1.959964  # its end in standard deviations of a normal distribution
_DRAWS = 1000  # bootstrap resamples for an interval
_FEW_DRAWS = 200  # enough for a standard deviation
_TRIM_ONE_IN = 5  # one fifth of the processes is trimmed at either end
_BATCHED = 8  # from so many processes on, neighbours are averaged first
_SMALLEST = 1e-9  # replaces 0 before taking the logarithm; below the resolution of any clock
_VALUES_AT_ONCE = 1 << 21  # per bootstrap chunk: 16 MiB of indices and 16 MiB of values


def latency_of(processes: Sequence[Runs], *, seed: int = 0) -> Latency:
    """Compute latency percentiles with 95% intervals from milliseconds, one array per process.

    A value is the geometric mean of the processes' own percentiles. The interval of a high
    percentile is only as good as the number of runs beyond it, and with a single process the
    interval does not include the variation between processes.

    Raises:
        InputError: no process, or a process without runs.
    """
    p50, p90, p95, p99, p99_9 = _percentiles(processes, _PERCENTILES, seed)
    fewest = min(map(len, processes))
    return Latency(
        runs=sum(map(len, processes)),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if fewest >= 100 else None,
        p99_9_ms=p99_9 if fewest >= 1000 else None,
    )


def percentile_interval(values: Runs, percent: float, *, seed: int = 0) -> Interval:
    """Compute the `percent`th percentile of `values` [N] with its 95% interval, in their unit.

    The interval of a high percentile is only as good as the number of values beyond it: the
    99th percentile of 100 values rests on a single one.
    """
    return _percentiles([values], [percent], seed)[0]


def paired_ratio(values: Sequence[Runs], reference: Sequence[Runs], *, seed: int = 0) -> Interval:
    """Compute the median ratio of runs of the same rounds, with its 95% interval.

    Args:
        values, reference: one array [rounds] per process; entry i of both is from round i.
        seed: seed of the bootstrap.

    Raises:
        InputError: the two differ in number of processes or rounds.
    """
    return _percentiles(round_ratios(values, reference), [50], seed)[0]


def round_ratios(values: Sequence[Runs], reference: Sequence[Runs]) -> list[Runs]:
    """Divide `values` by `reference` round by round: one array [rounds] per process.

    Raises:
        InputError: the two differ in number of processes or rounds.
    """
    if [len(runs) for runs in values] != [len(runs) for runs in reference]:
        raise InputError(
            "runs can be paired only where both were made in the same processes and rounds: "
            f"got {_counts(values)} and {_counts(reference)}"
        )
    return [ours / theirs for ours, theirs in zip(values, reference, strict=True)]


def _counts(processes: Sequence[Runs]) -> str:
    return f"{len(processes)} processes of {'/'.join(str(len(runs)) for runs in processes)} runs"


def rate_interval(seconds: Runs, items: int, *, seed: int = 0) -> Interval:
    """Compute items per second from the median of run times [N] of `items` each."""
    median = percentile_interval(seconds, 50, seed=seed)
    return Interval(items / median.value, items / median.high, items / median.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSummary:
    """Trimmed mean and spread of the logarithm of one statistic (such as the median) per process.

    On a shared machine a whole process is disturbed now and then, so of five or more processes
    a fifth is trimmed at either end (Yuen, "The two-sample trimmed t for unequal population
    variances", Biometrika 61, 1974).

    Attributes:
        processes: number of processes.
        mean: mean of the logarithms that are kept.
        spread: scaled so that spread / sqrt(processes) is the standard error of `mean`; without
            trimming it is the standard deviation. None for a single process.
        degrees: degrees of freedom of `spread`.
        noise: standard deviation that the runs within a process explain; 0 if unknown.
    """

    processes: int
    mean: float
    spread: float | None
    degrees: int
    noise: float


def process_medians(processes: Sequence[Runs], *, seed: int = 0) -> ProcessSummary:
    """Summarize the medians of positive values, one array [runs] per process.

    Raises:
        InputError: no process, or a process without runs.
    """
    _check(processes)
    logs = _log_percentiles(processes, [50])[:, 0]
    return _summarize(logs, float(_noise(processes, [50], seed)[0]))


def process_minima(processes: Sequence[Runs]) -> ProcessSummary:
    """Summarize the minima of positive values, one array [runs] per process.

    Other programs only add time, so the fastest run is the least disturbed one (Chen and
    Revels, "Robust benchmarking in noisy environments", arXiv:1608.04295, 2016).

    Raises:
        InputError: no process, or a process without runs.
    """
    _check(processes)
    return _summarize(_log_percentiles(processes, [0])[:, 0], noise=0.0)


def _summarize(values: Runs, noise: float) -> ProcessSummary:
    logs = np.sort(values)
    count, trim = len(logs), len(logs) // _TRIM_ONE_IN
    kept = logs[trim : count - trim]
    spread = None
    if count > 1:
        variance = np.clip(logs, kept[0], kept[-1]).var(ddof=1)  # of the winsorized values
        degrees = len(kept) - 1
        spread = math.sqrt(count * (count - 1) * variance / (len(kept) * degrees))
    return ProcessSummary(
        processes=count,
        mean=float(kept.mean()),
        spread=spread,
        degrees=len(kept) - 1,
        noise=noise,
    )


def _check(processes: Sequence[Runs]) -> None:
    if not processes or min(map(len, processes)) == 0:
        raise InputError("no run was timed: there is nothing to take a percentile of")


def _percentiles(
    processes: Sequence[Runs], percents: Sequence[float], seed: int
) -> tuple[Interval, ...]:
    """Compute percentiles with intervals: a bootstrap for one process, else Student's t."""
    _check(processes)
    if len(processes) == 1:
        values = _percentiles_of(processes[0], percents)
        draws = _bootstrap_percentiles(processes[0], percents, seed, _DRAWS)
        low, high = np.quantile(draws, [_TAIL, 1 - _TAIL], axis=1)
    else:
        logs = _log_percentiles(processes, percents)
        half = _half_width(logs, _noise(processes, percents, seed))
        values, low, high = (np.exp(logs.mean(axis=0) + side * half) for side in (0, -1, 1))
    ends = zip(values, np.minimum(low, values), np.maximum(high, values), strict=True)
    return tuple(Interval(*map(float, item)) for item in ends)


def _half_width(logs: Runs, noise: Runs) -> Runs:
    """Half the width of the interval of the mean of `logs` [processes, percentiles].

    Consecutive processes are alike where the machine's speed drifts: with eight or more, pairs
    of neighbours are averaged first. The noise within processes is a lower bound.
    """
    batches = logs
    if len(logs) >= _BATCHED:
        parts = np.array_split(logs, len(logs) // 2)
        batches = np.array([part.mean(axis=0) for part in parts])
    between = batches.std(axis=0, ddof=1) / math.sqrt(len(batches))
    within = noise / math.sqrt(len(logs))
    t = student_t_quantile(1 - _TAIL, len(batches) - 1)
    return np.asarray(np.maximum(t * between, _NORMAL * within))


def _log_percentiles(processes: Sequence[Runs], percents: Sequence[float]) -> Runs:
    """Logarithms of percentiles: [processes, percentiles]."""
    return np.log(np.maximum([_percentiles_of(runs, percents) for runs in processes], _SMALLEST))


def _noise(processes: Sequence[Runs], percents: Sequence[float], seed: int) -> Runs:
    """Standard deviation of one process's log percentiles due to its runs: [percentiles]."""
    variances = []
    for number, runs in enumerate(processes):
        draws = _bootstrap_percentiles(runs, percents, seed + number, _FEW_DRAWS)
        variances.append(np.log(np.maximum(draws, _SMALLEST)).var(axis=1))
    return np.asarray(np.sqrt(np.mean(variances, axis=0)))


def _percentiles_of(values: Runs, percents: Sequence[float]) -> Runs:
    """Percentiles over the last axis: [percentiles, ...], by method 8 of Hyndman and Fan (1996)."""
    return np.asarray(np.percentile(values, percents, axis=-1, method="median_unbiased"))


def _bootstrap_percentiles(values: Runs, percents: Sequence[float], seed: int, draws: int) -> Runs:
    """Percentiles of block bootstrap resamples of `values` [N]: [percentiles, draws]."""
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    generator = np.random.default_rng(seed)
    parts, chunk = [], max(1, _VALUES_AT_ONCE // count)
    for done in range(0, draws, chunk):
        size = min(chunk, draws - done)
        starts = generator.integers(count, size=(size, -(-count // block)))
        indices = (starts[:, :, None] + np.arange(block)) % count
        parts.append(_percentiles_of(values[indices.reshape(size, -1)[:, :count]], percents))
    return np.concatenate(parts, axis=1)
