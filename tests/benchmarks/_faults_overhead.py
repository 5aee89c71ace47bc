"""What an open breaker adds to the device's own work."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.remote_with_fallback import DeviceTimes, RemoteWithFallback
from edgeclip.runtime.split.retries_and_breaker import BreakerRules, Deadline
from edgeclip.runtime.split.split_runtime import SplitRuntime

_NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
_AT_ONCE = ClientRules(breaker=BreakerRules(fewest_calls=1, window_calls=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """In milliseconds.

    Attributes:
        runs: of each.
        paired: median of the differences between a call with an open breaker and the encoder's
            own, one after the other on the same pixels.
        alone: 99th percentile of the same call with no work to do.
    """

    runs: int
    paired: Interval
    alone: Interval


def measure_overhead(encoder: Encoder, plan: SplitPlan, runs: int) -> Overhead:
    """Open a breaker, then make calls with it and without it in turns."""
    size = encoder.spec.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    with Server(_NOBODY, rules=_AT_ONCE) as server:
        runtime = SplitRuntime(encoder, plan, server)
        runtime.encode_pixels(pixels)
        chooser = RemoteWithFallback(server, DeviceTimes())

        def nothing() -> object:
            deadline = Deadline.after_ms(100)
            return chooser.run(lambda until: None, lambda: None, ("pixels",), 1, deadline)

        differences, alone = [], []
        for _ in range(runs):
            own = _timed(lambda: encoder.encode_pixels(pixels))
            helped = _timed(lambda: runtime.encode_pixels(pixels))
            differences.append(helped - own)
            alone.append(_timed(nothing))
        assert runtime.encode_pixels(pixels).degraded == "breaker open"
    return Overhead(
        runs=runs,
        paired=percentile_interval(np.array(differences), 50),
        alone=percentile_interval(np.array(alone), 99),
    )


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3
