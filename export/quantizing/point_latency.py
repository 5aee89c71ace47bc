"""How long a graph takes on this machine, against another one in the same rounds."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.embed_pairs import Embedder
from edgeclip.export.quantizing.point import PointLatency
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.interleave import Candidate, measure_interleaved, repeat_rows
from edgeclip.runtime.measuring.measurement import Measurement
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

_SECONDS = 2.0  # for the timed runs of one of the two measurements
_FEWEST = 12  # runs, however slow a tower is
_REFERENCE, _CANDIDATE = "fp32", "candidate"

Opener = Callable[[], Embedder]


def measure_latency(
    reference: Opener,
    candidate: Opener,
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload = SEARCHING,
) -> PointLatency:
    """Time both in turns, twice, with engines loaded anew in both orders.

    Of two engines with the same graph one can be some percent faster for as long as they
    live, by where their memory lies. So figures are the geometric means of both
    measurements, and intervals hold those of both.

    Args:
        reference, candidate: open an engine; what they return embeds.
        values: some of the tower's inputs [N, ...]; the first is what is timed.
        tower: which one it is.
        workload: how much to measure; slow towers are run less often.

    Raises:
        EngineError: an engine fails.
    """
    found = []
    for first in (True, False):
        embedders: dict[str, Embedder] = {}
        for name in (_REFERENCE, _CANDIDATE) if first else (_CANDIDATE, _REFERENCE):
            embedders[name] = reference() if name == _REFERENCE else candidate()
        found.append(_once(embedders, values, tower, workload))
    return PointLatency(
        ratio=_joined([mine.ratio.ratio for _, mine in found if mine.ratio is not None]),
        ms=_joined([mine.latency.p50_ms for _, mine in found]),
        reference_ms=_joined([theirs.latency.p50_ms for theirs, _ in found]),
        contended=any(item.contended for pair in found for item in pair),
    )


def _once(
    embedders: dict[str, Embedder], values: NDArray[Any], tower: Tower, workload: Workload
) -> tuple[Measurement, Measurement]:
    made = repeat_rows(values[:1])
    fits = replace(workload, repeats=_repeats(embedders[_REFERENCE], made(1), workload.repeats))
    candidates = [Candidate(name, embedders[name], made) for name in (_REFERENCE, _CANDIDATE)]
    theirs, mine = measure_interleaved(candidates, fits, part=tower, reference=_REFERENCE)
    return theirs, mine


def _repeats(embed: Embedder, values: NDArray[Any], most: int) -> int:
    """How many rounds fit into the time for them."""
    embed(values)
    began = time.perf_counter()
    embed(values)
    seconds = max(time.perf_counter() - began, 1e-9)
    return max(min(most, _FEWEST), min(most, int(_SECONDS / (2 * seconds))))


def _joined(intervals: Sequence[Interval]) -> Interval:
    return Interval(
        value=math.exp(float(np.mean([math.log(item.value) for item in intervals]))),
        low=min(item.low for item in intervals),
        high=max(item.high for item in intervals),
    )
