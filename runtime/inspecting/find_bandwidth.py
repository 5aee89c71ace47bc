"""Memory bandwidth as STREAM measures it: arrays far larger than the caches, all threads.

Source: McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance
Computers", 1995, and the run rules of STREAM: arrays of at least four times all last-level
caches, and bytes counted as the program names them (a cache line that is fetched only to be
overwritten is not counted). Copy and Add are STREAM's; Read is there because a product with
one row does little else. numpy lets go of the interpreter's lock in all three.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.detect import detect_memory_mb
from edgeclip.runtime.inspecting.peak_rate import peak_rate, timed_runs
from edgeclip.runtime.intervals import Interval

_Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

_CPUS = Path("/sys/devices/system/cpu")
_TIMES_THE_CACHES = 4
_CACHES = 32 << 20  # bytes; where the system does not tell
_SMALLEST = 32 << 20
_PART_OF_MEMORY = 8  # the three arrays together take no more than an eighth


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The best of Copy, Add and Read in 10^9 bytes a second.

    Attributes:
        gb_s: with its 95% interval.
        kernel: which was best.
        array_bytes: of one array, all threads together.
    """

    gb_s: Interval
    kernel: str
    array_bytes: int


def _copy(arrays: _Arrays) -> object:
    np.copyto(arrays[0], arrays[1])
    return arrays[0]


def _add(arrays: _Arrays) -> object:
    return np.add(arrays[1], arrays[2], out=arrays[0])


def _read(arrays: _Arrays) -> object:
    return arrays[1].max()


# What runs, and how many arrays pass through memory.
_KERNELS: dict[str, tuple[Callable[[_Arrays], object], int]] = {
    "Copy": (_copy, 2),
    "Add": (_add, 3),
    "Read": (_read, 1),
}


def find_bandwidth(threads: int, *, seconds: float, array_bytes: int | None = None) -> Bandwidth:
    """Measure for about so many seconds; the arrays are split between the threads.

    Args:
        threads: that work at the same time; one alone may not reach what the memory gives.
        seconds: for all three kernels; each runs at least 5 times.
        array_bytes: of one of the three arrays; by default `far_larger_than_caches()`.
    """
    size = far_larger_than_caches() if array_bytes is None else array_bytes
    count = max(1, size // (threads * np.dtype(np.float32).itemsize))
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_filled, [count] * threads))
        moved = sum(part[0].nbytes for part in parts)
        for name, (kernel, arrays) in _KERNELS.items():
            times = timed_runs(_on_all(pool, kernel, parts), seconds / len(_KERNELS))
            found[name] = peak_rate(times, arrays * moved / 1e9)
    best = max(found, key=lambda name: found[name].value)
    return Bandwidth(found[best], best, moved)


def far_larger_than_caches(root: Path = _CPUS) -> int:
    """Bytes of an array of four times all last-level caches, if memory allows it."""
    wanted = max(_SMALLEST, _TIMES_THE_CACHES * (last_level_caches(root) or _CACHES))
    memory = detect_memory_mb()
    return wanted if memory is None else min(wanted, memory * 10**6 // (3 * _PART_OF_MEMORY))


def last_level_caches(root: Path = _CPUS) -> int | None:
    """Bytes of all caches of the last level; None where the system does not tell.

    Source: Documentation/ABI/testing/sysfs-devices-system-cpu of Linux. Processors that
    share a cache name the same list of processors.
    """
    found: dict[tuple[int, str], int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((folder / "level").read_text())
            shared = (folder / "shared_cpu_list").read_text().strip()
            found[level, shared] = _size((folder / "size").read_text().strip())
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _size(text: str) -> int:
    """Bytes of "32768K" or "1M"."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    unit = units.get(text[-1:])
    return int(text) if unit is None else int(text[:-1]) * unit


def _filled(count: int) -> _Arrays:
    """Three arrays that the calling thread touches first, so that they lie near it."""
    a, b, c = (np.full(count, value, np.float32) for value in (0, 1, 2))
    return a, b, c


def _on_all(
    pool: ThreadPoolExecutor, kernel: Callable[[_Arrays], object], parts: Sequence[_Arrays]
) -> Callable[[], object]:
    if len(parts) == 1:
        return lambda: kernel(parts[0])
    return lambda: list(pool.map(kernel, parts))
