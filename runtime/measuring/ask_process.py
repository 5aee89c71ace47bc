"""Start a fresh process that measures, show how far it is, and read what it found."""

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from edgeclip.runtime.errors import ConfigError, EngineError
from edgeclip.runtime.measuring.sample_pictures import sample_pictures
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.measuring.subject_request import ERROR, STEP, TOLD, Answer, Request
from edgeclip.runtime.progress import Progress

_MODULE = "edgeclip.runtime.measuring.subject_process"
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
