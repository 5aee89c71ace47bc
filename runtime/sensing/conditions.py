"""Conditions: clocks, temperatures and load of a machine, and what disturbed a measurement."""

from dataclasses import dataclass


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
