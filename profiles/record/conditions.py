"""Conditions of a measurement: clocks, temperatures, interference, CPU time used and lost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConditions:
    """Clocks, load and temperatures of a machine at one moment; unknown values are None or empty.

    Attributes:
        taken: time in UTC, ISO 8601.
        cpu_mhz: clock of each usable logical processor, 10^6 Hz; in a virtual machine often only
            the nominal clock.
        governor: Linux's frequency governor, such as "schedutil".
        load_1m: load average of the last minute.
        temperatures_c: (sensor, degrees Celsius).
        throttle_counts: (counter, number of times a processor was throttled for heat or power).
        gpu: (name, value) as reported by the GPU driver, such as its clock.
    """

    taken: str
    cpu_mhz: tuple[float, ...]
    governor: str | None
    load_1m: float | None
    temperatures_c: tuple[tuple[str, float], ...]
    throttle_counts: tuple[tuple[str, int], ...]
    gpu: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """Other load and throttling during a measurement.

    Attributes:
        waiting_share: lost share of the CPU time that the watching process asked for, as in
            `CpuTime`; None if it hardly ran.
        steal_share: share of all cores' time that the hypervisor took.
        others_share: share of all cores' time used by other processes; in a container, by all of
            the host's other processes.
        throttled: whether a processor was throttled for heat or power; None if unknown.
        disturbed: whether any of these exceeded its limit; None if all are unknown.
        reasons: what exceeded its limit, in words.
    """

    waiting_share: float | None
    steal_share: float | None
    others_share: float | None
    throttled: bool | None
    disturbed: bool | None
    reasons: tuple[str, ...]


_CONTENDED_ABOVE = 0.10
_STEAL_COLUMN = 8  # of the `cpu` line in /proc/stat, see proc_stat(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTime:
    """Wall time, CPU time and lost CPU time of one target's timed runs at batch 1.

    `wall_s`, `thread_s` (the calling thread) and `process_s` (all threads) are sums over the
    target's runs. The two shares cover the whole interleaved phase, because a disturbance hits
    every target of a round:

    - `waiting_share`: of the CPU time this process asked for, the part its threads spent
      ready to run but waiting for a core (/proc/self/task/*/schedstat). Other programs
      cause it, and so do more engine threads than cores.
    - `steal_share`: of all cores' time, the part a hypervisor took away (/proc/stat).

    Both are None, never 0, if the system does not report them.
    """

    wall_s: float
    thread_s: float
    process_s: float
    waiting_share: float | None
    steal_share: float | None

    @property
    def contended(self) -> bool | None:
        """True if more than 10% of the CPU time was lost to others; None if unknown.

        If waiting time is reported, it decides, together with steal time. If not, only a run
        on a single thread can be judged: its wall and CPU time must not differ by more than
        10%. With several threads the caller may sleep while others work, so a difference
        proves nothing. Shared caches, memory bandwidth and lowered clocks are not seen.
        """
        stolen = self.steal_share is not None and self.steal_share > _CONTENDED_ABOVE
        if self.waiting_share is not None:
            return stolen or self.waiting_share > _CONTENDED_ABOVE
        if stolen:
            return True
        single_threaded = self.process_s <= (1 + _CONTENDED_ABOVE) * self.thread_s
        if single_threaded:
            return self.thread_s < (1 - _CONTENDED_ABOVE) * self.wall_s
        return None


def add_cpu_times(parts: Sequence[CpuTime]) -> CpuTime:
    """Add up the times of processes or loads; the shares are those of the most disturbed one."""
    waiting = [cpu.waiting_share for cpu in parts if cpu.waiting_share is not None]
    steal = [cpu.steal_share for cpu in parts if cpu.steal_share is not None]
    return CpuTime(
        wall_s=sum(cpu.wall_s for cpu in parts),
        thread_s=sum(cpu.thread_s for cpu in parts),
        process_s=sum(cpu.process_s for cpu in parts),
        waiting_share=max(waiting, default=None),
        steal_share=max(steal, default=None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSnapshot:
    """CPU time counters at one moment: `take()` two, then call `denied_since`."""

    process_s: float
    waiting_s: tuple[tuple[str, float], ...] | None  # one pair per thread: id, seconds
    steal_ticks: tuple[int, int] | None  # stolen, all

    @staticmethod
    def take() -> "CpuSnapshot":
        """Read the counters now; those that the system does not report are None."""
        return CpuSnapshot(
            process_s=time.process_time(), waiting_s=_waiting(), steal_ticks=_steal()
        )

    def denied_since(self, before: "CpuSnapshot") -> tuple[float | None, float | None]:
        """Return (waiting share, steal share) between `before` and this snapshot."""
        waiting_share = steal_share = None
        if self.waiting_s is not None and before.waiting_s is not None:
            earlier = dict(before.waiting_s)
            waited = sum(max(0.0, s - earlier.get(t, 0.0)) for t, s in self.waiting_s)
            asked = waited + self.process_s - before.process_s
            waiting_share = waited / asked if asked > 0 else None
        if self.steal_ticks is not None and before.steal_ticks is not None:
            stolen, total = (
                a - b for a, b in zip(self.steal_ticks, before.steal_ticks, strict=True)
            )
            steal_share = stolen / total if total > 0 else None
        return waiting_share, steal_share


def _waiting() -> tuple[tuple[str, float], ...] | None:
    """Seconds that each thread of this process waited for a core: (thread id, seconds)."""
    found, running = [], 0
    try:
        for task in Path("/proc/self/task").iterdir():
            try:
                ran, waited = (task / "schedstat").read_text().split()[:2]
            except (FileNotFoundError, ProcessLookupError):  # the thread has ended
                continue
            running += int(ran)
            found.append((task.name, int(waited) / 1e9))
    except (OSError, ValueError):
        return None
    # A kernel without this accounting prints zeros, which would read as "never waited".
    return tuple(found) if running > 0 else None


def _steal() -> tuple[int, int] | None:
    """Ticks of all cores: (stolen by the hypervisor, total)."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    if len(ticks) < _STEAL_COLUMN or sum(ticks) == 0:
        return None
    return ticks[_STEAL_COLUMN - 1], sum(ticks)
