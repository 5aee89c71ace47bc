"""Compare two profiles subject by subject: the ratio of their times with its interval.

"now" is the new profile, "baseline" the earlier one; a ratio above 1 is a slowdown.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from edgeclip.profiles.record.measurement import Measurement, MeasurementRun, Part
from edgeclip.profiles.record.timing_statistics import (
    ProcessSummary,
    Runs,
    process_medians,
    process_minima,
    round_ratios,
)
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import student_t_cdf, student_t_quantile

_TAIL = 0.025  # probability beyond each end of a 95% interval
_NORMAL = NormalDist()

Samples = tuple[tuple[float, ...], ...]  # milliseconds, one tuple for each process
Side = Literal["now", "baseline"]
SetupAspect = Literal[
    "machine", "input shape", "system", "packages", "workload", "engine", "threads", "bundle"
]
_Side = tuple[Measurement, MeasurementRun]
_Yardsticks = tuple[list[Runs], list[Runs]]  # now and baseline, one array for each process


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEstimate:
    """Ratio of the typical time now to that of the baseline, with its uncertainty.

    Its logarithm has Student's distribution with Welch's degrees of freedom, from the spread
    between the processes of either side (Welch, Biometrika 34, 1947). As in
    `timing_statistics`, the noise of the runs within the processes is a lower bound of the
    uncertainty.

    Attributes:
        value: the ratio; above 1 is slower.
        error: standard error of its logarithm from the spread between processes; None if a side
            has a single process.
        noise: standard error that the runs within the processes explain.
        degrees: degrees of freedom of `error`; None like `error`.
    """

    value: float
    error: float | None
    noise: float
    degrees: float | None

    @property
    def interval(self) -> Interval:
        """The ratio with its 95% interval, which is too narrow if `error` is None."""
        return Interval(self.value, self.lower_bound(1 - _TAIL), self.upper_bound(1 - _TAIL))

    def lower_bound(self, confidence: float) -> float:
        """One-sided lower confidence bound of the ratio; `confidence` is, say, 0.95."""
        return self.value * math.exp(-self._margin(confidence))

    def upper_bound(self, confidence: float) -> float:
        """One-sided upper confidence bound of the ratio."""
        return self.value * math.exp(self._margin(confidence))

    def p_value(self, bound: float) -> float:
        """Probability of a ratio at least as high as this if the true one is `bound` or less."""
        above = math.log(self.value / bound)
        within = 1 - _NORMAL.cdf(_in_errors(above, self.noise))
        if self.error is None or self.degrees is None:
            return within
        return max(within, 1 - student_t_cdf(_in_errors(above, self.error), self.degrees))

    def _margin(self, confidence: float) -> float:
        within = _NORMAL.inv_cdf(confidence) * self.noise
        if self.error is None or self.degrees is None:
            return within
        return max(within, student_t_quantile(confidence, self.degrees) * self.error)


def _in_errors(above: float, error: float) -> float:
    """Divide by the standard error, which may be 0."""
    if error == 0:
        return math.inf if above > 0 else -math.inf
    return above / error


def estimate_ratio(now: ProcessSummary, baseline: ProcessSummary) -> RatioEstimate:
    """Estimate the ratio of two runs from the summaries of their processes."""
    error = degrees = None
    if now.spread is not None and baseline.spread is not None:
        errors = [
            (side.spread / math.sqrt(side.processes), side.degrees)
            for side in (now, baseline)
            if side.spread is not None
        ]
        error = math.hypot(*(each for each, _ in errors))
        degrees = _welch(errors)
    return RatioEstimate(
        value=math.exp(now.mean - baseline.mean),
        error=error,
        noise=math.hypot(*(side.noise / math.sqrt(side.processes) for side in (now, baseline))),
        degrees=degrees,
    )


def _welch(errors: Sequence[tuple[float, int]]) -> float:
    """Welch-Satterthwaite degrees of freedom from (standard error, degrees) of each side."""
    below = sum(error**4 / degrees for error, degrees in errors)
    if below == 0:  # processes that agree to the last digit
        return float(sum(degrees for _, degrees in errors))
    return sum(error**2 for error, _ in errors) ** 2 / below


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupDifference:
    """One aspect in which the setups of two runs differ, described in words."""

    what: SetupAspect
    now: str
    baseline: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Comparison of one subject, now and in the baseline.

    Attributes:
        part, name: part and name of the subject, in both runs.
        now_ms, baseline_ms: the medians, with their intervals.
        processes: number of processes now and in the baseline.
        rounds: least number of rounds of a process now.
        times: ratio of the medians.
        to_yardstick: ratio of the medians of (time / yardstick's time in the same round), which
            is free of the machine's own speed; None without a common yardstick.
        fastest: ratio of the fastest runs of each process, divided by the yardstick's if there is
            one; least disturbed by other programs. None if a side has a single process.
        differences: differences of the two setups.
        disturbed: the runs that recorded disturbance by other programs.
    """

    part: Part
    name: str
    now_ms: Interval
    baseline_ms: Interval
    processes: tuple[int, int]
    rounds: int
    times: RatioEstimate
    to_yardstick: RatioEstimate | None
    fastest: RatioEstimate | None
    differences: tuple[SetupDifference, ...]
    disturbed: tuple[Side, ...]

    @property
    def title(self) -> str:
        """Part and name."""
        return f"{self.part} {self.name}"

    @property
    def ratio(self) -> RatioEstimate:
        """Ratio of typical times, relative to the yardstick if there is one."""
        return self.to_yardstick or self.times

    @property
    def evidence(self) -> tuple[RatioEstimate, ...]:
        """The ratios that can show a slowdown: of typical and, if known, of fastest runs."""
        return (self.ratio,) if self.fastest is None else (self.ratio, self.fastest)

    def difference(self, what: SetupAspect) -> SetupDifference | None:
        """Return the difference in one aspect, if there is any."""
        return next((item for item in self.differences if item.what == what), None)


