"""How fast something goes at best: timed runs, and the rate of the fastest tenth of them."""

import itertools
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.timing_statistics import percentile_interval

FEWEST_RUNS = 5
# A peak is what the machine can do when nothing is in its way. The very fastest run, which
# STREAM takes, has no interval; the tenth percentile has one and is nearly as fast.
_PERCENT = 10


def timed_runs(run: Callable[[], object], seconds: float) -> NDArray[np.float64]:
    """Run once untimed, then for so long and at least 5 times: seconds of each run, [N]."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    for runs in itertools.count(1):
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        times.append(end - start)
        if runs >= FEWEST_RUNS and end - began >= seconds:
            break
    return np.array(times)


def peak_rate(seconds: NDArray[np.float64], amount: float) -> Interval:
    """`amount` a second at the 10th percentile of run times [N], with its 95% interval.

    The interval is a block bootstrap's (see `timing_statistics`).
    """
    fast = percentile_interval(seconds, _PERCENT)
    return Interval(amount / fast.value, amount / fast.high, amount / fast.low)
