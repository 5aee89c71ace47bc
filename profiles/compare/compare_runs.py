"""Compare two profiles subject by subject: the ratio of their times with its interval.

"now" is the new profile, "baseline" the earlier one; a ratio above 1 is a slowdown.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeclip.profiles.record.measurement import Measurement, MeasurementRun, Part
from edgeclip.profiles.record.timing_statistics import (
    ProcessSummary,
    RatioEstimate,
    Runs,
    process_medians,
    process_minima,
    round_ratios,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval

Samples = tuple[tuple[float, ...], ...]  # milliseconds, one tuple for each process
Side = Literal["now", "baseline"]
SetupAspect = Literal[
    "machine", "input shape", "system", "packages", "workload", "engine", "threads", "bundle"
]
_Side = tuple[Measurement, MeasurementRun]
_Yardsticks = tuple[list[Runs], list[Runs]]  # now and baseline, one array for each process


def estimate_ratio(now: ProcessSummary, baseline: ProcessSummary) -> RatioEstimate:
    """Estimate the ratio of two runs from the summaries of their processes; above 1 is slower.

    Its logarithm has Student's distribution with Welch's degrees of freedom, from the spread
    between the processes of either side (Welch, Biometrika 34, 1947).
    """
    errors = [(side.spread / math.sqrt(side.processes), side.degrees) for side in (now, baseline)]
    known = all(degrees > 0 for _, degrees in errors)
    return RatioEstimate(
        value=math.exp(now.mean - baseline.mean),
        error=math.hypot(*(error for error, _ in errors)),  # variances of independent runs add up
        degrees=_welch(errors) if known else 0,
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
            one; least disturbed by other programs. Over the same number of rounds on both sides,
            because the fastest of more runs is faster. None if a side has a single process.
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
        InputError: no common subject, workloads with other amounts (see `check_same_amounts`), or
            a measurement without the times of single runs.
    """
    check_same_amounts(now.workload, baseline.workload)
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


def check_same_amounts(now: Workload, baseline: Workload) -> None:
    """Check that processes of two runs lasted as long and warmed up as long.

    The number of processes may differ: each has one value, and more of them tell more.

    Raises:
        InputError: names what differs; a longer process has a faster fastest run, and a warmer
            machine.
    """
    amounts = {
        "runs of a process": (now.repeats, baseline.repeats),
        "seconds of a process": (now.turn_seconds, baseline.turn_seconds),
        "warm-up runs": (now.min_warmup_runs, baseline.min_warmup_runs),
        "seconds of warm-up at most": (now.max_warmup_seconds, baseline.max_warmup_seconds),
    }
    different = [
        f"{what} {ours:g} now and {theirs:g} in the baseline"
        for what, (ours, theirs) in amounts.items()
        if ours != theirs
    ]
    if different:
        raise InputError(
            f"the two runs measured different amounts ({', '.join(different)}), and longer "
            "processes look faster: measure both with the same --workload"
        )


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
    rounds = min(map(len, (*ours, *theirs)))
    sides = [[runs[:rounds] for runs in side] for side in (ours, theirs)]
    if sticks is not None:
        sides = [
            [runs / stick[:rounds].min() for runs, stick in zip(side, beside, strict=True)]
            for side, beside in zip(sides, sticks, strict=True)
        ]
    return estimate_ratio(*map(process_minima, sides))


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
