"""How long the device itself needs, so that it can wait for a server and still answer in time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from edgeclip.runtime.split.recent_times import RecentTimes

# The image tower on a file that is still to be decoded, or on pixels; then what follows it.
Work = Literal["file", "pixels", "labels", "index", "nothing"]

_QUANTILE = 0.95
_MARGIN = 1.25  # of what is measured: the next run may be slower than 95% of the last ones
_MARGIN_S = 0.002  # for waking up


class DeviceTime:
    """Running quantiles of the device's own work, by kind of work and per picture or query."""

    def __init__(self) -> None:
        self._times = {work: RecentTimes() for work in get_args(Work)}

    @contextmanager
    def measured(self, work: Work, count: int) -> Iterator[None]:
        """Measure the block, which does this work on `count` pictures or queries."""
        began = time.perf_counter()
        yield
        self._times[work].add((time.perf_counter() - began) / max(1, count))

    def reserve_s(self, *works: Work, count: int = 1) -> float:
        """Seconds to keep for doing these one after the other; work never seen counts as 0.

        That many pictures are taken to need `count` times as long as one; they need less.
        """
        each = sum(self._times[work].quantile(_QUANTILE) or 0.0 for work in works)
        return _MARGIN * each * max(1, count) + _MARGIN_S
