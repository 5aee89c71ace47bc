"""Memory and processor time of processes while something runs, and how memory grows."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import psutil
from numpy.typing import NDArray

from edgeclip.runtime.quality.intervals import Interval

_SETTLED = 0.5  # of the time, until caches, pools and heaps are as large as they get
_BLOCKS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What was seen of a process: RSS in MB of 10^6 bytes, and processor time in all."""

    seconds: NDArray[np.float64]
    rss_mb: NDArray[np.float64]
    cpu_seconds: float

    @property
    def growth(self) -> Interval:
        """MB in ten minutes, and its 95% interval, once settled.

        Neighbouring samples are alike, so the interval is that of the slopes between the
        means of blocks (Theil 1950, Sen 1968): the middle 95% of the slopes of all pairs.
        """
        keep = self.seconds >= self.seconds[0] + _SETTLED * np.ptp(self.seconds)
        when = _blocks(self.seconds[keep])
        size = _blocks(self.rss_mb[keep])
        first, second = np.triu_indices(len(when), 1)
        slopes = 600 * (size[second] - size[first]) / (when[second] - when[first])
        low, value, high = (float(item) for item in np.percentile(slopes, [2.5, 50, 97.5]))
        return Interval(value, low, high)


class Watch:
    """Looks at processes while the block runs.

    Args:
        processes: their numbers, by what they are called.
        every: seconds between two looks.
    """

    def __init__(self, processes: Mapping[str, int], every: float = 1.0) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._every = every
        self._stop = threading.Event()
        self._seconds: list[float] = []
        self._rss: dict[str, list[float]] = {name: [] for name in processes}
        self._cpu = {name: self._cpu_of(name) for name in processes}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._cpu = {name: self._cpu_of(name) - before for name, before in self._cpu.items()}

    def seen(self, name: str) -> Watched:
        """What was seen of a process, after the block."""
        return Watched(
            seconds=np.array(self._seconds),
            rss_mb=np.array(self._rss[name]),
            cpu_seconds=self._cpu[name],
        )

    def _cpu_of(self, name: str) -> float:
        times = self._processes[name].cpu_times()
        return float(times.user + times.system)

    def _look(self) -> None:
        while not self._stop.wait(self._every):
            self._seconds.append(time.perf_counter())
            for name, process in self._processes.items():
                self._rss[name].append(process.memory_info().rss / 1e6)


def _blocks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of consecutive blocks."""
    return np.array([part.mean() for part in np.array_split(values, _BLOCKS)])
