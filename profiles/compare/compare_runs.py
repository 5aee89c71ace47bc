"""Compare two profiles subject by subject: the ratio of their times with its interval."""

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
    student_t_cdf,
    student_t_quantile,
)
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval

_TAIL = 0.025  # beyond each end of a 95% interval
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioOfRuns:
    """The ratio of two typical medians, that of now to that of the baseline.

    Its logarithm has Student's distribution with Welch's degrees of freedom, for the spread
    between the processes of either side (Welch, Biometrika 34, 1947). As in
    `timing_statistics`, the runs within the processes set a floor to what is claimed.

    Attributes:
        value: the ratio; above 1 is slower.
        error: standard error of its logarithm by the spread between processes; None where a
            side has one process only.
        noise: the standard error that the runs within the processes explain.
        degrees: of freedom of `error`; None likewise.
    """

    value: float
    error: float | None
    noise: float
    degrees: float | None

    @property
    def interval(self) -> Interval:
        """The ratio with its 95% interval; one that is too narrow where `error` is None."""
        return Interval(self.value, self.at_least(1 - _TAIL), self.at_most(1 - _TAIL))

    def at_least(self, sureness: float) -> float:
        """The ratio that the true one exceeds, as sure as that, such as 0.95."""
        return self.value * math.exp(-self._margin(sureness))

    def at_most(self, sureness: float) -> float:
        """The ratio that the true one stays below, as sure as that."""
        return self.value * math.exp(self._margin(sureness))

    def chance(self, bound: float) -> float:
        """The chance of a ratio as high as this where the true one is `bound`, or less."""
        above = math.log(self.value / bound)
        within = 1 - _NORMAL.cdf(_over(above, self.noise))
        if self.error is None or self.degrees is None:
            return within
        return max(within, 1 - student_t_cdf(_over(above, self.error), self.degrees))

    def _margin(self, sureness: float) -> float:
        within = _NORMAL.inv_cdf(sureness) * self.noise
        if self.error is None or self.degrees is None:
            return within
        return max(within, student_t_quantile(sureness, self.degrees) * self.error)


def ratio_of_runs(now: ProcessSummary, baseline: ProcessSummary) -> RatioOfRuns:
    """Compare two runs, each with the spread of its own processes."""
    error = degrees = None
    if now.spread is not None and baseline.spread is not None:
        error = math.hypot(*(_error(side.spread, side) for side in (now, baseline)))
        degrees = _welch(now, baseline)
    return RatioOfRuns(
        value=math.exp(now.mean - baseline.mean),
        error=error,
        noise=math.hypot(*(_error(side.noise, side) for side in (now, baseline))),
        degrees=degrees,
    )


def _error(spread: float | None, side: ProcessSummary) -> float:
    """Standard error of the mean of a side's processes that differ so much."""
    return (spread or 0.0) / math.sqrt(side.processes)


def _welch(now: ProcessSummary, baseline: ProcessSummary) -> float:
    """Degrees of freedom by the equation of Welch and Satterthwaite."""
    parts = [(_error(side.spread, side) ** 2, side.degrees) for side in (now, baseline)]
    below = sum(part**2 / degrees for part, degrees in parts)
    if below == 0:  # processes that agree to the last digit
        return float(sum(degrees for _, degrees in parts))
    return sum(part for part, _ in parts) ** 2 / below


def _over(above: float, error: float) -> float:
    """In standard errors."""
    if error == 0:
        return math.inf if above > 0 else -math.inf
    return above / error


