"""Benchmark subjects interleaved in several fresh processes, and summarize each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import (
    SubjectRuns,
    WorkerRequest,
    WorkerResult,
    run_worker,
)
from edgeclip.profiles.record.conditions import CpuTime
from edgeclip.profiles.record.measurement import (
    Measurement,
    PairedRatio,
    SweepPoint,
    WarmUp,
    Yardstick,
)
from edgeclip.profiles.record.timing_statistics import latency_of, paired_ratio
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.console import Progress
from edgeclip.runtime.errors import EngineError, InputError

_DISTURBED_ABOVE = 0.05  # denied share of a process's CPU time
_MAX_PROCESSES = 2  # times the workload's number of processes
_NO_MEMORY = ("memory", "this system does not report the peak memory of a process")


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedResult:
    """Runs of some subjects in all processes.

    Attributes:
        specs: the subjects.
        runs: one tuple for each process, its subjects in the order of `specs`.
        yardstick: of the same rounds.
        peak_memory_mb: one for each subject, see `Measurement`; empty if not measured.
        left_out: number of disturbed processes that were replaced.
    """

    specs: tuple[SubjectSpec, ...]
    runs: tuple[tuple[SubjectRuns, ...], ...]
    yardstick: Yardstick
    peak_memory_mb: tuple[float | None, ...] = ()
    left_out: int = 0


def run_interleaved_benchmark(
    specs: Sequence[SubjectSpec],
    workload: Workload,
    progress: Progress | None = None,
    *,
    memory: bool = True,
) -> InterleavedResult:
    """Run all subjects, interleaved, in `workload.processes` fresh processes one after the other.

    Each process loads and warms up all subjects and the yardstick, then runs each of them once a
    round, in an order that changes from round to round. The order of loading changes from process
    to process, since a model that is loaded later may be faster for the life of the process.

    A process that was denied more than 5% of its CPU time is replaced by another one, whatever
    the subjects' times were. At most twice as many processes run; the least disturbed ones count.

    Args:
        specs: at least one; subjects of the same part need different names.
        workload: warm-up, repeats and processes.
        progress: called as the processes advance.
        memory: also measure the peak memory of each subject in a process of its own.

    Raises:
        InputError: no subject, or a repeated name.
        EngineError: a subject cannot be opened or run; the message names it.
    """
    if not specs:
        raise InputError("nothing to measure: give at least one subject")
    titles = [spec.title for spec in specs]
    if len(set(titles)) != len(titles):
        raise InputError(f"subjects of a part need different names, got {', '.join(titles)}")
    results = _run_until_undisturbed(specs, workload, progress)
    by_disturbance = sorted(range(len(results)), key=lambda at: (_denied_share(results[at]), at))
    kept = [results[at] for at in sorted(by_disturbance[: workload.processes])]
    peaks = [
        run_worker(WorkerRequest(task="memory", subjects=(spec,))).peak_memory_mb
        for spec in (specs if memory else ())
    ]
    yardsticks = [result.yardstick for result in kept if result.yardstick is not None]
    return InterleavedResult(
        specs=tuple(specs),
        runs=tuple(result.runs for result in kept),
        yardstick=Yardstick(
            name=yardsticks[0].name,
            samples_ms=tuple(samples for each in yardsticks for samples in each.samples_ms),
        ),
        peak_memory_mb=tuple(peaks),
        left_out=len(results) - len(kept),
    )


def _run_until_undisturbed(
    specs: Sequence[SubjectSpec], workload: Workload, progress: Progress | None
) -> list[WorkerResult]:
    """Run processes until enough were undisturbed, or twice as many as requested ran."""
    wanted, steps = workload.processes, len(specs) + 1 + workload.repeats
    results: list[WorkerResult] = []
    while len(results) < _MAX_PROCESSES * wanted:
        number = len(results)
        before, total = number * steps, max(wanted, number + 1) * steps

        def step(done: int, _of: int, before: int = before, total: int = total) -> None:
            if progress is not None:
                progress(before + done, total)

        order = round_order(len(specs), number)
        request = WorkerRequest(
            task="interleaved", subjects=tuple(specs[at] for at in order), workload=workload
        )
        result = run_worker(request, progress=step)
        step(steps, steps)
        by_spec = dict(zip(order, result.runs, strict=True))
        results.append(replace(result, runs=tuple(by_spec[at] for at in range(len(specs)))))
        if sum(_denied_share(each) <= _DISTURBED_ABOVE for each in results) == wanted:
            break
    return results


def _denied_share(result: WorkerResult) -> float:
    """Share of CPU time that the process was denied; 0 if unknown."""
    cpu = result.runs[0].cpu  # the shares are the same for all subjects of a process
    return (cpu.waiting_share or 0.0) + (cpu.steal_share or 0.0)


def to_measurements(
    result: InterleavedResult, reference: str | None = None
) -> tuple[Measurement, ...]:
    """Summarize the runs of each subject, in the order of `result.specs`.

    Args:
        result: of `run_interleaved_benchmark`.
        reference: name of the subject that others of the same part are divided by, round by
            round; a part without a subject of this name gets no ratios.

    Raises:
        EngineError: a bundle or file changed during the benchmark.
    """
    bases = {
        spec.part: _samples(result, number)
        for number, spec in enumerate(result.specs)
        if spec.name == reference
    }
    return tuple(
        _to_measurement(result, number, reference, bases.get(spec.part))
        for number, spec in enumerate(result.specs)
    )


def _samples(result: InterleavedResult, number: int) -> list[NDArray[np.float64]]:
    return [np.array(process[number].samples_ms) for process in result.runs]


def _to_measurement(
    result: InterleavedResult,
    number: int,
    reference: str | None,
    base: list[NDArray[np.float64]] | None,
) -> Measurement:
    spec, runs = result.specs[number], [process[number] for process in result.runs]
    first, samples = runs[0], _samples(result, number)
    if any(each.identity != first.identity for each in runs):
        raise EngineError(f"{spec.title} was altered while it was measured: measure again")
    ratio = None
    if base is not None and reference is not None and spec.name != reference:
        ratio = PairedRatio(reference=reference, ratio=paired_ratio(samples, base))
    memory = result.peak_memory_mb[number] if result.peak_memory_mb else None
    missing = [_NO_MEMORY] if result.peak_memory_mb and memory is None else []
    if result.left_out:
        count = len(result.runs) + result.left_out
        missing.append(
            ("processes", f"{result.left_out} of {count} processes were disturbed and left out")
        )
    cpu = _cpu_time([each.cpu for each in runs])
    return Measurement(
        name=spec.name,
        part=spec.part,
        input_shape=first.identity.input_shape,
        warm_up=WarmUp(
            runs=sum(each.warm_up.runs for each in runs),
            settled=all(each.warm_up.settled for each in runs),
        ),
        latency=latency_of(samples),
        ratio=ratio,
        sweep=(),
        cpu=cpu,
        contended=cpu.contended,
        samples_ms=tuple(each.samples_ms for each in runs),
        identity=first.identity,
        peak_memory_mb=memory,
        missing=(*missing, *_remarks(runs)),
    )


def _remarks(runs: Sequence[SubjectRuns]) -> tuple[tuple[str, str], ...]:
    """Collect the remarks of all processes, numbered if there are several processes."""
    count = len(runs)
    return tuple(
        (key, text if count == 1 else f"process {number} of {count}: {text}")
        for number, each in enumerate(runs, 1)
        for key, text in each.remarks
    )


def _cpu_time(several: Sequence[CpuTime]) -> CpuTime:
    """Add up the times of all processes; the shares are those of the most disturbed one."""
    waiting = [each.waiting_share for each in several if each.waiting_share is not None]
    steal = [each.steal_share for each in several if each.steal_share is not None]
    return CpuTime(
        wall_s=sum(each.wall_s for each in several),
        thread_s=sum(each.thread_s for each in several),
        process_s=sum(each.process_s for each in several),
        waiting_share=max(waiting, default=None),
        steal_share=max(steal, default=None),
    )


def sweep_subject(
    spec: SubjectSpec,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    progress: Progress | None = None,
) -> tuple[SweepPoint, ...]:
    """Measure a subject's throughput by batch size, in a fresh process for each thread count.

    Args:
        spec: the subject.
        batch_sizes: images or texts per batch; sizes that the graph does not take are skipped.
        threads: engine thread counts; if empty, that of the device.
        seconds: time for each point, and at most as much again to warm up.
        progress: called after each process.

    Raises:
        EngineError: the subject cannot be opened or run.
    """
    points: list[SweepPoint] = []
    counts = tuple(threads) or (spec.device.threads,)
    for done, count in enumerate(counts, 1):
        request = WorkerRequest(
            task="sweep",
            subjects=(replace(spec, device=replace(spec.device, threads=count)),),
            batch_sizes=tuple(batch_sizes),
            seconds=seconds,
        )
        points += run_worker(request).sweep
        if progress is not None:
            progress(done, len(counts))
    return tuple(points)
