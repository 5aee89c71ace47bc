"""Benchmark subjects interleaved in several fresh processes, and summarize each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from edgeclip.profiles.record.conditions import add_cpu_times
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

_DISTURBED_ABOVE = 0.05  # lost share of a process's CPU time
_MAX_PROCESSES_FACTOR = 2  # of the workload's number of processes
_NO_MEMORY = ("memory", "this system does not report the peak memory of a process")


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedResult:
    """Runs of each subject in the processes that count.

    Attributes:
        specs: the subjects.
        runs: one tuple for each process, with its subjects in the order of `specs`.
        yardstick: run times of a small fixed graph in the same rounds.
        peak_memory_mb: peak memory of each subject, as in `Measurement`; empty if not measured.
        left_out: number of processes that do not count, because they were disturbed most.
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

    If a process lost more than 5% of its CPU time to others, another one runs in its place; the
    subjects' times play no part in this. At most twice as many processes run; the least disturbed
    ones count.

    Args:
        specs: at least one subject; subjects of the same part need different names.
        workload: duration of the warm-up, number of rounds and of processes.
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
    least_disturbed_first = sorted(
        range(len(results)), key=lambda index: (_lost_cpu_share(results[index]), index)
    )
    kept = [results[index] for index in sorted(least_disturbed_first[: workload.processes])]
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
            samples_ms=tuple(samples for item in yardsticks for samples in item.samples_ms),
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
    while len(results) < _MAX_PROCESSES_FACTOR * wanted:
        number = len(results)
        before, total = number * steps, max(wanted, number + 1) * steps
        report = partial(_report_progress, progress, before, total)
        order = round_order(len(specs), number)
        request = WorkerRequest(
            task="interleaved", subjects=tuple(specs[index] for index in order), workload=workload
        )
        result = run_worker(request, progress=report)
        report(steps, steps)
        by_spec = dict(zip(order, result.runs, strict=True))
        results.append(replace(result, runs=tuple(by_spec[index] for index in range(len(specs)))))
        if sum(_lost_cpu_share(result) <= _DISTURBED_ABOVE for result in results) == wanted:
            break
    return results


def _report_progress(
    progress: Progress | None, before: int, total: int, done: int, _of: int
) -> None:
    """Report `done` steps of the present process, after `before` steps of earlier ones."""
    if progress is not None:
        progress(before + done, total)


def _lost_cpu_share(result: WorkerResult) -> float:
    """Share of CPU time lost to other processes (waiting) and to the hypervisor (steal).

    An unknown share counts as 0.
    """
    cpu = result.runs[0].cpu  # the shares are the same for all subjects of a process
    return (cpu.waiting_share or 0.0) + (cpu.steal_share or 0.0)


def to_measurements(
    result: InterleavedResult, reference: str | None = None
) -> tuple[Measurement, ...]:
    """Summarize the runs of each subject, in the order of `result.specs`.

    Args:
        result: the result of `run_interleaved_benchmark`.
        reference: name of the denominator subject: ratio = subject time / reference time, round
            by round, within the same part. A part without a subject of this name gets no ratios.

    Raises:
        EngineError: a bundle or file changed during the benchmark.
    """
    reference_samples = {
        spec.part: _samples(result, number)
        for number, spec in enumerate(result.specs)
        if spec.name == reference
    }
    return tuple(
        _to_measurement(result, number, reference, reference_samples.get(spec.part))
        for number, spec in enumerate(result.specs)
    )


def _samples(result: InterleavedResult, number: int) -> list[NDArray[np.float64]]:
    return [np.array(process[number].samples_ms) for process in result.runs]


def _to_measurement(
    result: InterleavedResult,
    number: int,
    reference: str | None,
    reference_samples: list[NDArray[np.float64]] | None,
) -> Measurement:
    spec, runs = result.specs[number], [process[number] for process in result.runs]
    first, samples = runs[0], _samples(result, number)
    if any(process.identity != first.identity for process in runs):
        raise EngineError(f"{spec.title} was altered while it was measured: measure again")
    ratio = None
    if reference_samples is not None and reference is not None and spec.name != reference:
        ratio = PairedRatio(reference=reference, ratio=paired_ratio(samples, reference_samples))
    memory = result.peak_memory_mb[number] if result.peak_memory_mb else None
    missing = [_NO_MEMORY] if result.peak_memory_mb and memory is None else []
    if result.left_out:
        count = len(result.runs) + result.left_out
        missing.append(
            ("processes", f"{result.left_out} of {count} processes were disturbed and left out")
        )
    cpu = add_cpu_times([process.cpu for process in runs])
    return Measurement(
        name=spec.name,
        part=spec.part,
        input_shape=first.identity.input_shape,
        warm_up=WarmUp(
            runs=sum(process.warm_up.runs for process in runs),
            settled=all(process.warm_up.settled for process in runs),
        ),
        latency=latency_of(samples),
        ratio=ratio,
        sweep=(),
        cpu=cpu,
        contended=cpu.contended,
        samples_ms=tuple(process.samples_ms for process in runs),
        identity=first.identity,
        peak_memory_mb=memory,
        missing=(*missing, *_remarks(runs)),
    )


def _remarks(runs: Sequence[SubjectRuns]) -> tuple[tuple[str, str], ...]:
    """Collect the remarks of all processes, numbered if there are several processes."""
    count = len(runs)
    return tuple(
        (key, text if count == 1 else f"process {number} of {count}: {text}")
        for number, process in enumerate(runs, 1)
        for key, text in process.remarks
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
        threads: numbers of engine threads; if empty, the number in the device's profile.
        seconds: seconds for each point; the warm-up takes at most as long again.
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
