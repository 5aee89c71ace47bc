"""Start a benchmark worker in a fresh process, show its progress, read its answer."""

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
from edgeclip.runtime.errors import ConfigError, EngineError

Errand = Literal["turns", "memory", "sweep"]

# What the process prints: how far it is, on stdout, and why it failed, on stderr.
STEP = "step"
TOLD = "edgeclip: "
ERROR = f"{TOLD}error: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(JsonRecord):
    """What to do.

    Attributes:
        errand: "turns" lets all subjects and the yardstick take turns; "memory" opens the one
            subject and runs it a few times; "sweep" runs the one subject in larger batches.
        subjects: which ones.
        workload: of "turns".
        batch_sizes: of "sweep".
        seconds: for each batch size of "sweep".
    """

    WHAT: ClassVar[str] = "a request"
    MEND: ClassVar[str] = "write it with this version"

    errand: Errand
    subjects: tuple[SubjectSpec, ...]
    workload: Workload | None = None
    batch_sizes: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectTurns:
    """What one subject did in one process.

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
class Answer(JsonRecord):
    """What was measured.

    Attributes:
        turns: one for each subject, in the request's order.
        yardstick: of "turns".
        peak_memory_mb: of "memory", see `Measurement`; None where nothing reports it.
        sweep: of "sweep"; a batch that the graph does not take is left out.
    """

    WHAT: ClassVar[str] = "an answer"
    MEND: ClassVar[str] = "measure again"

    turns: tuple[SubjectTurns, ...] = ()
    yardstick: Yardstick | None = None
    peak_memory_mb: float | None = None
    sweep: tuple[SweepPoint, ...] = ()


_MODULE = "edgeclip.profiles.measure.benchmark_worker"
_KEPT_LINES = 20


def ask_process(request: Request, *, progress: Progress | None = None) -> Answer:
    """Let a fresh process answer a request; it leaves no files.

    What it says on stderr, such as that an engine is being built, is passed on. An exception
    here, such as by Ctrl-C, ends it.

    Args:
        request: what to measure.
        progress: called with what the process tells of its steps, twice a second at most.

    Raises:
        EngineError: the process failed; the message is its own last line.
    """
    with tempfile.TemporaryDirectory(prefix="edgeclip-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        subjects = _with_pictures(request.subjects, Path(folder))
        replace(request, subjects=subjects).save(asked)
        _run([sys.executable, "-m", _MODULE, str(asked), str(answered)], progress)
        try:
            return Answer.load(answered)
        except ConfigError as error:
            raise EngineError(f"a process that measured left no answer: {error}") from error


def _with_pictures(subjects: Sequence[SubjectSpec], folder: Path) -> tuple[SubjectSpec, ...]:
    """Write sample pictures for those that have none: making them would add to their memory."""
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
        relay = threading.Thread(target=_pass_on, args=(process.stderr, last), daemon=True)
        relay.start()
        try:
            for line in process.stdout:
                _show(line, progress)
            process.wait()
        except BaseException:  # Ctrl-C above all
            process.kill()
            raise
        finally:
            relay.join()
    if process.returncode != 0:
        raise EngineError(_reason(last, process.returncode))


def _pass_on(lines: Iterable[str], last: deque[str]) -> None:
    for line in lines:
        last.append(line.strip())
        if line.startswith(TOLD) and not line.startswith(ERROR):
            sys.stderr.write(line)
            sys.stderr.flush()


def _show(line: str, progress: Progress | None) -> None:
    words = re.fullmatch(rf"{STEP} (\d+) (\d+)\s*", line)
    if progress is not None and words is not None:
        progress(int(words[1]), int(words[2]))


def _reason(last: Iterable[str], status: int) -> str:
    lines = [line for line in last if line]
    said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if said:
        return said[-1]
    if status < 0:
        name = signal.Signals(-status).name
        mend = ": it may have run out of memory" if name == "SIGKILL" else ""
        return f"a process that measured was ended by {name}{mend}"
    end = lines[-1] if lines else f"exit status {status}"
    return f"a process that measured failed: {end}"