Samples = tuple[tuple[float, ...], ...]  # milliseconds: one tuple a process
Side = Literal["now", "baseline"]
_Side = tuple[Measurement, MeasurementRun]
_Sticks = tuple[list[Runs], list[Runs]]  # of now and of the baseline, one array a process
What = Literal[
    "machine", "input shape", "system", "packages", "workload", "engine", "threads", "bundle"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupDifference:
    """Something besides time in which two runs differ, in words for a person."""

    what: What
    now: str
    baseline: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One subject, now and in the baseline.

    Attributes:
        part, name: of the subject, in both runs.
        now_ms, baseline_ms: the medians, with their intervals.
        processes: of now and of the baseline.
        rounds: of each process of now, at least.
        times: the ratio of the medians.
        to_yardstick: the ratio of the medians of (time / yardstick's time in the same round),
            which leaves out what the machine itself was worth; None without a common yardstick.
        fastest: the ratio of the fastest runs of each process, divided by the yardstick's where
            there is one: what other programs disturb least. None where a side has one process.
        differences: in which the runs differ.
        disturbed: the runs that say of themselves that other programs disturbed them.
    """

    part: Part
    name: str
    now_ms: Interval
    baseline_ms: Interval
    processes: tuple[int, int]
    rounds: int
    times: RatioOfRuns
    to_yardstick: RatioOfRuns | None
    fastest: RatioOfRuns | None
    differences: tuple[SetupDifference, ...]
    disturbed: tuple[Side, ...]

    @property
    def ratio(self) -> RatioOfRuns:
        """The ratio of what is typical: to the yardstick where there is one."""
        return self.to_yardstick or self.times

    @property
    def evidence(self) -> tuple[RatioOfRuns, ...]:
        """All that tells of a slowdown: what is typical, and the fastest where they are known."""
        return (self.ratio,) if self.fastest is None else (self.ratio, self.fastest)

    def difference(self, what: What) -> SetupDifference | None:
        """In what way the runs differ there, if they do."""
        return next((item for item in self.differences if item.what == what), None)


def compare_runs(now: MeasurementRun, baseline: MeasurementRun) -> tuple[Comparison, ...]:
    """Compare the subjects that both runs measured, in the order of `now`.

    Raises:
        InputError: they have none in common, or one that kept no single runs.
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
    """The subjects, such as "image int8", that `run` measured and `other` did not."""
    known = {(item.part, item.name) for item in other.measurements}
    return tuple(
        f"{item.part} {item.name}"
        for item in run.measurements
        if (item.part, item.name) not in known
    )


def _compare(
    ours: Measurement, theirs: Measurement, now: MeasurementRun, baseline: MeasurementRun
) -> Comparison:
    samples, before = _milliseconds(ours), _milliseconds(theirs)
    sticks = _yardsticks(now, baseline)
    sides: dict[Side, _Side] = {"now": (ours, now), "baseline": (theirs, baseline)}
    return Comparison(
        part=ours.part,
        name=ours.name,
        now_ms=ours.latency.p50_ms,
        baseline_ms=theirs.latency.p50_ms,
        processes=(len(samples), len(before)),
        rounds=min(map(len, samples)),
        times=ratio_of_runs(process_medians(samples), process_medians(before)),
        to_yardstick=_to_yardstick(samples, before, sticks),
        fastest=_fastest(samples, before, sticks),
        differences=tuple(_differences(sides["now"], sides["baseline"])),
        disturbed=tuple(
            which
            for which, (item, run) in sides.items()
            if item.contended or (run.interference is not None and run.interference.disturbed)
        ),
    )


def _yardsticks(now: MeasurementRun, baseline: MeasurementRun) -> _Sticks | None:
    """The yardstick's runs on either side; None without a common one."""
    ours, theirs = now.yardstick, baseline.yardstick
    if ours is None or theirs is None or ours.name != theirs.name:
        return None
    return _arrays(ours.samples_ms), _arrays(theirs.samples_ms)


def _to_yardstick(
    ours: Sequence[Runs], theirs: Sequence[Runs], sticks: _Sticks | None
) -> RatioOfRuns | None:
    if sticks is None:
        return None
    return ratio_of_runs(
        process_medians(round_ratios(ours, sticks[0])),
        process_medians(round_ratios(theirs, sticks[1])),
    )


def _fastest(
    ours: Sequence[Runs], theirs: Sequence[Runs], sticks: _Sticks | None
) -> RatioOfRuns | None:
    if min(len(ours), len(theirs)) == 1:
        return None
    if sticks is not None:
        ours, theirs = (
            [runs / stick.min() for runs, stick in zip(side, beside, strict=True)]
            for side, beside in zip((ours, theirs), sticks, strict=True)
        )
    return ratio_of_runs(process_minima(ours), process_minima(theirs))


def _milliseconds(item: Measurement) -> list[Runs]:
    if not item.samples_ms or not all(item.samples_ms):
        raise InputError(
            f"the measurement of {item.part} {item.name} kept no single runs, without which its "
            "median cannot be compared: measure again with `edgeclip profile`"
        )
    return _arrays(item.samples_ms)


def _arrays(samples: Samples) -> list[Runs]:
    return [np.array(runs, dtype=np.float64) for runs in samples]


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


def hardware(machine: Machine) -> str:
    """What makes two machines different ones, in a line."""
    flags = " ".join(machine.flags) or "no known instruction sets"
    return f"{machine.cpu}, {machine.cores} cores, {flags}"


def _workload(run: MeasurementRun) -> str:
    amount = run.workload
    return f"{amount.name}: {amount.timed_runs}, and at least {amount.min_warmup_runs} to warm up"


def _engine(item: Measurement) -> str:
    of = item.identity
    return "unknown" if of is None else f"{of.engine} ({of.provider}), {of.precision or 'as it is'}"


_DESCRIPTIONS: dict[What, Callable[[Measurement, MeasurementRun], str]] = {
    "machine": lambda _, run: hardware(run.machine),
    "input shape": lambda item, _: " x ".join(map(str, item.input_shape)),
    "system": lambda _, run: f"{run.machine.os}, {run.machine.python}",
    "workload": lambda _, run: _workload(run),
    "engine": lambda item, _: _engine(item),
    "threads": lambda item, _: str(item.identity.threads) if item.identity else "unknown",
    "bundle": lambda item, _: (
        f"{item.identity.bundle} ({item.identity.sha256[:12]})" if item.identity else "unknown"
    ),
}


def _subjects(run: MeasurementRun) -> str:
    return ", ".join(f"{item.part} {item.name}" for item in run.measurements) or "nothing"
