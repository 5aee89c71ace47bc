"""Percentiles, throughput and ratios of run times, with 95% confidence intervals.

Runs of one process are alike: their percentiles are bounded by order statistics, at the number of
independent runs that tell as much. Two processes differ more than two runs of one, so over several
an interval is Student's t interval of the logarithms of the processes' own percentiles.

Processes that run back to back share the state of the machine, which moves all their times. From
eight processes on, intervals of times allow for neighbours that correlate by 0.5 (simulated with
10 and 27 processes of AR(1): 95% where it is 0.5, 97 to 98% without correlation, 88 to 92% at 0.7).
Fewer processes cannot tell such a state, and their intervals hold while it lasts: 95% of
independent processes, but only 79% of five that correlate by 0.5. Compare ratios to a yardstick of
the same rounds, of which the machine's state is no part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.measurement import Latency
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Estimate, Interval
from edgeclip.runtime.stats.percentiles import estimate_percentile, least_count
from edgeclip.runtime.stats.student_t import estimate_mean, student_t_quantile
from edgeclip.runtime.stats.three_outcomes import BoundTest, judge

Runs = NDArray[np.float64]  # run times of one process, in order: [runs]

_EACH_END = 0.975  # confidence of each end of a 95% interval
_TRIM_ONE_IN = 5  # one fifth of the processes is trimmed at either end
_BATCHES = 5  # of neighbouring processes; more of them are more alike, fewer tell less
_BATCHED = 8  # from so many processes on
_CORRELATION = 0.5  # of neighbouring processes, which the batches allow for
_SMALLEST = 1e-9  # replaces 0 before taking the logarithm; below the resolution of any clock


def latency_of(processes: Sequence[Runs]) -> Latency:
    """Compute latency percentiles with 95% intervals from milliseconds, one array per process.

    A value is the geometric mean of the processes' own percentiles; see the module for what the
    interval covers. The interval of a single process is of this process alone. A percentile above
    the median is None where its interval cannot be known: in a single process with fewer
    independent runs than an upper bound needs (36 for the 90th percentile, 368 for the 99th), in
    several where one has so few runs that none is expected beyond it (10, 100).

    Raises:
        InputError: no process, or a process without runs.
    """
    _check(processes)
    fewest = min(map(len, processes))
    alone = independent_runs(processes[0]) if len(processes) == 1 else None

    def high(percent: float) -> Interval | None:
        needed = least_count(percent, _EACH_END)
        beyond = fewest * (100 - percent) / 100  # runs that are expected beyond it
        enough = beyond > 1 - 1e-9 if alone is None else alone >= needed
        return _percentile(processes, percent) if enough else None

    return Latency(
        runs=sum(map(len, processes)),
        p50_ms=_percentile(processes, 50),
        p90_ms=high(90),
        p95_ms=high(95),
        p99_ms=high(99),
        p99_9_ms=high(99.9),
    )


def percentile_interval(values: Runs, percent: float, *, least: float = 0.0) -> Interval:
    """Compute a percentile of the runs of one process [N] with its 95% interval, in their unit.

    The ends are order statistics at the number of `independent_runs`. Where that is too small, as
    it is below 6 for the median, they are `least` and infinity.

    Args:
        values: times, or what was computed of them.
        percent: which percentile, 0 < percent < 100.
        least: what no value can be below; minus infinity for differences of times.

    Raises:
        InputError: no runs.
    """
    _check([values])
    independent = independent_runs(values)
    return estimate_percentile(values, percent, least=least, independent=independent).interval


def independent_runs(values: Runs) -> int:
    """Return how many independent runs tell as much of the median as these [N] do.

    That is N divided by the integrated autocorrelation time of whether a run is slower than the
    median. Correlations are summed in pairs while a pair is above 0 and no larger than the one
    before (the initial monotone sequence of Geyer, "Practical Markov chain Monte Carlo",
    Statistical Science 7, 1992).
    """
    count = len(values)
    slower = np.where(values > np.median(values), 1.0, 0.0)
    slower -= slower.mean()
    spectrum = np.fft.rfft(slower, 2 * count)
    covariances = np.fft.irfft(spectrum * spectrum.conj())[:count]
    if covariances[0] <= _SMALLEST:  # runs that agree to the last digit
        return count
    pairs = (covariances[: count // 2 * 2] / covariances[0]).reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    kept = np.minimum.accumulate(pairs[: ends[0] if len(ends) else len(pairs)])
    return max(1, math.floor(count / max(1.0, 2 * float(kept.sum()) - 1)))


def rate_interval(seconds: Runs, items: int) -> Interval:
    """Compute items per second from the median of run times [N] of `items` each."""
    median = percentile_interval(seconds, 50)
    highest = items / median.low if median.low > 0 else math.inf
    return Interval(items / median.value, items / median.high, highest)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEstimate(Estimate):
    """A ratio of times, whose logarithm has Student's distribution around the true one's.

    Attributes:
        value: the ratio.
        error: standard error of its logarithm, from the spread between processes; infinite where
            a side has a single process, which tells nothing of others.
        degrees: degrees of freedom of `error`; 0 where it is infinite.
    """

    value: float
    error: float
    degrees: float

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; 0 where `error` is infinite."""
        return self.value * math.exp(-self._margin(confidence))

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; infinite where `error` is."""
        margin = self._margin(confidence)
        return self.value * math.exp(margin) if margin < math.log(1e300) else math.inf

    def _margin(self, confidence: float) -> float:
        if not math.isfinite(self.error):
            return math.inf
        return student_t_quantile(confidence, self.degrees) * self.error


def paired_ratio(values: Sequence[Runs], reference: Sequence[Runs]) -> Interval:
    """Compute the median ratio of runs of the same rounds, with its 95% interval.

    The interval of a single process is of this process alone: another one may be faster or slower
    for all its life, so that it proves nothing.

    Args:
        values, reference: one array [rounds] per process; entry i of both is from round i.

    Raises:
        InputError: the two differ in number of processes or rounds, or have no runs.
    """
    ratios = round_ratios(values, reference)
    if len(ratios) == 1:
        return percentile_interval(ratios[0], 50)
    return estimate_paired_ratio(values, reference).interval


def estimate_paired_ratio(values: Sequence[Runs], reference: Sequence[Runs]) -> RatioEstimate:
    """Estimate the ratio of times of the same rounds over processes, or loads of an engine.

    Each has one value, the median of its rounds' ratios; the logarithms are taken as independent,
    because what slows a minute slows both. Arguments and errors as in `paired_ratio`.
    """
    ratios = round_ratios(values, reference)
    _check(ratios)
    return estimate_mean_log(np.exp(_log_percentiles(ratios, 50)))


def estimate_mean_log(ratios: Runs) -> RatioEstimate:
    """Estimate the geometric mean of independent positive ratios [N]; of one no bound is known.

    Raises:
        InputError: no ratio, or one that is not a number.
    """
    mean = estimate_mean(np.log(ratios))
    return RatioEstimate(value=math.exp(mean.value), error=mean.error, degrees=mean.degrees)


def surely_below(ratios: Sequence[RatioEstimate], bound: float = 1.0) -> tuple[bool, ...]:
    """Return which ratios are surely below a bound: at 97.5% for all of them together (Holm)."""
    tests = [BoundTest((ratio,), ">=", bound) for ratio in ratios]
    return tuple(outcome == "failed" for outcome in judge(tests, _EACH_END))


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
            trimming it is the standard deviation. Infinite for a single process.
        degrees: degrees of freedom of `spread`; 0 for a single process.
    """

    processes: int
    mean: float
    spread: float
    degrees: int


