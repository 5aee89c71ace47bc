"""Time engines interleaved over several loads: which of them is surely faster.

One load of an engine decides for all its runs, by where its memory lies: the same graph, loaded
twice, differs by some percent for as long as both live. So engines are loaded anew several times,
and a load is to a ratio what a process is to a profile.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    TargetRuns,
    round_order,
    run_interleaved,
)
from edgeclip.profiles.record.conditions import add_cpu_times
from edgeclip.profiles.record.measurement import Measurement, PairedRatio, Part, WarmUp
from edgeclip.profiles.record.timing_statistics import (
    RatioEstimate,
    Runs,
    estimate_paired_ratio,
    latency_of,
    paired_ratio,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.errors import InputError

# Where loads differ by 2% and runs by 5%, six loads of 15 runs find one of three engines that is 5%
# faster in 83% of cases, and three loads of 30 in 29% (tests/benchmarks/regression_power.py).
LOADS = 6
_FEWEST = 5  # rounds of a load, however slow an engine is


Loader = Callable[[], Callable[[NDArray[Any]], object]]


@dataclass(frozen=True, slots=True)
class LoadableTarget:
    """An engine to load and run.

    Attributes:
        name: unique among the targets.
        load: loads the engine anew and returns what runs a batch.
        make_batch: returns inputs of batch size n, first axis n; not timed.
    """

    name: str
    load: Loader
    make_batch: Callable[[int], NDArray[Any]]


def measure_loads(
    targets: Sequence[LoadableTarget],
    workload: Workload,
    *,
    part: Part,
    reference: str,
    loads: int = LOADS,
    seconds: float | None = None,
) -> tuple[Measurement, ...]:
    """Load all targets `loads` times, in changing order, and time them at batch 1 interleaved.

    Args:
        targets: at least one target; their names differ.
        workload: warm-up and repeats of each load.
        part: the part of a bundle that all targets implement.
        reference: name of the target that the ratios divide by.
        loads: how often each is loaded.
        seconds: for the runs of the reference and one equally slow target over all loads; there
            are fewer repeats than the workload's where they would take longer.

    Returns:
        One measurement for each target, in the order of `targets`; a load takes the place of a
        process in it.

    Raises:
        InputError: no target, a repeated name, an unknown reference, or fewer than one load.
        Exception: whatever a target's `load` or `run` raises.
    """
    names = [target.name for target in targets]
    if not names or len(set(names)) != len(names) or reference not in names or loads < 1:
        raise InputError(
            f"give targets with different names, the reference among them, and 1 load or more: "
            f"got {', '.join(names) or 'no target'}, reference {reference!r}, {loads} loads"
        )
    found: list[list[TargetRuns]] = []
    for number in range(loads):
        order = round_order(len(targets), number)
        opened = {at: targets[at].load() for at in order}
        ready = [
            BenchmarkTarget(target.name, opened[at], target.make_batch)
            for at, target in enumerate(targets)
        ]
        if number == 0 and seconds is not None:
            fitting = _repeats(ready[names.index(reference)], workload.repeats, seconds / loads)
            workload = replace(workload, repeats=fitting)
        found.append(run_interleaved(ready, workload))
        del opened, ready  # so that the next load does not find the memory of two
    by_target = [[load[at] for load in found] for at in range(len(targets))]
    base = _wall_s(by_target[names.index(reference)])
    return tuple(
        _measurement(name, part, runs, None if name == reference else (reference, base))
        for name, runs in zip(names, by_target, strict=True)
    )


def load_ratio(item: Measurement, base: Measurement) -> RatioEstimate:
    """Estimate the ratio of times of two measurements of `measure_loads` over their loads."""
    ours, theirs = ([np.array(runs) for runs in each.samples_ms] for each in (item, base))
    return estimate_paired_ratio(ours, theirs)


def _repeats(target: BenchmarkTarget, most: int, seconds: float) -> int:
    """Return how many rounds of two such targets fit into the time."""
    batch = target.make_batch(1)
    target.run(batch)
    began = time.perf_counter()
    target.run(batch)
    each = max(time.perf_counter() - began, 1e-9)
    return max(min(most, _FEWEST), min(most, int(seconds / (2 * each))))


def _wall_s(loads: Sequence[TargetRuns]) -> list[Runs]:
    return [np.array(load.times.wall) for load in loads]


def _measurement(
    name: str, part: Part, loads: Sequence[TargetRuns], base: tuple[str, list[Runs]] | None
) -> Measurement:
    seconds, ratio = _wall_s(loads), None
    if base is not None:
        ratio = PairedRatio(reference=base[0], ratio=paired_ratio(seconds, base[1]))
    cpu = add_cpu_times([load.cpu for load in loads])
    return Measurement(
        name=name,
        part=part,
        input_shape=loads[0].input_shape,
        warm_up=WarmUp(
            runs=sum(load.warm_up.runs for load in loads),
            settled=all(load.warm_up.settled for load in loads),
        ),
        latency=latency_of([1e3 * runs for runs in seconds]),
        ratio=ratio,
        sweep=(),
        cpu=cpu,
        contended=cpu.contended,
        samples_ms=tuple(load.times.wall_ms for load in loads),
    )
