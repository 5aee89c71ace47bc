"""Run the golden cases of a session, two at a time, each in a folder of its own."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.golden.masking import Mask
from tests.golden.small_hub import serve_repository

COMMAND = Path(sys.executable).with_name("edgeclip")
_AT_ONCE = 2
_PATIENCE = 600.0  # seconds for one command on a busy machine
# Many command lines in one process, so that what takes seconds to import is imported once.
_MANY_COMMANDS = """
import json, os, sys, tempfile, traceback
from importlib.metadata import entry_points

answers = os.fdopen(os.dup(1), "w")
main = next(iter(entry_points(group="console_scripts", name="edgeclip"))).load()
for line in sys.stdin:
    folder, words = json.loads(line)
    os.chdir(folder)
    sys.argv = ["edgeclip", *words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = "exception"
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        print(json.dumps([status or 0, *texts]), file=answers, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command printed, and its exit status."""

    status: int | str
    out: str
    err: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A good run of a command.

    Attributes:
        words: the command line; the folder of another run NAME is ../NAME.
        needs: runs whose outputs it reads.
        before: what to do in its folder first.
        keep_numbers: its figures are the same on every machine.
        drop: a pattern of lines that are not.
        hub: ask a hub on this machine, which holds the kept bundle.
        status: the exit status that it must have.
    """

    words: str
    needs: tuple[str, ...] = ()
    before: Callable[[Path], None] | None = None
    keep_numbers: bool = False
    drop: str | None = None
    hub: bool = False
    status: int = 0


class _Process:
    """Runs one command line after the other."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MANY_COMMANDS],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, words: Sequence[str]) -> Answer:
        """What a command line prints in a folder, and its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        impatience = threading.Timer(_PATIENCE, self._process.kill)
        impatience.start()
        try:
            print(json.dumps([str(folder), words]), file=self._process.stdin, flush=True)
            return Answer(*json.loads(self._process.stdout.readline()))
        finally:
            impatience.cancel()

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()


class Session:
    """The masked outputs of all cases that are asked for, each computed once."""

    def __init__(self, folder: Path, runs: Mapping[str, Run], short: Sequence[str]) -> None:
        self._folder = folder
        self._runs = runs
        self._short = short
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._processes: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._started: dict[str, Future[str]] = {}
        self._answers: Future[dict[str, Answer]] | None = None
        for _ in range(_AT_ONCE):
            self._processes.put(_Process(self._environment()))
        named = self._command(folder, ["device", "--list"]).out.splitlines()[0]
        processor = named.removeprefix("this-machine").removesuffix(", detected").strip()
        self._mask = Mask(folder, processor)

    def start_short(self) -> None:
        """Begin with the command lines that end at once: help and mistakes."""
        self._answers = self._pool.submit(self._all_short)

    def start(self, name: str) -> None:
        """Begin a run after those that it needs; it waits for them, so they come first."""
        if name in self._started:
            return
        for needed in self._runs[name].needs:
            self.start(needed)
        self._started[name] = self._pool.submit(self._run, name)

    def short(self, words: str) -> str:
        """The masked answer to a command line that ends at once."""
        assert self._answers is not None
        answer = self._answers.result()[words]
        return _record(words, answer.status, self._mask.wrapped, answer)

    def overview(self) -> str:
        """The help of `edgeclip` itself, as it was printed."""
        assert self._answers is not None
        return self._answers.result()["--help"].out

    def run(self, name: str) -> str:
        """The masked record of a good run."""
        self.start(name)
        return self._started[name].result()

    def close(self) -> None:
        """Wait for what has begun, and begin nothing more."""
        self._pool.shutdown(cancel_futures=True)
        for _ in range(_AT_ONCE):
            self._processes.get().close()

    def served(self, words: str) -> str:
        """Serve, ask one thing, interrupt; the masked record of all that."""
        folder = self._folder / "serve"
        folder.mkdir()
        process = subprocess.Popen(
            [COMMAND, *words.split()],
            cwd=folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        impatience = threading.Timer(_PATIENCE, process.kill)
        impatience.start()
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            address = first.strip().rpartition(" at ")[2]
            asked = _asked(address) if address else "it did not start"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=_PATIENCE)
        finally:
            impatience.cancel()
            process.kill()
            process.wait()
        said = f"{first}{out}\n{asked}".replace(address, "ADDRESS") if address else first + out
        return _record(
            words, process.returncode, self._mask.printed, Answer(process.returncode, said, err)
        )

    def _all_short(self) -> dict[str, Answer]:
        folder = self._folder / "short"
        folder.mkdir()
        return {line: self._command(folder, line.split()) for line in self._short}

    def _run(self, name: str) -> str:
        run = self._runs[name]
        for needed in run.needs:
            self._started[needed].result()
        folder = self._folder / name
        folder.mkdir()
        if run.before is not None:
            run.before(folder)
        there = _written(folder)
        if run.hub:
            with serve_repository(self._folder / "emoji") as address:
                hub = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
                with closing(_Process({**self._environment(), **hub})) as process:
                    answer = process.run(folder, run.words.split())
        else:
            answer = self._command(folder, run.words.split())
        files = self._mask.files(folder, _written(folder) - there)

        def mask(text: str) -> str:
            return self._mask.printed(text, keep_numbers=run.keep_numbers, drop=run.drop)

        return _record(run.words, answer.status, mask, answer, files)

    def _command(self, folder: Path, words: Sequence[str]) -> Answer:
        process = self._processes.get()
        try:
            return process.run(folder, words)
        finally:
            self._processes.put(process)

    def _environment(self) -> dict[str, str]:
        own = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "EDGECLIP_", "PYTHONWARNINGS"))
        }
        return {
            **own,
            "COLUMNS": "80",
            "EDGECLIP_CACHE": str(self._folder / "kept"),
            "EDGECLIP_STATE": str(self._folder / "state"),
            "HF_HOME": str(self._folder / "hf-home"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }


def _asked(address: str) -> str:
    """What a server says of itself and of its models."""
    lines = []
    for path in ("/v2", "/v2/health/ready", "/v2/models/emoji-student-image"):
        with urllib.request.urlopen(address + path, timeout=30) as response:
            lines.append(f"{path}: {response.status} {response.read().decode()}")
    return "\n".join(lines)


def _written(folder: Path) -> set[str]:
    """The names of all files in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def _record(
    words: str, status: int | str, mask: Callable[[str], str], answer: Answer, files: str = ""
) -> str:
    parts = [f"$ edgeclip {words}", f"exit status {status}"]
    for title, text in (("stdout", mask(answer.out)), ("stderr", mask(answer.err))):
        if text:
            parts.append(f"--- {title}\n{text}")
    if files:
        parts.append(f"--- files written\n{files}")
    return "\n".join(parts) + "\n"