def process_medians(processes: Sequence[Runs]) -> ProcessSummary:
    """Summarize the medians of positive values, one array [runs] per process.

    Raises:
        InputError: no process, or a process without runs.
    """
    _check(processes)
    return _summarize(_log_percentiles(processes, 50))


def process_minima(processes: Sequence[Runs]) -> ProcessSummary:
    """Summarize the minima of positive values, one array [runs] per process.

    Other programs only add time, so the fastest run is the least disturbed one (Chen and
    Revels, "Robust benchmarking in noisy environments", arXiv:1608.04295, 2016). The fastest of
    more runs is faster: compare only minima of the same number of runs.

    Raises:
        InputError: no process, or a process without runs.
    """
    _check(processes)
    return _summarize(_log_percentiles(processes, 0))


def _summarize(values: Runs) -> ProcessSummary:
    logs = np.sort(values)
    count, trim = len(logs), len(logs) // _TRIM_ONE_IN
    kept = logs[trim : count - trim]
    spread, degrees = math.inf, len(kept) - 1
    if count > 1:
        variance = np.clip(logs, kept[0], kept[-1]).var(ddof=1)  # of the winsorized values
        spread = math.sqrt(count * (count - 1) * variance / (len(kept) * degrees))
    return ProcessSummary(processes=count, mean=float(kept.mean()), spread=spread, degrees=degrees)


def _check(processes: Sequence[Runs]) -> None:
    if not processes or min(map(len, processes)) == 0:
        raise InputError("no run was timed: there is nothing to take a percentile of")


def _percentile(processes: Sequence[Runs], percent: float) -> Interval:
    if len(processes) == 1:
        return percentile_interval(processes[0], percent)
    logs = _log_percentiles(processes, percent)
    mean, half = float(logs.mean()), _half_width(logs)
    return Interval(*(math.exp(mean + side * half) for side in (0, -1, 1)))


def _half_width(logs: Runs) -> float:
    """Half the width of the 95% interval of the mean of `logs` [processes], two at least."""
    batches = min(len(logs), _BATCHES) if len(logs) >= _BATCHED else len(logs)
    means = np.array([part.mean() for part in np.array_split(logs, batches)])
    error = float(means.std(ddof=1)) / math.sqrt(batches)
    wider = _correlated_neighbours(len(logs), batches) if batches < len(logs) else 1.0
    return student_t_quantile(_EACH_END, batches - 1) * error * wider


@lru_cache(maxsize=256)
def _correlated_neighbours(count: int, batches: int) -> float:
    """How much larger the error of a mean is than the spread of its batches tells.

    For `count` values of an AR(1) process with `_CORRELATION` in consecutive batches: the ratio of
    the mean's variance to the expected sample variance of the batches' means over their number.
    """
    places = np.arange(count)
    correlations = _CORRELATION ** np.abs(np.subtract.outer(places, places))
    weights = np.zeros((batches, count))
    for row, part in zip(weights, np.array_split(places, batches), strict=True):
        row[part] = 1 / len(part)
    between = weights @ correlations @ weights.T
    expected = (np.trace(between) - between.sum() / batches) / (batches - 1)
    return math.sqrt(float(correlations.mean()) / (float(expected) / batches))


def _log_percentiles(processes: Sequence[Runs], percent: float) -> Runs:
    """Logarithms of a percentile of each: [processes], by method 8 of Hyndman and Fan (1996)."""
    found = [np.percentile(runs, percent, method="median_unbiased") for runs in processes]
    return np.log(np.maximum(found, _SMALLEST))
