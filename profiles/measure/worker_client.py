"""Run a benchmark job in a fresh worker process, show its progress, and read its result.

A fresh process has no caches, threads or memory of other measurements. The worker itself is
`benchmark_worker`; request and result are JSON files.
"""

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from edgeclip.profiles.measure.open_subject import sample_pictures
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.record.conditions import CpuTime
from edgeclip.profiles.record.measurement import Identity, SweepPoint, WarmUp, Yardstick
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.console import Progress
from edgeclip.runtime.errors import ConfigError, EngineError, without_colour
from edgeclip.runtime.logs import log_json_line

WorkerTask = Literal["interleaved", "memory", "sweep"]

STEP = "step"  # begins a line of progress on the worker's stdout
ERROR = "edgeclip: error: "  # begins the line on the worker's stderr that says why it failed

_MODULE = "edgeclip.profiles.measure.benchmark_worker"
_KEPT_LINES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRequest(JsonRecord):
    """One job for a worker process.

    Attributes:
        task: "interleaved" times all subjects and the yardstick in rounds; "memory" loads one
            subject, runs it a few times and reports the peak memory; "sweep" measures one
            subject's throughput by batch size.
        subjects: the subjects; one for "memory" and "sweep".
        workload: workload of the task "interleaved".
        batch_sizes: batch sizes of the task "sweep".
        seconds: seconds for each batch size of the task "sweep".
    """

    WHAT: ClassVar[str] = "a benchmark request"
    HINT: ClassVar[str] = "write it with this version"

    task: WorkerTask
    subjects: tuple[SubjectSpec, ...]
    workload: Workload | None = None
    batch_sizes: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectRuns:
    """Runs of one subject in one worker process.

    Attributes:
        samples_ms: wall time of each timed run at batch 1, in round order.
        warm_up, cpu, input_shape, identity: see `Measurement`.
        remarks: see `Measurement.missing`.
    """

    samples_ms: tuple[float, ...]
    warm_up: WarmUp
    cpu: CpuTime
    input_shape: tuple[int, ...]
    identity: Identity
    remarks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerResult(JsonRecord):
    """Result of one worker process.

    Attributes:
        runs: result of "interleaved": runs of each subject, in the request's order.
        yardstick: result of "interleaved": run times of the yardstick in the same rounds.
        peak_memory_mb: result of "memory", in 10^6 bytes; None if the system does not report it.
        sweep: result of "sweep", without batch sizes that the graph does not accept.
    """

    WHAT: ClassVar[str] = "a benchmark result"
    HINT: ClassVar[str] = "measure again"

    runs: tuple[SubjectRuns, ...] = ()
    yardstick: Yardstick | None = None
    peak_memory_mb: float | None = None
    sweep: tuple[SweepPoint, ...] = ()


def run_worker(request: WorkerRequest, *, progress: Progress | None = None) -> WorkerResult:
    """Run a request in a fresh process and return its result; leave no files behind.

    What the worker logs, such as that an engine is being built, is logged here too. An
    exception here, such as by Ctrl-C, kills the worker.

    Args:
        request: the job.
        progress: called with the worker's progress, twice a second at most.

    Raises:
        EngineError: the worker failed; the message is its own last line.
    """
    with tempfile.TemporaryDirectory(prefix="edgeclip-") as folder:
        request_file, result_file = Path(folder, "request.json"), Path(folder, "result.json")
        subjects = _with_pictures(request.subjects, Path(folder))
        replace(request, subjects=subjects).save(request_file)
        _run([sys.executable, "-m", _MODULE, str(request_file), str(result_file)], progress)
        try:
            return WorkerResult.load(result_file)
        except ConfigError as error:
            raise EngineError(f"the benchmark process left no result: {error}") from error


def _with_pictures(subjects: Sequence[SubjectSpec], folder: Path) -> tuple[SubjectSpec, ...]:
    """Write sample pictures for subjects without any: generating them needs much memory."""
    if not any(spec.needs_pictures and not spec.pictures for spec in subjects):
        return tuple(subjects)
    files = []
    for number, content in enumerate(sample_pictures()):
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(content)
    names = tuple(map(str, files))
    return tuple(
        replace(spec, pictures=names) if spec.needs_pictures and not spec.pictures else spec
        for spec in subjects
    )


def _run(command: Sequence[str], progress: Progress | None) -> None:
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        relay = threading.Thread(target=_relay_log, args=(process.stderr, last), daemon=True)
        relay.start()
        try:
            for line in process.stdout:
                step = re.fullmatch(rf"{STEP} (\d+) (\d+)\s*", line)
                if progress is not None and step is not None:
                    progress(int(step[1]), int(step[2]))
            process.wait()
        except BaseException:  # Ctrl-C above all
            process.kill()
            raise
        finally:
            relay.join()
    if process.returncode != 0:
        raise EngineError(_failure(last, process.returncode))


def _relay_log(lines: Iterable[str], last: deque[str]) -> None:
    """Log what the worker logged, and keep its other last lines for the error message."""
    for line in lines:
        if not log_json_line(line):
            last.append(without_colour(line).strip())


def _failure(last: Iterable[str], status: int) -> str:
    """Say why the worker failed: its error line, else its signal, else its last line."""
    lines = [line for line in last if line]
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if errors:
        return errors[-1]
    if status < 0:
        name = signal.Signals(-status).name
        hint = ": it may have run out of memory" if name == "SIGKILL" else ""
        return f"the benchmark process was killed by {name}{hint}"
    end = lines[-1] if lines else f"exit status {status}"
    return f"the benchmark process failed: {end}"
