"""Interference: what other programs used, waited for and slowed while a measurement ran."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from edgeclip.profiles.record.conditions import CpuSnapshot, Interference, MachineConditions
from edgeclip.profiles.sensors.clocks import take_conditions
from edgeclip.profiles.sensors.nvml import SLOWDOWNS, NvmlGpu

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


_TOO_MUCH = 0.10  # of a share, as for `CpuTime.contended`
_TOO_HOT = 0.01  # of the time, since counters of heat also move for a moment without meaning much
_HARDLY_RAN = 0.05  # of one core: a process that only waits for its children cannot tell


class InterferenceWatch:
    """Compares the machine before and after the block that it surrounds.

    The work may run in this process and in its children, which do not count as others. What is
    waited for a core is this process's own alone: children tell theirs in `CpuTime`.

    Args:
        root, gpu: see `take_conditions`.

    Attributes:
        before: conditions when the block began.
        after: conditions when it ended; there is none before.
        found: what else the machine did meanwhile; there is none before it ended.
    """

    before: MachineConditions
    after: MachineConditions
    found: Interference

    def __init__(self, root: Path = Path("/"), *, gpu: NvmlGpu | None = None) -> None:
        self._root, self._gpu = root, gpu

    def __enter__(self) -> Self:
        self.before = take_conditions(self._root, gpu=self._gpu)
        self._busy, self._cpu = BusyTime.take(self._root), CpuSnapshot.take()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._began
        cpu, busy = CpuSnapshot.take(), BusyTime.take(self._root)
        self.after = take_conditions(self._root, gpu=self._gpu)
        waiting, steal = cpu.denied_since(self._cpu)
        if cpu.process_s - self._cpu.process_s < _HARDLY_RAN * seconds:
            waiting = None
        others = None if busy is None or self._busy is None else busy.others_since(self._busy)
        self.found = judged(
            waiting_share=waiting,
            steal_share=steal,
            others_share=others,
            slowdowns=slowdowns_between(self.before, self.after, seconds),
        )


def judged(
    *,
    waiting_share: float | None = None,
    steal_share: float | None = None,
    others_share: float | None = None,
    slowdowns: tuple[str, ...] | None = None,
) -> Interference:
    """Put these on record, and say whether any was too much.

    Shares are too much above a tenth.

    Args:
        waiting_share, steal_share, others_share: see `Interference`.
        slowdowns: what slowed a processor, for a person; None if it cannot be told.
    """
    reasons = [
        words.format(share)
        for share, words in (
            (others_share, "other programs used {:.0%} of the processors"),
            (steal_share, "the hypervisor took {:.0%} of the processors"),
            (waiting_share, "{:.0%} of the CPU time asked for was spent waiting for a core"),
        )
        if share is not None and share > _TOO_MUCH
    ]
    reasons += slowdowns or ()
    told = (waiting_share, steal_share, others_share, slowdowns)
    return Interference(
        waiting_share=waiting_share,
        steal_share=steal_share,
        others_share=others_share,
        throttled=None if slowdowns is None else bool(slowdowns),
        disturbed=None if all(item is None for item in told) else bool(reasons),
        reasons=tuple(reasons),
    )


def slowdowns_between(
    before: MachineConditions, after: MachineConditions, seconds: float
) -> tuple[str, ...] | None:
    """What slowed a processor for its heat or its supply, for a person; None if nothing can tell.

    Args:
        before, after: of the same machine.
        seconds: between them.
    """
    earlier, gpu_earlier, gpu_later = (
        dict(before.throttle_counts),
        dict(before.gpu),
        dict(after.gpu),
    )
    found = [
        f"a processor was slowed for its heat or supply: {name} rose by {count - earlier[name]}"
        for name, count in after.throttle_counts
        if count > earlier.get(name, count)
    ]
    hot = "slowed by heat ms"
    if hot in gpu_earlier and hot in gpu_later and seconds > 0:
        share = (float(gpu_later[hot]) - float(gpu_earlier[hot])) / 1e3 / seconds
        if share > _TOO_HOT:
            found.append(f"the GPU was slowed for its heat for {min(1.0, share):.0%} of the time")
    held = gpu_later.get("clocks held by")
    slow = sorted(SLOWDOWNS & set((held or "").split(", ")))
    if slow:
        found.append(f"the GPU's clocks were held down: {', '.join(slow)}")
    tells = after.throttle_counts or hot in gpu_later or held is not None
    return tuple(found) if tells else None
