"""Conditions of a measurement: clocks, temperatures, load, CPU time used and denied."""

import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """A machine at one moment; what it does not tell is None or empty, never 0.

    Attributes:
        taken: ISO 8601 in UTC.
        cpu_mhz: clock of each logical processor that may be used, in 10^6 Hz; in a virtual machine
            it is what the hypervisor makes of it, mostly the nominal one.
        governor: Linux's frequency governor, such as "schedutil".
        load_1m: load average of the last minute.
        temperatures_c: (sensor, degrees Celsius).
        throttle_counts: (counter, value): how often a processor was slowed for its heat or supply.
        gpu: (name of a value, value) as the GPU's driver tells them, such as its clock.
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
    """What else the machine did while something was measured.

    Attributes:
        waiting_share: of the CPU time that was asked for, see `CpuTime`; of the process that
            watched, and None if it hardly ran.
        steal_share: of all cores' time that a hypervisor took.
        others_share: of all cores' time that other processes used; in a container, of its host's.
        throttled: whether a processor was slowed for its heat or its supply; None if it cannot be
            told.
        disturbed: whether any of this was too much; None if nothing of it can be told.
        reasons: what was too much, for a person.
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
    """Where the time of one candidate's timed runs at batch 1 went.

    `wall_s`, `thread_s` (the calling thread) and `process_s` (all threads) are sums over
    this candidate's runs. The two shares cover the whole interleaved phase, because a
    disturbance hits every candidate of a round:

    - `waiting_share`: of the CPU time this process asked for, the part its threads spent
      ready to run but waiting for a core (/proc/self/task/*/schedstat). Other programs
      cause it, and so do more engine threads than cores.
    - `steal_share`: of all cores' time, the part a hypervisor took away (/proc/stat).

    Both are None where the system does not report them, never 0.
    """

    wall_s: float
    thread_s: float
    process_s: float
    waiting_share: float | None
    steal_share: float | None

    @property
    def contended(self) -> bool | None:
        """True if more than 10% of the CPU time was denied; None if it cannot be told.

        Where waiting time is reported, it decides, together with steal time. Elsewhere
        only a run on a single thread can be judged: its wall and CPU time must not differ
        by more than 10%. With several threads the caller may rightly sleep while others
        work, so the difference proves nothing. Neither sees shared caches, memory
        bandwidth or a lowered clock.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSnapshot:
    """Counters at one moment; `take()` two and compare them with `denied_since`."""

    process_s: float
    waiting_s: tuple[tuple[str, float], ...] | None  # one pair per thread: id, seconds
    steal_ticks: tuple[int, int] | None  # stolen, all

    @staticmethod
    def take() -> "CpuSnapshot":
        """Read the counters now; what the system does not report is None."""
        return CpuSnapshot(
            process_s=time.process_time(), waiting_s=_waiting(), steal_ticks=_steal()
        )

    def denied_since(self, before: "CpuSnapshot") -> tuple[float | None, float | None]:
        """Waiting share and steal share between `before` and this snapshot."""
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
    found, running = [], 0
    try:
        for task in Path("/proc/self/task").iterdir():
            try:
                ran, waited = (task / "schedstat").read_text().split()[:2]
            except (FileNotFoundError, ProcessLookupError):  # the thread ended while we looked
                continue
            running += int(ran)
            found.append((task.name, int(waited) / 1e9))
    except (OSError, ValueError):
        return None
    # A kernel that does not account for it prints zeros, which would read as "never waited".
    return tuple(found) if running > 0 else None


def _steal() -> tuple[int, int] | None:
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    if len(ticks) < _STEAL_COLUMN or sum(ticks) == 0:
        return None
    return ticks[_STEAL_COLUMN - 1], sum(ticks)
