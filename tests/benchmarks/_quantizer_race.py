"""Engines of any environment side by side: each in its process, one run at a time, in turns.

A set of processes lives for some rounds; then all are started anew, because how memory comes to
lie in a process makes its runs faster or slower for as long as it lives. So intervals are those
of a ratio over sets.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.record.timing_statistics import latency_of, paired_ratio
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.quality.intervals import Interval

PROCESS = Path(__file__).parent / "_quantizer_process.py"
_WARM = 0.5  # seconds
_CONTENDED = 0.1  # share of the time that a process was ready to run but had no core


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A tower's file, what runs it, and on what.

    Attributes:
        name: unique in a race.
        model: the file.
        rows: its inputs, see `_quantizer_process.py`; the first is what is timed.
        engine: one that `_quantizer_process.py` knows.
        python: of the environment that has the engine.
    """

    name: str
    model: Path
    rows: Path
    engine: str = "onnxruntime"
    python: Path = Path(sys.executable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often is timed: so many sets of fresh processes, so many rounds in each."""

    sets: int
    rounds: int


QUICK_EFFORT = Effort(sets=3, rounds=8)  # fewer sets have no interval to speak of


@dataclass(frozen=True, slots=True, kw_only=True)
class Raced:
    """What came of a race.

    Attributes:
        seconds: by name, one array [rounds] a set.
        waiting: the largest share of its time that a process was denied a core; None where
            the system does not say.
    """

    seconds: Mapping[str, Sequence[NDArray[np.float64]]]
    waiting: float | None

    @property
    def contended(self) -> bool | None:
        """Whether other programs took the processor meanwhile."""
        return None if self.waiting is None else self.waiting > _CONTENDED

    def ms(self, name: str) -> Interval:
        """Median of a run's milliseconds."""
        return latency_of([1e3 * runs for runs in self.seconds[name]]).p50_ms

    def ratio(self, name: str, reference: str) -> Interval:
        """Median of the time divided by the reference's in the same round."""
        return paired_ratio(self.seconds[name], self.seconds[reference])


class _Process:
    """An engine that answers."""

    def __init__(self, entrant: Entrant, process: "subprocess.Popen[str]", said: Path) -> None:
        self._entrant, self._process, self._said = entrant, process, said
        self.read()

    def ask(self, line: str) -> float:
        """Send a line and return the answer.

        Raises:
            EngineError: the process has ended; the message is its last word.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except OSError:
            pass  # `read` says why
        return self.read()

    def read(self) -> float:
        """Wait for an answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(last_word(self._said.read_text(encoding="utf-8", errors="replace")))
        return float(line)

    def times(self) -> NDArray[np.float64] | None:
        """Seconds on a core and seconds of waiting for one, of all threads: [2]."""
        try:
            tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
            found = [(task / "schedstat").read_text().split()[:2] for task in tasks]
        except OSError:
            return None
        return np.asarray(np.array(found, np.float64).sum(axis=0) / 1e9)


def race(entrants: Sequence[Entrant], effort: Effort, *, threads: int) -> Raced:
    """Time all in turns.

    Raises:
        EngineError: one cannot run.
    """
    seconds: dict[str, list[NDArray[np.float64]]] = {item.name: [] for item in entrants}
    waiting: list[float | None] = []
    for number in range(effort.sets):
        order = entrants[::-1] if number % 2 else entrants
        with ExitStack() as stack:
            open_ = {item.name: stack.enter_context(started(item, threads)) for item in order}
            processes = [open_[item.name] for item in entrants]
            for process in processes:
                process.ask(f"warm {_WARM}")
            before = [process.times() for process in processes]
            found = np.array([_round(processes, at) for at in range(effort.rounds)])
            after = [process.times() for process in processes]
        for at, item in enumerate(entrants):
            seconds[item.name].append(found[:, at])
        waiting += [_denied(*pair) for pair in zip(before, after, strict=True)]
    known = [share for share in waiting if share is not None]
    return Raced(seconds=seconds, waiting=max(known, default=None))


def embed(entrant: Entrant, *, threads: int) -> FloatArray:
    """Embeddings of all its rows, float32 [N, dim].

    Raises:
        EngineError: it cannot run.
    """
    with tempfile.TemporaryDirectory() as folder, started(entrant, threads) as process:
        path = Path(folder) / "embeddings.npy"
        process.ask(f"embed {path}")
        return np.asarray(np.load(path), np.float32)


def make(recipe: str, source: Path, target: Path, rows: Path, python: Path) -> None:
    """Let a recipe of `_quantizer_process.py` quantize a tower.

    Raises:
        EngineError: it cannot; the message is its last word.
    """
    given = [recipe, str(source), str(target), str(rows)]
    done = subprocess.run(
        [str(python), "-I", str(PROCESS), "make", *given],
        capture_output=True,
        text=True,
        cwd=target.parent,
        check=False,
    )
    if done.returncode:
        raise EngineError(last_word(done.stderr))


def last_word(said: str) -> str:
    """The last line of an exception."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"


@contextmanager
def started(entrant: Entrant, threads: int) -> Iterator[_Process]:
    """Start an engine and load its file; it ends with the block.

    Raises:
        EngineError: it cannot load it.
    """
    given = [entrant.engine, str(threads), str(entrant.model), str(entrant.rows)]
    command = [str(entrant.python), "-I", str(PROCESS), "serve", *given]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        with (
            said.open("w") as sink,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            ) as process,
        ):
            try:
                yield _Process(entrant, process, said)
            finally:
                process.kill()


def _round(processes: Sequence[_Process], number: int) -> list[float]:
    found = [0.0] * len(processes)
    for at in round_order(len(processes), number):
        found[at] = processes[at].ask("run")
    return found


def _denied(before: NDArray[np.float64] | None, after: NDArray[np.float64] | None) -> float | None:
    if before is None or after is None:
        return None
    ran, waited = after - before
    return float(waited / (ran + waited)) if ran > 0 else None
