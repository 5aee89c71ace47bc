"""How much of the processors other programs used: all their time, less this program's own.

Sources: proc_stat(5) and proc_pid_stat(5). Both count in ticks, mostly of 10 ms, so that spans of
less than a second tell little.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = slice(0, 3)  # user, nice, system; without the kernel's interrupts, which are nobody's
_ALL = slice(0, 8)  # guests, the columns behind, are part of user and nice
# Of /proc/PID/stat, counted behind the name, which ends with the last parenthesis.
_PARENT = 1
_OWN_TIMES = slice(11, 15)  # user and system time, of itself and of children that ended


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyTime:
    """Counters of a machine at one moment, in ticks.

    Attributes:
        programs: of all processors together, in which some program ran.
        processors: that went by, on all of them.
        own: that one process, its children and theirs used, those that have ended included.
    """

    programs: int
    processors: int
    own: int

    @staticmethod
    def take(root: Path = Path("/"), pid: int | None = None) -> "BusyTime | None":
        """Read the counters now; None where the system has none.

        A child that no longer belongs to its parent, such as a daemon, counts as another program.

        Args:
            root: where `proc` is.
            pid: whose time is its own; this process by default.
        """
        try:
            line = (root / "proc/stat").read_text().split("\n", 1)[0]
            columns = [int(word) for word in line.split()[1:]]
            own = _ticks_of_tree(root, os.getpid() if pid is None else pid)
        except (OSError, ValueError):
            return None
        if len(columns) < _ALL.stop or own is None:
            return None
        return BusyTime(programs=sum(columns[_PROGRAMS]), processors=sum(columns[_ALL]), own=own)

    def others_since(self, before: "BusyTime") -> float | None:
        """The share of all processors' time that other programs used since `before`."""
        went_by = self.processors - before.processors
        if went_by <= 0:
            return None
        others = self.programs - before.programs - (self.own - before.own)
        return min(1.0, max(0.0, others / went_by))  # sampled counters may contradict each other


def _ticks_of_tree(root: Path, pid: int) -> int | None:
    """Ticks of a process and all below it; None where it is not to be found.

    What a child used goes over to its parent when it ends, so that the sum never falls.
    """
    ticks, children = {}, defaultdict(list)
    for number, words in _processes(root):
        ticks[number] = sum(map(int, words[_OWN_TIMES]))
        children[int(words[_PARENT])].append(number)
    if pid not in ticks:
        return None
    total, waiting = 0, [pid]
    while waiting:
        number = waiting.pop()
        total += ticks[number]
        waiting += children[number]
    return total


def _processes(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of every process, and the words of its `stat` behind its name."""
    for folder in (root / "proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            text = (folder / "stat").read_text(errors="replace")
        except OSError:  # it ended while we looked
            continue
        words = text.rpartition(")")[2].split()
        if len(words) >= _OWN_TIMES.stop:
            yield int(folder.name), words
