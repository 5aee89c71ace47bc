"""Roofline: what a machine computes and moves at most (Williams, Waterman, Patterson, 2009)."""

from dataclasses import dataclass

from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.sensing.conditions import Interference


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Measured peaks of this machine with the threads of the device profile.

    Attributes:
        threads: that were used.
        peak_gflops: 10^9 operations a second of a large product, by precision ("fp32", "int8").
        bandwidth_gb_s: 10^9 bytes a second, reading and writing memory far larger than caches.
        method: how they were measured, for a person.
        interference: what else the machine did meanwhile; where it was disturbed, even the fastest
            runs may be far below the peak. None where nobody watched.
    """

    threads: int
    peak_gflops: tuple[tuple[str, Interval], ...]
    bandwidth_gb_s: Interval
    method: str
    interference: Interference | None = None
