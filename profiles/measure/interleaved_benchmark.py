"""Benchmark subjects in turns over several fresh processes, and summarise each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import Answer, Request, SubjectTurns, ask_process
from edgeclip.profiles.record.conditions import CpuTime
from edgeclip.profiles.record.measurement import (
    Measurement,
    PairedRatio,
    SweepPoint,
    WarmUp,
    Yardstick,
)
from edgeclip.profiles.record.timing_statistics import latency_of, paired_ratio_of
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.console import Progress
from edgeclip.runtime.errors import EngineError, InputError

_DISTURBED = 0.05  # of a process's CPU time
_MOST = 2  # times the processes that are wanted
_NO_MEMORY = ("memory", "this system does not report the peak memory of a process")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnsResult:
    """What some subjects did.

    Attributes:
        specs: of the subjects.
        turns: one tuple a process, in which the subjects are in the order of `specs`.
        yardstick: what took turns with them.
        peak_memory_mb: one a subject, see `Measurement`; empty where it was not measured.
        left_out: processes that were disturbed, and replaced.
    """

    specs: tuple[SubjectSpec, ...]
    turns: tuple[tuple[SubjectTurns, ...], ...]
    yardstick: Yardstick
    peak_memory_mb: tuple[float | None, ...] = ()
    left_out: int = 0


def take_turns(
    specs: Sequence[SubjectSpec],
    workload: Workload,
    progress: Progress | None = None,
    *,
    memory: bool = True,
) -> TurnsResult:
    """Let subjects take turns in `workload.processes` fresh processes, one after the other.

    A process that was denied more than a twentieth of its CPU time is replaced by another one:
    what decides is the time that other programs took, never how fast the subjects were. Twice as
    many processes are run at most, and the least disturbed ones count.

    In each process all subjects and the yardstick are opened and warmed up, and then run once a
    round, in an order that changes from round to round. The order of opening changes from
    process to process: what is opened later may run faster for as long as the process lives.

    Args:
        specs: at least one; those of one part must have different names.
        workload: how much to measure.
        progress: called as the processes get on.
        memory: also start a process for each subject alone, for its peak memory.

    Raises:
        InputError: no subject, or a name twice.
        EngineError: a subject cannot be opened or run; the message says which and why.
    """
    _check(specs)
    answers = _undisturbed(specs, workload, progress)
    kept = _least_disturbed(answers, workload.processes)
    found = []
    for spec in specs if memory else ():
        request = Request(errand="memory", subjects=(spec,))
        found.append(ask_process(request).peak_memory_mb)
    return TurnsResult(
        specs=tuple(specs),
        turns=tuple(answer.turns for answer in kept),
        yardstick=_joined(kept),
        peak_memory_mb=tuple(found),
        left_out=len(answers) - len(kept),
    )


def _undisturbed(
    specs: Sequence[SubjectSpec], workload: Workload, progress: Progress | None
) -> list[Answer]:
    """Run processes until as many as are wanted were not disturbed, or twice as many ran."""
    each, wanted = len(specs) + 1 + workload.repeats, workload.processes
    answers: list[Answer] = []
    while len(answers) < _MOST * wanted:
        number = len(answers)
        order = round_order(len(specs), number)
        request = Request(
            errand="turns", subjects=tuple(specs[at] for at in order), workload=workload
        )
        total = max(wanted, number + 1) * each
        answer = ask_process(request, progress=_part(progress, number * each, total))
        _part(progress, (number + 1) * each, total)(0, 0)
        turns = dict(zip(order, answer.turns, strict=True))
        answers.append(replace(answer, turns=tuple(turns[at] for at in range(len(specs)))))
        if sum(_denied(answer) <= _DISTURBED for answer in answers) == wanted:
            break
    return answers


def _least_disturbed(answers: Sequence[Answer], count: int) -> list[Answer]:
    """As many answers, in the order in which they came."""
    ranked = sorted(range(len(answers)), key=lambda number: (_denied(answers[number]), number))
    return [answers[number] for number in sorted(ranked[:count])]


def _denied(answer: Answer) -> float:
    """The share of CPU time that the process was denied; 0 where it cannot be told."""
    cpu = answer.turns[0].cpu  # the shares are those of all its subjects together
    return (cpu.waiting_share or 0.0) + (cpu.steal_share or 0.0)


def measurements_of(result: TurnsResult, reference: str | None = None) -> tuple[Measurement, ...]:
    """What turns say of each subject, in their order; without sweep, scenarios and the like.

    Args:
        result: of `take_turns`.
        reference: the name of the subject that others of the same part are divided by, round by
            round; a part that has none of this name has no ratios.

    Raises:
        EngineError: a bundle or file was altered while it was measured.
    """
    bases = {
        spec.part: _samples(result, number)
        for number, spec in enumerate(result.specs)
        if spec.name == reference
    }
    return tuple(
        _measurement(result, number, reference, bases.get(spec.part))
        for number, spec in enumerate(result.specs)
    )


def sweep_subject(
    spec: SubjectSpec,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    progress: Progress | None = None,
) -> tuple[SweepPoint, ...]:
    """Throughput of a subject in batches, in a fresh process for each number of threads.

    Args:
        spec: which subject.
        batch_sizes: how many images or texts at a time; sizes that the graph does not take are
            left out.
        threads: of the engine; none for those of the device alone.
        seconds: for each point, and as much again at most to warm up.
        progress: called after each process.

    Raises:
        EngineError: see `take_turns`.
    """
    points: list[SweepPoint] = []
    numbers = tuple(threads) or (spec.device.threads,)
    for done, number in enumerate(numbers):
        request = Request(
            errand="sweep",
            subjects=(replace(spec, device=replace(spec.device, threads=number)),),
            batch_sizes=tuple(batch_sizes),
            seconds=seconds,
        )
        points += ask_process(request).sweep
        if progress is not None:
            progress(done + 1, len(numbers))
    return tuple(points)


def _check(specs: Sequence[SubjectSpec]) -> None:
    if not specs:
        raise InputError("nothing to measure: give at least one subject")
    titles = [spec.title for spec in specs]
    if len(set(titles)) != len(titles):
        raise InputError(f"subjects of a part need different names, got {', '.join(titles)}")


def _part(progress: Progress | None, before: int, total: int) -> Progress:
    """What shows the steps of one process as some of all steps."""

    def step(done: int, _of: int) -> None:
        if progress is not None:
            progress(before + done, total)

    return step


def _joined(answers: Sequence[Answer]) -> Yardstick:
    several = [answer.yardstick for answer in answers if answer.yardstick is not None]
    samples = tuple(sample for each in several for sample in each.samples_ms)
    return Yardstick(name=several[0].name, samples_ms=samples)


def _samples(result: TurnsResult, number: int) -> list[NDArray[np.float64]]:
    return [np.array(process[number].samples_ms) for process in result.turns]


def _measurement(
    result: TurnsResult,
    number: int,
    reference: str | None,
    base: list[NDArray[np.float64]] | None,
) -> Measurement:
    spec, several = result.specs[number], [process[number] for process in result.turns]
    first, samples = several[0], _samples(result, number)
    if any(each.identity != first.identity for each in several):
        raise EngineError(f"{spec.title} was altered while it was measured: measure again")
    ratio = None
    if base is not None and reference is not None and spec.name != reference:
        ratio = PairedRatio(reference=reference, ratio=paired_ratio_of(samples, base))
    memory = result.peak_memory_mb[number] if result.peak_memory_mb else None
    missing = [_NO_MEMORY] if result.peak_memory_mb and memory is None else []
    cpu = _cpu_time([each.cpu for each in several])
    return Measurement(
        name=spec.name,
        part=spec.part,
        input_shape=first.identity.input_shape,
        warm_up=WarmUp(
            runs=sum(each.warm_up.runs for each in several),
            settled=all(each.warm_up.settled for each in several),
        ),
        latency=latency_of(samples),
        ratio=ratio,
        sweep=(),
        cpu=cpu,
        contended=cpu.contended,
        samples_ms=tuple(each.samples_ms for each in several),
        identity=first.identity,
        peak_memory_mb=memory,
        missing=(*missing, *_replaced(result), *_remarks(several)),
    )


def _replaced(result: TurnsResult) -> list[tuple[str, str]]:
    if not result.left_out:
        return []
    count = len(result.turns) + result.left_out
    return [("turns", f"{result.left_out} of {count} processes were disturbed and left out")]


def _remarks(several: Sequence[SubjectTurns]) -> tuple[tuple[str, str], ...]:
    """What the processes said, with their number where there are several."""
    count = len(several)
    return tuple(
        (key, text if count == 1 else f"process {number} of {count}: {text}")
        for number, each in enumerate(several, 1)
        for key, text in each.remarks
    )


def _cpu_time(several: Sequence[CpuTime]) -> CpuTime:
    """Of all processes together; the shares are those of the most disturbed one."""
    waiting = [each.waiting_share for each in several if each.waiting_share is not None]
    steal = [each.steal_share for each in several if each.steal_share is not None]
    return CpuTime(
        wall_s=sum(each.wall_s for each in several),
        thread_s=sum(each.thread_s for each in several),
        process_s=sum(each.process_s for each in several),
        waiting_share=max(waiting, default=None),
        steal_share=max(steal, default=None),
    )