def compare_runs(now: MeasurementRun, baseline: MeasurementRun) -> tuple[Comparison, ...]:
    """Compare the subjects that both runs measured, in the order of `now`.

    Raises:
        InputError: no common subject, or a measurement without the times of single runs.
    """
    earlier = {(item.part, item.name): item for item in baseline.measurements}
    pairs = [
        (item, earlier[item.part, item.name])
        for item in now.measurements
        if (item.part, item.name) in earlier
    ]
    if not pairs:
        raise InputError(
            f"the two runs measured nothing in common: now {_subjects(now)}; in the baseline "
            f"{_subjects(baseline)}"
        )
    return tuple(_compare(ours, theirs, now, baseline) for ours, theirs in pairs)


def subjects_only_in(run: MeasurementRun, other: MeasurementRun) -> tuple[str, ...]:
    """List the subjects, such as "image int8", that `run` measured and `other` did not."""
    known = {(item.part, item.name) for item in other.measurements}
    return tuple(
        f"{item.part} {item.name}"
        for item in run.measurements
        if (item.part, item.name) not in known
    )


def _subjects(run: MeasurementRun) -> str:
    return ", ".join(f"{item.part} {item.name}" for item in run.measurements) or "nothing"


def _compare(
    ours: Measurement, theirs: Measurement, now: MeasurementRun, baseline: MeasurementRun
) -> Comparison:
    samples, before = _milliseconds(ours), _milliseconds(theirs)
    sticks = _yardsticks(now, baseline)
    to_yardstick = None
    if sticks is not None:
        to_yardstick = estimate_ratio(
            process_medians(round_ratios(samples, sticks[0])),
            process_medians(round_ratios(before, sticks[1])),
        )
    sides: dict[Side, _Side] = {"now": (ours, now), "baseline": (theirs, baseline)}
    return Comparison(
        part=ours.part,
        name=ours.name,
        now_ms=ours.latency.p50_ms,
        baseline_ms=theirs.latency.p50_ms,
        processes=(len(samples), len(before)),
        rounds=min(map(len, samples)),
        times=estimate_ratio(process_medians(samples), process_medians(before)),
        to_yardstick=to_yardstick,
        fastest=_fastest_ratio(samples, before, sticks),
        differences=tuple(_differences(sides["now"], sides["baseline"])),
        disturbed=tuple(
            which
            for which, (item, run) in sides.items()
            if item.contended or (run.interference is not None and run.interference.disturbed)
        ),
    )


