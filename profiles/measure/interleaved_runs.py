"""Latency and throughput of several candidates, interleaved in one process."""

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

_WINDOW = 5  # runs whose median is compared with that of the 5 before
_STEADY = 0.05  # largest relative change of that median once warm
_FEWEST_SWEEP_RUNS = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something to measure: a tower in some precision on some engine.

    Attributes:
        name: unique among the candidates, such as "student int8".
        run: does the work on a batch and returns when the result is in memory.
        make_batch: inputs for a batch of n, first axis n; not timed.
        threads: of its engine, for the record.
    """

    name: str
    run: Callable[[NDArray[Any]], object]
    make_batch: Callable[[int], NDArray[Any]]
    threads: int | None = None


def repeat_rows(inputs: NDArray[Any]) -> Callable[[int], NDArray[Any]]:
    """A `make_batch` that takes the rows of `inputs` [N, ...] again and again."""
    return lambda size: np.take(inputs, np.arange(size) % len(inputs), axis=0)


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Seconds of each timed run of one candidate, in round order."""

    wall: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    @property
    def wall_ms(self) -> tuple[float, ...]:
        """Milliseconds to a tenth of a microsecond, finer than two runs are ever alike."""
        return tuple(round(1e3 * value, 4) for value in self.wall)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What one candidate did in one process, at batch 1.

    Attributes:
        input_shape: at batch 1.
        warm_up: before the timed runs.
        times: of the timed runs.
        cpu: see `CpuTime`.
    """

    input_shape: tuple[int, ...]
    warm_up: WarmUp
    times: RunTimes
    cpu: CpuTime


def measure_interleaved(
    candidates: Sequence[Candidate],
    workload: Workload,
    *,
    part: Part,
    reference: str | None = None,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """Measure all candidates for one tower, taking turns; results in their order.

    Latency is wall time at batch 1. From round to round the order is rotated and
    reversed, so that each candidate takes each place equally often. The garbage collector
    rests meanwhile.

    Args:
        candidates: at least one; names must differ.
        workload: batch sizes, warm-up and repeats; its `cold_starts` are not done here.
        part: which part of a bundle they all are.
        reference: the name of the candidate that the others' ratios divide by, if any.
        progress: called after each step.

    Raises:
        InputError: no candidate, a repeated name, an unknown reference, or a batch that
            does not have as many rows as it was asked for.
        Exception: whatever a candidate's `run` raises.
    """
    _check(candidates, reference)
    step = _stepper(progress, len(candidates) + workload.repeats + len(workload.batch_sizes) - 1)
    turns = run_turns(candidates, workload, step)
    sweeps = []
    for size in workload.batch_sizes[1:]:
        sweeps.append(run_sweep(candidates, size, workload.seconds_per_batch))
        step()
    bases = [each.times for c, each in zip(candidates, turns, strict=True) if c.name == reference]
    return tuple(
        Measurement(
            name=candidate.name,
            part=part,
            input_shape=each.input_shape,
            warm_up=each.warm_up,
            latency=latency_of([np.array(each.times.wall) * 1e3]),
            samples_ms=(each.times.wall_ms,),
            ratio=None if candidate.name == reference else _ratio(each.times, bases, reference),
            sweep=(_point(candidate, each.times, 1), *(sweep[number] for sweep in sweeps)),
            cpu=each.cpu,
            contended=each.cpu.contended,
        )
        for number, (candidate, each) in enumerate(zip(candidates, turns, strict=True))
    )


def run_turns(
    candidates: Sequence[Candidate],
    workload: Workload,
    step: Callable[[], None] = lambda: None,
) -> list[Turns]:
    """Warm up each candidate, then let them take turns at batch 1.

    There are `workload.repeats` rounds, and more until `workload.turn_seconds` are over. The
    garbage collector rests meanwhile. `step` is called after each warm-up and each of the rounds
    that there are in any case.

    Raises:
        InputError: a batch that does not have as many rows as it was asked for.
        Exception: whatever a candidate's `run` raises.
    """
    singles = [_batch(candidate, 1) for candidate in candidates]
    with no_garbage_collection():
        warm_ups = []
        for candidate, batch in zip(candidates, singles, strict=True):
            warm_ups.append(warm_up(candidate, batch, workload))
            step()
        before = CpuSnapshot.take()
        end = time.perf_counter() + workload.turn_seconds

        def go_on(done: int) -> bool:
            if 0 < done <= workload.repeats:
                step()
            return done < workload.repeats or time.perf_counter() < end

        times = _run_rounds(candidates, singles, go_on)
        denied = CpuSnapshot.take().denied_since(before)
    return [
        Turns(
            input_shape=single.shape,
            warm_up=warm,
            times=each,
            cpu=_cpu_time(each, denied),
        )
        for single, warm, each in zip(singles, warm_ups, times, strict=True)
    ]


def run_sweep(candidates: Sequence[Candidate], size: int, seconds: float) -> list[SweepPoint]:
    """Throughput of each candidate at one batch size, until each had its `seconds` on average.

    Raises:
        InputError, Exception: see `run_turns`.
    """
    batches = [_batch(candidate, size) for candidate in candidates]
    for candidate, batch in zip(candidates, batches, strict=True):
        candidate.run(batch)  # the first run of a shape plans memory
    with no_garbage_collection():
        end = time.perf_counter() + seconds * len(candidates)
        times = _run_rounds(
            candidates,
            batches,
            lambda done: done < _FEWEST_SWEEP_RUNS or time.perf_counter() < end,
        )
    return [_point(c, each, size) for c, each in zip(candidates, times, strict=True)]


def warm_up(candidate: Candidate, batch: NDArray[Any], workload: Workload) -> WarmUp:
    """Run until the median stops moving, or the workload's time for it is over."""
    return settle(
        candidate, batch, least=workload.min_warmup_runs, seconds=workload.max_warmup_seconds
    )


