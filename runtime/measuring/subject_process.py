"""The fresh process that measures: `python -m ...subject_process REQUEST.json ANSWER.json`.

It prints a line "step DONE OF" now and then, and in the end, should it fail, one line on stderr
that says why. How memory comes to lie in a process makes its runs faster or slower for as long as
it lives, so that times are worth most from several of them.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from edgeclip.profiles.errors import EdgeClipError
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.measuring.measurement import Yardstick
from edgeclip.runtime.measuring.open_any import open_subject
from edgeclip.runtime.measuring.open_subject import OpenSubject
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.measuring.subject_request import ERROR, STEP, Answer, Request, SubjectTurns
from edgeclip.runtime.sensing.memory import peak_memory_mb

_SECONDS_BETWEEN_STEPS = 0.5  # each wakes the process that reads them
_MEMORY_RUNS = 3  # the first plans memory, and later ones may still take some
_LEAST_WARM_UPS = 3


class _Steps:
    """Tells how far it is, rarely enough not to disturb what is measured."""

    def __init__(self, total: int) -> None:
        self._done, self._total, self._told = 0, total, -float("inf")

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_STEPS:
            self._told = now
            print(STEP, self._done, self._total, flush=True)


def answer_to(request: Request) -> Answer:
    """Do what is asked for.

    Raises:
        EngineError: a subject cannot be opened or run; the message names it.
        InputError: a request that does not hold what its errand needs.
    """
    if request.errand == "turns":
        return _turns(request)
    if len(request.subjects) != 1:
        raise InputError(f"{request.errand} is measured of one subject at a time")
    if request.errand == "memory":
        return _memory(request.subjects[0])
    return _sweep(request)


def _turns(request: Request) -> Answer:
    from edgeclip.runtime.measuring.interleave import run_turns
    from edgeclip.runtime.measuring.yardstick import NAME, yardstick_candidate

    workload, specs = request.workload, request.subjects
    if workload is None or not specs:
        raise InputError("turns need a workload and at least one subject")
    with ExitStack() as stack:
        bundles: dict[str, Bundle] = {}
        subjects = [stack.enter_context(_open(spec, bundles)) for spec in specs]
        yardstick = yardstick_candidate(specs[0].device.threads)
        candidates = [*(subject.candidate for subject in subjects), yardstick]
        steps = _Steps(len(candidates) + workload.repeats)
        *turns, measure = run_turns(candidates, workload, steps)
        found = tuple(
            SubjectTurns(
                samples_ms=each.times.wall_ms,
                warm_up=each.warm_up,
                cpu=each.cpu,
                input_shape=each.input_shape,
                identity=subject.identity,
                remarks=subject.remarks(),
            )
            for subject, each in zip(subjects, turns, strict=True)
        )
    return Answer(turns=found, yardstick=Yardstick(name=NAME, samples_ms=(measure.times.wall_ms,)))


def _memory(spec: SubjectSpec) -> Answer:
    with _open(spec, {}) as subject:
        batch = subject.candidate.make_batch(1)
        for _ in range(_MEMORY_RUNS):
            subject.candidate.run(batch)
        return Answer(peak_memory_mb=peak_memory_mb())


def _sweep(request: Request) -> Answer:
    from edgeclip.runtime.measuring.interleave import run_sweep, settle

    points, steps = [], _Steps(len(request.batch_sizes))
    with _open(request.subjects[0], {}) as subject:
        candidate = subject.candidate
        for size in request.batch_sizes:
            try:
                batch = candidate.make_batch(size)
            except InputError:  # a graph of somebody else that takes one batch only
                continue
            settle(candidate, batch, least=_LEAST_WARM_UPS, seconds=request.seconds)
            points += run_sweep([candidate], size, request.seconds)
            steps()
    return Answer(sweep=tuple(points))


def _open(spec: SubjectSpec, bundles: dict[str, Bundle]) -> OpenSubject:
    """Open a subject, and its bundle once for all subjects of it."""
    try:
        if spec.bundle is None:
            return open_subject(spec)
        if spec.bundle not in bundles:
            bundles[spec.bundle] = Bundle.open(spec.bundle)
        return open_subject(spec, bundle=bundles[spec.bundle])
    except EdgeClipError as error:
        raise EngineError(f"{spec.title}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Answer the request in one file with another."""
    parser = argparse.ArgumentParser(prog="python -m edgeclip.runtime.measuring.subject_process")
    parser.add_argument("request", type=Path, help="JSON file of a Request")
    parser.add_argument("answer", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    try:
        answer_to(Request.load(args.request)).save(args.answer)
    except EdgeClipError as error:
        print(ERROR + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
