"""The benchmark worker: a fresh process that runs one job and writes its result to a file.

`python -m edgeclip.profiles.measure.benchmark_worker REQUEST.json RESULT.json`; `worker_client`
starts it.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    run_interleaved,
    run_sweep,
    warm_up,
)
from edgeclip.profiles.measure.open_subject import OpenSubject, open_subject
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import (
    ERROR,
    STEP,
    SubjectRuns,
    WorkerRequest,
    WorkerResult,
)
from edgeclip.profiles.record.measurement import Yardstick
from edgeclip.profiles.sensors.machine_state import peak_memory_mb
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.providers import CPU
from edgeclip.runtime.errors import EdgeClipError, EngineError, InputError
from edgeclip.runtime.logs import log_to_stderr

YARDSTICK_NAME = "transformer-layer-1"  # rename it with the graph: other graphs do not compare
YARDSTICK_GRAPH = Path(__file__).with_name("graphs") / "yardstick.onnx"
TOKENS, WIDTH = 64, 256  # of the yardstick's input

_SECONDS_BETWEEN_STEPS = 0.5  # each step wakes the process that reads it
_MEMORY_RUNS = 3  # the first allocates memory, and later ones may need some more
_MIN_SWEEP_WARM_UPS = 3


def main(arguments: list[str] | None = None) -> int:
    """Read the request file, run the job, write the result file."""
    parser = argparse.ArgumentParser(prog="python -m edgeclip.profiles.measure.benchmark_worker")
    parser.add_argument("request", type=Path, help="JSON file of a WorkerRequest")
    parser.add_argument("result", type=Path, help="JSON file to write, a WorkerResult")
    args = parser.parse_args(arguments)
    with log_to_stderr(verbose=True, as_json=True):  # for the process that started this one
        try:
            run_request(WorkerRequest.load(args.request)).save(args.result)
        except EdgeClipError as error:
            print(ERROR + " ".join(str(error).split()), file=sys.stderr)
            return 2
    return 0


def run_request(request: WorkerRequest) -> WorkerResult:
    """Run one job in this process.

    Raises:
        EngineError: a subject cannot be opened or run; the message names it.
        InputError: the request lacks something that its task needs.
    """
    if request.task == "interleaved":
        return _run_interleaved(request)
    if len(request.subjects) != 1:
        raise InputError(f"{request.task} is measured of one subject at a time")
    if request.task == "memory":
        return _measure_memory(request.subjects[0])
    return _run_sweep(request)


def _run_interleaved(request: WorkerRequest) -> WorkerResult:
    workload, specs = request.workload, request.subjects
    if workload is None or not specs:
        raise InputError("interleaved runs need a workload and at least one subject")
    with ExitStack() as stack:
        bundles: dict[str, Bundle] = {}
        subjects = [stack.enter_context(_open(spec, bundles)) for spec in specs]
        targets = [subject.target for subject in subjects]
        targets.append(yardstick_target(specs[0].device.threads))
        steps = _StepPrinter(len(targets) + workload.repeats)
        *runs, yardstick = run_interleaved(targets, workload, steps)
        found = tuple(
            SubjectRuns(
                samples_ms=each.times.wall_ms,
                warm_up=each.warm_up,
                cpu=each.cpu,
                input_shape=each.input_shape,
                identity=subject.identity,
                remarks=subject.remarks(),
            )
            for subject, each in zip(subjects, runs, strict=True)
        )
    samples = (yardstick.times.wall_ms,)
    return WorkerResult(runs=found, yardstick=Yardstick(name=YARDSTICK_NAME, samples_ms=samples))


def _measure_memory(spec: SubjectSpec) -> WorkerResult:
    with _open(spec, {}) as subject:
        batch = subject.target.make_batch(1)
        for _ in range(_MEMORY_RUNS):
            subject.target.run(batch)
        return WorkerResult(peak_memory_mb=peak_memory_mb())


def _run_sweep(request: WorkerRequest) -> WorkerResult:
    points, steps = [], _StepPrinter(len(request.batch_sizes))
    with _open(request.subjects[0], {}) as subject:
        target = subject.target
        for size in request.batch_sizes:
            try:
                batch = target.make_batch(size)
            except InputError:  # a peer's graph that takes one batch size only
                continue
            warm_up(target, batch, min_runs=_MIN_SWEEP_WARM_UPS, max_seconds=request.seconds)
            points += run_sweep([target], size, request.seconds)
            steps()
    return WorkerResult(sweep=tuple(points))


def _open(spec: SubjectSpec, bundles: dict[str, Bundle]) -> OpenSubject:
    """Open a subject; `bundles` holds those that are open already, by their directory."""
    try:
        if spec.bundle is None:
            return open_subject(spec)
        if spec.bundle not in bundles:
            bundles[spec.bundle] = Bundle.open(spec.bundle)
        return open_subject(spec, bundle=bundles[spec.bundle])
    except EdgeClipError as error:
        raise EngineError(f"{spec.title}: {error}") from error


def yardstick_target(threads: int) -> BenchmarkTarget:
    """Load the yardstick: one transformer layer on ONNX Runtime's CPU provider.

    Raises:
        EngineError: onnxruntime cannot load the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    engine = OrtEngine(YARDSTICK_GRAPH, providers=(CPU,), threads=threads)

    def run(values: NDArray[Any]) -> object:
        return engine.run({"values": values})["result"]

    def make_batch(size: int) -> NDArray[np.float32]:
        values = np.sin(np.arange(size * TOKENS * WIDTH)).astype(np.float32)
        return values.reshape(size, TOKENS, WIDTH)

    return BenchmarkTarget(YARDSTICK_NAME, run, make_batch, threads)


class _StepPrinter:
    """Prints progress on stdout, rarely enough not to disturb the timed runs."""

    def __init__(self, total: int) -> None:
        self._done, self._total, self._printed = 0, total, -float("inf")

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_STEPS:
            self._printed = now
            print(STEP, self._done, self._total, flush=True)


if __name__ == "__main__":
    sys.exit(main())
