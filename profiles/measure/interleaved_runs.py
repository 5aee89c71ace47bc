"""Time several targets in one process, interleaved run by run: latency, ratios, throughput.

In each round every target runs once. The order is rotated and reversed from round to round, so
that each target takes each place equally often; a change of the machine's speed affects all
targets alike, and ratios of runs of the same round are free of it.
"""

import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.conditions import CpuSnapshot, CpuTime
from edgeclip.profiles.record.measurement import (
    Measurement,
    PairedRatio,
    Part,
    SweepPoint,
    WarmUp,
)
from edgeclip.profiles.record.timing_statistics import (
    latency_of,
    paired_ratio,
    percentile_interval,
    rate_interval,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.console import Progress
from edgeclip.runtime.errors import InputError

_WINDOW = 5  # runs whose median is compared with that of the 5 runs before
_STEADY = 0.05  # largest relative change of that median after warm-up
_MIN_SWEEP_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class BenchmarkTarget:
    """A callable to benchmark, such as a tower in one precision on one engine.

    Attributes:
        name: unique among the targets, such as "student int8".
        run: processes a batch and returns when the result is in host memory.
        make_batch: returns inputs of batch size n, first axis n; not timed.
        threads: number of engine threads, for the record.
    """

    name: str
    run: Callable[[NDArray[Any]], object]
    make_batch: Callable[[int], NDArray[Any]]
    threads: int | None = None


def repeat_rows(inputs: NDArray[Any]) -> Callable[[int], NDArray[Any]]:
    """Return a `make_batch` that cycles through the rows of `inputs` [N, ...]."""
    return lambda size: np.take(inputs, np.arange(size) % len(inputs), axis=0)


def run_first(run: Callable[[NDArray[Any]], object], batches: NDArray[Any]) -> object:
    """Run the one batch in `batches` [1, N, ...], so that a whole batch counts as one item."""
    return run(batches[0])


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Seconds of each timed run of one target, in round order.

    Attributes:
        wall: wall time.
        thread: CPU time of the calling thread.
        process: CPU time of all threads.
    """

    wall: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    @property
    def wall_ms(self) -> tuple[float, ...]:
        """Wall times in milliseconds, rounded to 0.1 microseconds."""
        return tuple(round(1e3 * value, 4) for value in self.wall)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRuns:
    """Runs of one target at batch 1 in one process.

    Attributes:
        input_shape: shape of the input at batch 1.
        warm_up: the runs before the timed ones.
        times: times of the timed runs.
        cpu: CPU time used, and lost to other processes and the hypervisor.
    """

    input_shape: tuple[int, ...]
    warm_up: WarmUp
    times: RunTimes
    cpu: CpuTime


def measure_interleaved(
    targets: Sequence[BenchmarkTarget],
    workload: Workload,
    *,
    part: Part,
    reference: str | None = None,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """Benchmark targets in this process: latency at batch 1, then throughput in larger batches.

    The garbage collector is off during timed runs.

    Args:
        targets: at least one target; their names differ.
        workload: batch sizes, warm-up and repeats; its `cold_starts` are ignored here.
        part: the part of a bundle that all targets implement.
        reference: name of the target that the ratios divide by, if any.
        progress: called after each step.

    Returns:
        One measurement for each target, in the order of `targets`.

    Raises:
        InputError: no target, a repeated name, an unknown reference, or a batch that does not
            have as many rows as requested.
        Exception: whatever a target's `run` raises.
    """
    names = [target.name for target in targets]
    if not names:
        raise InputError("nothing to measure: give at least one target")
    if len(set(names)) != len(names):
        raise InputError(f"targets need different names, got {', '.join(names)}")
    if reference is not None and reference not in names:
        raise InputError(f"reference {reference!r} is not a target: {', '.join(names)}")
    done = itertools.count(1)
    total = len(targets) + workload.repeats + len(workload.batch_sizes) - 1

    def step() -> None:
        if progress is not None:
            progress(next(done), total)

    runs = run_interleaved(targets, workload, step)
    sweeps = [[_sweep_point(t, each.times, 1)] for t, each in zip(targets, runs, strict=True)]
    for size in workload.batch_sizes[1:]:
        points = run_sweep(targets, size, workload.seconds_per_batch)
        for sweep, point in zip(sweeps, points, strict=True):
            sweep.append(point)
        step()
    base = None if reference is None else np.array(runs[names.index(reference)].times.wall)
    measurements = []
    for target, target_runs, sweep in zip(targets, runs, sweeps, strict=True):
        seconds, ratio = np.array(target_runs.times.wall), None
        if base is not None and reference is not None and target.name != reference:
            ratio = PairedRatio(reference=reference, ratio=paired_ratio([seconds], [base]))
        measurements.append(
            Measurement(
                name=target.name,
                part=part,
                input_shape=target_runs.input_shape,
                warm_up=target_runs.warm_up,
                latency=latency_of([seconds * 1e3]),
                samples_ms=(target_runs.times.wall_ms,),
                ratio=ratio,
                sweep=tuple(sweep),
                cpu=target_runs.cpu,
                contended=target_runs.cpu.contended,
            )
        )
    return tuple(measurements)


def run_interleaved(
    targets: Sequence[BenchmarkTarget],
    workload: Workload,
    step: Callable[[], None] = lambda: None,
) -> list[TargetRuns]:
    """Warm up each target, then run rounds at batch 1 in which each target runs once.

    There are `workload.repeats` rounds, and more until `workload.turn_seconds` have passed. The
    garbage collector is off meanwhile. `step` is called after each warm-up and after each of the
    first `workload.repeats` rounds.

    Raises:
        InputError: a batch that does not have as many rows as requested.
        Exception: whatever a target's `run` raises.
    """
    batches = [_make_batch(target, 1) for target in targets]
    with no_garbage_collection():
        warm_ups = []
        for target, batch in zip(targets, batches, strict=True):
            warm_ups.append(
                warm_up(
                    target,
                    batch,
                    min_runs=workload.min_warmup_runs,
                    max_seconds=workload.max_warmup_seconds,
                )
            )
            step()
        before = CpuSnapshot.take()
        end = time.perf_counter() + workload.turn_seconds

        def go_on(done: int) -> bool:
            if 0 < done <= workload.repeats:
                step()
            return done < workload.repeats or time.perf_counter() < end

        times = _run_rounds(targets, batches, go_on)
        waiting_share, steal_share = CpuSnapshot.take().denied_since(before)
    return [
        TargetRuns(
            input_shape=batch.shape,
            warm_up=warm,
            times=each,
            cpu=CpuTime(
                wall_s=sum(each.wall),
                thread_s=sum(each.thread),
                process_s=sum(each.process),
                waiting_share=waiting_share,
                steal_share=steal_share,
            ),
        )
        for batch, warm, each in zip(batches, warm_ups, times, strict=True)
    ]


def run_sweep(targets: Sequence[BenchmarkTarget], size: int, seconds: float) -> list[SweepPoint]:
    """Measure throughput at one batch size, in rounds, for `seconds` per target on average.

    Raises:
        InputError: a batch that does not have as many rows as requested.
        Exception: whatever a target's `run` raises.
    """
    batches = [_make_batch(target, size) for target in targets]
    for target, batch in zip(targets, batches, strict=True):
        target.run(batch)  # the first run of a shape allocates memory
    with no_garbage_collection():
        end = time.perf_counter() + seconds * len(targets)
        times = _run_rounds(
            targets,
            batches,
            lambda done: done < _MIN_SWEEP_ROUNDS or time.perf_counter() < end,
        )
    return [_sweep_point(t, each, size) for t, each in zip(targets, times, strict=True)]


def warm_up(
    target: BenchmarkTarget, batch: NDArray[Any], *, min_runs: int, max_seconds: float
) -> WarmUp:
    """Run at least `min_runs` times, until the median is steady or `max_seconds` have passed."""
    recent: deque[float] = deque(maxlen=2 * _WINDOW)
    began = time.perf_counter()
    for runs in itertools.count(1):
        start = time.perf_counter()
        target.run(batch)
        end = time.perf_counter()
        recent.append(end - start)
        if runs >= min_runs and _is_steady(recent):
            return WarmUp(runs=runs, settled=True)
        if end - began >= max_seconds and runs >= min_runs:
            break
    return WarmUp(runs=runs, settled=False)


def _is_steady(recent: deque[float]) -> bool:
    """Return whether the median of the last 5 runs is within 5% of that of the 5 runs before."""
    if len(recent) < 2 * _WINDOW:
        return False
    values = list(recent)
    earlier, later = np.median(values[:_WINDOW]), np.median(values[_WINDOW:])
    return bool(abs(later - earlier) <= _STEADY * earlier)


def round_order(count: int, number: int) -> list[int]:
    """Return the order of `count` targets in round `number`: rotated, and reversed if odd."""
    shift = number // 2 % count
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if number % 2 else order


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect recent garbage once, then keep the collector off inside the block.

    Not what has been alive for long: beside torch that takes a quarter of a second each time.
    """
    was_on = gc.isenabled()
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _run_rounds(
    targets: Sequence[BenchmarkTarget],
    batches: Sequence[NDArray[Any]],
    go_on: Callable[[int], bool],
) -> list[RunTimes]:
    """Run rounds of one timed run per target while `go_on(number of rounds done)` is true."""
    times = [RunTimes() for _ in targets]
    for number in itertools.count():
        if not go_on(number):
            break
        for index in round_order(len(targets), number):
            process, thread = time.process_time(), time.thread_time()
            start = time.perf_counter()
            targets[index].run(batches[index])
            end = time.perf_counter()
            times[index].wall.append(end - start)
            times[index].thread.append(time.thread_time() - thread)
            times[index].process.append(time.process_time() - process)
    return times


def _sweep_point(target: BenchmarkTarget, times: RunTimes, size: int) -> SweepPoint:
    seconds = np.array(times.wall)
    return SweepPoint(
        batch=size,
        threads=target.threads,
        items_per_s=rate_interval(seconds, size),
        p50_ms=percentile_interval(1e3 * seconds, 50),
    )


def _make_batch(target: BenchmarkTarget, size: int) -> NDArray[Any]:
    batch = target.make_batch(size)
    if batch.shape[:1] != (size,):
        raise InputError(
            f"{target.name}: make_batch({size}) returned shape {batch.shape}: "
            f"its first axis must be {size}"
        )
    return batch