def settle(candidate: Candidate, batch: NDArray[Any], *, least: int, seconds: float) -> WarmUp:
    """Run at least `least` times, until the median stops moving or `seconds` are over."""
    recent: deque[float] = deque(maxlen=2 * _WINDOW)
    began = time.perf_counter()
    for runs in itertools.count(1):
        start = time.perf_counter()
        candidate.run(batch)
        end = time.perf_counter()
        recent.append(end - start)
        if runs >= least and _is_steady(recent):
            return WarmUp(runs=runs, settled=True)
        if end - began >= seconds and runs >= least:
            break
    return WarmUp(runs=runs, settled=False)


def round_order(count: int, number: int) -> list[int]:
    """The order in which round `number` runs `count` candidates."""
    shift = number // 2 % count
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if number % 2 else order


def _is_steady(recent: deque[float]) -> bool:
    if len(recent) < 2 * _WINDOW:
        return False
    values = list(recent)
    earlier, later = np.median(values[:_WINDOW]), np.median(values[_WINDOW:])
    return bool(abs(later - earlier) <= _STEADY * earlier)


def _run_rounds(
    candidates: Sequence[Candidate],
    batches: Sequence[NDArray[Any]],
    go_on: Callable[[int], bool],
) -> list[RunTimes]:
    """Rounds of one timed run each, while `go_on(rounds done)`."""
    times = [RunTimes() for _ in candidates]
    for number in itertools.count():
        if not go_on(number):
            break
        for at in round_order(len(candidates), number):
            _timed_run(candidates[at], batches[at], times[at])
    return times


def _timed_run(candidate: Candidate, batch: NDArray[Any], times: RunTimes) -> None:
    process, thread = time.process_time(), time.thread_time()
    start = time.perf_counter()
    candidate.run(batch)
    end = time.perf_counter()
    times.wall.append(end - start)
    times.thread.append(time.thread_time() - thread)
    times.process.append(time.process_time() - process)


def _point(candidate: Candidate, times: RunTimes, size: int) -> SweepPoint:
    seconds = np.array(times.wall)
    return SweepPoint(
        batch=size,
        threads=candidate.threads,
        items_per_s=rate_interval(seconds, size),
        p50_ms=percentile_interval(1e3 * seconds, 50),
    )


def _ratio(times: RunTimes, bases: Sequence[RunTimes], reference: str | None) -> PairedRatio | None:
    if not bases or reference is None:
        return None
    ratio = paired_ratio(np.array(times.wall), np.array(bases[0].wall))
    return PairedRatio(reference=reference, ratio=ratio)


def _cpu_time(times: RunTimes, denied: tuple[float | None, float | None]) -> CpuTime:
    return CpuTime(
        wall_s=sum(times.wall),
        thread_s=sum(times.thread),
        process_s=sum(times.process),
        waiting_share=denied[0],
        steal_share=denied[1],
    )


def _batch(candidate: Candidate, size: int) -> NDArray[Any]:
    batch = candidate.make_batch(size)
    if batch.shape[:1] != (size,):
        raise InputError(
            f"{candidate.name}: make_batch({size}) returned shape {batch.shape}: "
            f"its first axis must be {size}"
        )
    return batch


def _check(candidates: Sequence[Candidate], reference: str | None) -> None:
    names = [candidate.name for candidate in candidates]
    if not names:
        raise InputError("nothing to measure: give at least one candidate")
    if len(set(names)) != len(names):
        raise InputError(f"candidates need different names, got {', '.join(names)}")
    if reference is not None and reference not in names:
        raise InputError(f"reference {reference!r} is not a candidate: {', '.join(names)}")


def _stepper(progress: Progress | None, total: int) -> Callable[[], None]:
    done = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress(next(done), total)

    return step


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect once, then keep the collector from stopping a timed run."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
