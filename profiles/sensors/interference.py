"""Detect what disturbed a measurement: other programs, a hypervisor, throttling.

Sources: proc_stat(5) and proc_pid_stat(5) for the counters of processor time.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

from edgeclip.profiles.record.conditions import CpuSnapshot, Interference, MachineConditions
from edgeclip.profiles.sensors.machine_state import take_conditions
from edgeclip.profiles.sensors.nvml import SLOWDOWNS, NvmlGpu

# Columns of the `cpu` line in /proc/stat.
_PROGRAMS = slice(0, 3)  # user, nice, system; interrupts belong to no program
_ALL = slice(0, 8)  # the columns behind, for guests, are part of user and nice
# Columns of /proc/PID/stat behind the name, which ends with the last parenthesis.
_PARENT = 1
_OWN_TIMES = slice(11, 15)  # user and system time, of the process and of its ended children


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyTime:
    """Processor time used since the machine started, in ticks.

    Attributes:
        programs: time used by all programs, on all processors.
        processors: time used or idle, on all processors.
        own: time used by one process and its descendants, those that have ended included.
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
            pid: the process whose time is `own`; this process by default.
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
        """Return the share of all processors' time that other programs used since `before`."""
        went_by = self.processors - before.processors
        if went_by <= 0:
            return None
        others = self.programs - before.programs - (self.own - before.own)
        return min(1.0, max(0.0, others / went_by))  # sampled counters may contradict each other


def _ticks_of_tree(root: Path, pid: int) -> int | None:
    """Add up the ticks of a process and its descendants; None where there is no such process.

    The kernel adds a child's time to its parent's when it ends, so the sum never falls.
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
    """Yield the number of every process, and the columns of its `stat` behind its name."""
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


_MOST_SHARE = 0.10  # as for `CpuTime.contended`
_MOST_HOT_SHARE = 0.01  # of the time: the counter moves a little without meaning much
_LEAST_CORE_SHARE = 0.05  # a process that only waits for its children cannot judge its waiting


class InterferenceWatch:
    """A context manager that detects what disturbed the measurement inside it.

    The work may run in this process and in its children, which do not count as others. Only this
    process's own waiting for a core is in it: children report theirs as `CpuTime`.

    Args:
        root, gpu: see `take_conditions`.

    Attributes:
        before: conditions when the block began.
        after: conditions when the block ended; not set before.
        found: what disturbed the block; not set before it ended.
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
        if cpu.process_s - self._cpu.process_s < _LEAST_CORE_SHARE * seconds:
            waiting = None
        others = None if busy is None or self._busy is None else busy.others_since(self._busy)
        self.found = judge_interference(
            waiting_share=waiting,
            steal_share=steal,
            others_share=others,
            slowdowns=slowdowns_between(self.before, self.after, seconds),
        )


def judge_interference(
    *,
    waiting_share: float | None = None,
    steal_share: float | None = None,
    others_share: float | None = None,
    slowdowns: tuple[str, ...] | None = None,
) -> Interference:
    """Decide whether a measurement was disturbed: by a share above 10%, or by any slowdown.

    Args:
        waiting_share, steal_share, others_share: see `Interference`.
        slowdowns: what throttled a processor, in words; None if unknown.
    """
    reasons = [
        words.format(share)
        for share, words in (
            (others_share, "other programs used {:.0%} of the processors"),
            (steal_share, "the hypervisor took {:.0%} of the processors"),
            (waiting_share, "{:.0%} of the CPU time asked for was spent waiting for a core"),
        )
        if share is not None and share > _MOST_SHARE
    ]
    reasons += slowdowns or ()
    known = (waiting_share, steal_share, others_share, slowdowns)
    return Interference(
        waiting_share=waiting_share,
        steal_share=steal_share,
        others_share=others_share,
        throttled=None if slowdowns is None else bool(slowdowns),
        disturbed=None if all(item is None for item in known) else bool(reasons),
        reasons=tuple(reasons),
    )


def slowdowns_between(
    before: MachineConditions, after: MachineConditions, seconds: float
) -> tuple[str, ...] | None:
    """List, in words, what throttled a processor or GPU between two states of the same machine.

    Args:
        before, after: the two states.
        seconds: time between them.

    Returns:
        None if the machine reports no throttling at all.
    """
    earlier = dict(before.throttle_counts)
    gpu_earlier, gpu_later = dict(before.gpu), dict(after.gpu)
    found = [
        f"a processor was slowed for its heat or supply: {name} rose by {count - earlier[name]}"
        for name, count in after.throttle_counts
        if count > earlier.get(name, count)
    ]
    hot = "slowed by heat ms"
    if hot in gpu_earlier and hot in gpu_later and seconds > 0:
        share = (float(gpu_later[hot]) - float(gpu_earlier[hot])) / 1e3 / seconds
        if share > _MOST_HOT_SHARE:
            found.append(f"the GPU was slowed for its heat for {min(1.0, share):.0%} of the time")
    held = gpu_later.get("clocks held by")
    slow = sorted(SLOWDOWNS & set((held or "").split(", ")))
    if slow:
        found.append(f"the GPU's clocks were held down: {', '.join(slow)}")
    reported = after.throttle_counts or hot in gpu_later or held is not None
    return tuple(found) if reported else None
