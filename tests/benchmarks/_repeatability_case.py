"""Profiles for `repeatability.py`: the plain subject and the slowed one, and how they pair up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from _bars import EMOJI_BUNDLE
from _slowed_process import SLOWED

from edgeclip.profiles.compare.compare_runs import Comparison, compare_runs
from edgeclip.profiles.measure.interleaved_benchmark import (
    run_interleaved_benchmark,
    to_measurements,
)
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.record.measurement import (
    Measurement,
    MeasurementRun,
    Yardstick,
    measurement_run,
)
from edgeclip.profiles.record.timing_statistics import latency_of
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.spec import Precision

_NAME = "student"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One profile: with the subject as it is, and with the slowed one in its place."""

    plain: MeasurementRun
    slowed: MeasurementRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two profiles in succession: as a change that costs nothing, and as the planted one."""

    nothing: Comparison
    planted: Comparison

    @property
    def agrees(self) -> bool:
        """Whether the intervals that the two profiles report have a value in common."""
        now, baseline = self.nothing.now_ms, self.nothing.baseline_ms
        return now.low <= baseline.high and baseline.low <= now.high


def workload(processes: int, repeats: int, seconds: float) -> Workload:
    """Turns at batch 1, and nothing else."""
    return Workload(
        name="repeatability",
        description="turns at batch 1",
        batch_sizes=(1,),
        min_warmup_runs=10,
        max_warmup_seconds=2,
        repeats=repeats,
        turn_seconds=seconds,
        seconds_per_batch=1,
        cold_starts=0,
        processes=processes,
    )


def profile(precision: Precision, amount: Workload) -> Profile:
    """Measure the built-in bundle's image tower; `slow_down` must have been called."""
    device = load_device(THIS_MACHINE)
    specs = [
        SubjectSpec(
            name=name, part="image", device=device, bundle=str(EMOJI_BUNDLE), precision=precision
        )
        for name in (_NAME, SLOWED)
    ]
    result = run_interleaved_benchmark(specs, amount, memory=False)
    plain, slowed = to_measurements(result)
    return Profile(
        plain=_run(plain, result.yardstick, amount), slowed=_run(slowed, result.yardstick, amount)
    )


def joined(profiles: Sequence[Profile]) -> list[Profile]:
    """Every two profiles in succession as one of twice the processes."""
    return [
        Profile(plain=_join(a.plain, b.plain), slowed=_join(a.slowed, b.slowed))
        for a, b in zip(profiles[::2], profiles[1::2], strict=False)
    ]


def paired(profiles: Sequence[Profile]) -> list[Pair]:
    """Every two profiles in succession: the first is the baseline."""
    return [
        Pair(
            nothing=compare_runs(now.plain, baseline.plain)[0],
            planted=compare_runs(now.slowed, baseline.plain)[0],
        )
        for baseline, now in zip(profiles[::2], profiles[1::2], strict=False)
    ]


def _run(item: Measurement, yardstick: Yardstick, amount: Workload) -> MeasurementRun:
    run = measurement_run([replace(item, name=_NAME)], workload=amount, command="a benchmark")
    return replace(run, yardstick=yardstick)


def _join(first: MeasurementRun, second: MeasurementRun) -> MeasurementRun:
    assert first.yardstick is not None
    assert second.yardstick is not None
    samples = first.measurements[0].samples_ms + second.measurements[0].samples_ms
    item = replace(
        first.measurements[0],
        samples_ms=samples,
        latency=latency_of([np.array(runs) for runs in samples]),
    )
    both = first.yardstick.samples_ms + second.yardstick.samples_ms
    return replace(first, measurements=(item,), yardstick=replace(first.yardstick, samples_ms=both))
