"""The benchmark worker: a fresh process that runs subjects in turns and returns their times."""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import Candidate
from edgeclip.profiles.measure.open_subject import OpenSubject, open_subject
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import ERROR, STEP, Answer, Request, SubjectTurns
from edgeclip.profiles.record.measurement import Yardstick
from edgeclip.profiles.sensors.clocks import peak_memory_mb
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.providers import CPU
from edgeclip.runtime.errors import EdgeClipError, EngineError, InputError

NAME = "transformer-layer-1"  # another graph has another name: their times do not compare
TOKENS, WIDTH = 64, 256
YARDSTICK = Path(__file__).with_name("graphs") / "yardstick.onnx"


def yardstick_candidate(threads: int) -> Candidate:
    """The yardstick as something to measure, on so many threads.

    Raises:
        EngineError: onnxruntime cannot load the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    engine = OrtEngine(YARDSTICK, providers=(CPU,), threads=threads)

    def run(values: NDArray[Any]) -> object:
        return engine.run({"values": values})["result"]

    return Candidate(NAME, run, _values, threads)


def _values(size: int) -> NDArray[np.float32]:
    """float32 [size, TOKENS, WIDTH] between -1 and 1, always the same."""
    count = size * TOKENS * WIDTH
    return np.sin(np.arange(count)).astype(np.float32).reshape(size, TOKENS, WIDTH)


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
    from edgeclip.profiles.measure.interleaved_runs import run_turns

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
    from edgeclip.profiles.measure.interleaved_runs import run_sweep, settle

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
    parser = argparse.ArgumentParser(prog="python -m edgeclip.profiles.measure.benchmark_worker")
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
