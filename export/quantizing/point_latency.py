"""How long graphs take on this machine, against another one in the same rounds."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.quantizing.point import PointLatency
from edgeclip.export.time_twice import Opener, Timed, time_each_twice, time_twice
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.spec import Tower

SEARCHING = Workload(
    name="search",
    description="latency at batch 1, enough to tell configs a few percent apart",
    batch_sizes=(1,),
    min_warmup_runs=5,
    max_warmup_seconds=1,
    repeats=100,
    seconds_per_batch=1,
    cold_starts=0,
)
_SECONDS_OF_RACE = 6.0  # see `time_each_twice`


def measure_latency(
    reference: Opener,
    candidate: Opener,
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload = SEARCHING,
) -> PointLatency:
    """Time both in turns, twice; for arguments and errors see `time_twice`.

    Figures are the geometric means of both measurements, and intervals hold those of both.
    """
    return _latency(time_twice(reference, candidate, values, tower=tower, workload=workload))


def race(
    reference: Opener,
    candidates: Sequence[Opener],
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload = SEARCHING,
) -> tuple[PointLatency, ...]:
    """Time all in the same rounds, and for longer; otherwise as `measure_latency`."""
    found = time_each_twice(
        reference, candidates, values, tower=tower, workload=workload, seconds=_SECONDS_OF_RACE
    )
    return tuple(map(_latency, found))


def _latency(found: Sequence[Timed]) -> PointLatency:
    return PointLatency(
        ratio=_joined([item.ratio for item in found]),
        ms=_joined([item.candidate.latency.p50_ms for item in found]),
        reference_ms=_joined([item.reference.latency.p50_ms for item in found]),
        contended=any(item.reference.contended or item.candidate.contended for item in found),
    )


def _joined(intervals: Sequence[Interval]) -> Interval:
    return Interval(
        value=math.exp(float(np.mean([math.log(item.value) for item in intervals]))),
        low=min(item.low for item in intervals),
        high=max(item.high for item in intervals),
    )