def _milliseconds(item: Measurement) -> list[Runs]:
    if not item.samples_ms or not all(item.samples_ms):
        raise InputError(
            f"the measurement of {item.part} {item.name} kept no single runs, without which its "
            "median cannot be compared: measure again with `edgeclip profile`"
        )
    return _arrays(item.samples_ms)


def _arrays(samples: Samples) -> list[Runs]:
    return [np.array(runs, dtype=np.float64) for runs in samples]


def _yardsticks(now: MeasurementRun, baseline: MeasurementRun) -> _Yardsticks | None:
    """Return the yardstick's runs of either side; None unless both ran the same yardstick."""
    ours, theirs = now.yardstick, baseline.yardstick
    if ours is None or theirs is None or ours.name != theirs.name:
        return None
    return _arrays(ours.samples_ms), _arrays(theirs.samples_ms)


def _fastest_ratio(
    ours: Sequence[Runs], theirs: Sequence[Runs], sticks: _Yardsticks | None
) -> RatioEstimate | None:
    if min(len(ours), len(theirs)) == 1:
        return None
    if sticks is not None:
        ours, theirs = (
            [runs / stick.min() for runs, stick in zip(side, beside, strict=True)]
            for side, beside in zip((ours, theirs), sticks, strict=True)
        )
    return estimate_ratio(process_minima(ours), process_minima(theirs))


def _differences(*sides: _Side) -> Iterator[SetupDifference]:
    for what, describe in _DESCRIPTIONS.items():
        now, baseline = (describe(item, run) for item, run in sides)
        if now != baseline:
            yield SetupDifference(what=what, now=now, baseline=baseline)
    ours, theirs = (dict(run.machine.packages) for _, run in sides)
    changed = [
        name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)
    ]
    if changed:
        now, baseline = (
            ", ".join(f"{name} {packages.get(name, 'absent')}" for name in changed)
            for packages in (ours, theirs)
        )
        yield SetupDifference(what="packages", now=now, baseline=baseline)


def describe_hardware(machine: Machine) -> str:
    """Describe the hardware in one line; two machines are the same if their lines are equal."""
    flags = " ".join(machine.flags) or "no known instruction sets"
    return f"{machine.cpu}, {machine.cores} cores, {flags}"


def _workload(run: MeasurementRun) -> str:
    amount = run.workload
    return f"{amount.name}: {amount.timed_runs}, and at least {amount.min_warmup_runs} to warm up"


def _engine(item: Measurement) -> str:
    of = item.identity
    return "unknown" if of is None else f"{of.engine} ({of.provider}), {of.precision or 'as it is'}"


_DESCRIPTIONS: dict[SetupAspect, Callable[[Measurement, MeasurementRun], str]] = {
    "machine": lambda _, run: describe_hardware(run.machine),
    "input shape": lambda item, _: " x ".join(map(str, item.input_shape)),
    "system": lambda _, run: f"{run.machine.os}, {run.machine.python}",
    "workload": lambda _, run: _workload(run),
    "engine": lambda item, _: _engine(item),
    "threads": lambda item, _: str(item.identity.threads) if item.identity else "unknown",
    "bundle": lambda item, _: (
        f"{item.identity.bundle} ({item.identity.sha256[:12]})" if item.identity else "unknown"
    ),
}
