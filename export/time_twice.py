"""Graphs timed on this machine in turns, twice: with engines loaded anew in both orders.

Of two engines with the same graph one can be some percent faster for as long as they live, by
where their memory lies, most often the one loaded later.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from edgeclip.profiles.workload import Workload
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.interleave import Candidate, measure_interleaved, repeat_rows
from edgeclip.runtime.measuring.measurement import Measurement
from edgeclip.runtime.spec import Tower

_SECONDS = 2.0  # for the timed runs of one of the two measurements, were both as slow
_FEWEST = 12  # runs, however slow a tower is

Run = Callable[[NDArray[Any]], object]
Opener = Callable[[], Run]


@dataclass(frozen=True, slots=True)
class Timed:
    """One measurement of both."""

    reference: Measurement
    candidate: Measurement

    @property
    def ratio(self) -> Interval:
        """The candidate's time to the reference's, over paired runs."""
        assert self.candidate.ratio is not None
        return self.candidate.ratio.ratio


def time_twice(
    reference: Opener,
    candidate: Opener,
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload,
) -> tuple[Timed, ...]:
    """Time two in turns; for arguments and errors see `time_each_twice`."""
    return time_each_twice(reference, [candidate], values, tower=tower, workload=workload)[0]


def time_each_twice(
    reference: Opener,
    candidates: Sequence[Opener],
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload,
    seconds: float = _SECONDS,
) -> list[tuple[Timed, ...]]:
    """Time all in turns: with engines loaded in this order, the reference's first, and backwards.

    Args:
        reference, candidates: open an engine; what they return runs a batch.
        values: some of the tower's inputs [N, ...]; the first is what is timed.
        tower: which one it is.
        workload: how much to measure; slow towers are run less often.
        seconds: for the reference and one candidate as slow, in one of the two measurements.

    Returns:
        Both measurements of each candidate.

    Raises:
        EngineError: an engine fails.
    """
    openers = (reference, *candidates)
    found: list[list[Timed]] = [[] for _ in candidates]
    for order in (range(len(openers)), range(len(openers))[::-1]):
        first, *others = _in_turns(openers, order, values, tower, workload, seconds)
        for timed, other in zip(found, others, strict=True):
            timed.append(Timed(first, other))
    return [tuple(timed) for timed in found]


def _in_turns(
    openers: Sequence[Opener],
    order: Sequence[int],
    values: NDArray[Any],
    tower: Tower,
    workload: Workload,
    seconds: float,
) -> tuple[Measurement, ...]:
    """Load engines in an order and time them; measurements in the order of `openers`."""
    runs, make_batch = {at: openers[at]() for at in order}, repeat_rows(values[:1])
    repeats = _repeats(runs[0], make_batch(1), workload.repeats, seconds)
    candidates = [Candidate(str(at), runs[at], make_batch) for at in range(len(openers))]
    fits = replace(workload, repeats=repeats)
    return measure_interleaved(candidates, fits, part=tower, reference=candidates[0].name)


def _repeats(run: Run, values: NDArray[Any], most: int, seconds: float) -> int:
    """How many rounds fit into the time for them."""
    run(values)
    began = time.perf_counter()
    run(values)
    each = max(time.perf_counter() - began, 1e-9)
    return max(min(most, _FEWEST), min(most, int(seconds / (2 * each))))
