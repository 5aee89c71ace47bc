"""How much more to measure where a regression gate could not decide."""

import math

from edgeclip.runtime.comparing.compare_runs import Comparison
from edgeclip.runtime.comparing.ratio_of_runs import RatioOfRuns
from edgeclip.runtime.measuring.student_t import quantile

_MOST_PROCESSES = 50  # in each run; more are not worth the time
_MOST_REPEATS = 20  # times those of now


def what_would_decide(comparison: Comparison, max_regression: float, sureness: float) -> str:
    """One sentence that says how many processes, or repeats, would decide.

    Noise comes first: what is measured should tell a slowdown of nothing from one of twice what
    is tolerated. Where it does, the true change lies near the bound, and the distance from there
    counts that was seen.

    Args:
        comparison: what could not be decided.
        max_regression: the slowdown that is tolerated, 0.05 for 5%.
        sureness: that the gate demands of each evidence, such as 0.975.
    """
    if comparison.ratio.error is None:
        return "one process tells nothing of others: measure both runs with 5 processes or more"
    bound = math.log1p(max_regression)
    goal = f"would tell {200 * max_regression:.3g}% slower from no slower"
    advice = _more(comparison, bound, sureness, f"too noisy: {{}} {goal}")
    if advice is None:
        near = "the change lies near the bound: {} would decide, if it is what it seems"
        distance = abs(math.log(_sharpest(comparison).value) - bound)
        advice = _more(comparison, distance, sureness, near)
    return advice or "a little more of the same would decide"


def _more(comparison: Comparison, distance: float, sureness: float, words: str) -> str | None:
    """What has to be added to see that distance; None if there is enough of everything."""
    have = min(comparison.processes)
    processes = _processes(comparison, distance, sureness)
    if processes is not None and processes <= have:
        return None
    repeats = _repeats(comparison, distance, sureness)
    ways = []
    if processes is not None:
        ways.append(f"{processes} processes in each run ({have} now)")
    if repeats is not None:
        ways.append(f"{repeats} repeats in each process ({comparison.rounds} now)")
    if ways:
        return words.format(f"about {' or '.join(ways)}")
    return words.format(f"not even {_MOST_PROCESSES} processes in each run ({have} now)")


def _processes(comparison: Comparison, distance: float, sureness: float) -> int | None:
    """The fewest in each run that see that distance with a chance of `sureness`, if any."""
    error = (_sharpest(comparison).error or 0.0) * math.sqrt(_mean_count(comparison))
    for count in range(2, _MOST_PROCESSES + 1):
        # Two margins: one for the evidence, one that it is there when it should be.
        if 2 * quantile(sureness, 2 * (count - 1)) * error / math.sqrt(count) <= distance:
            return count
    return None


def _repeats(comparison: Comparison, distance: float, sureness: float) -> int | None:
    """The fewest runs in each of the same processes that do so too, if any."""
    ratio = _sharpest(comparison)
    margin = 2 * quantile(sureness, ratio.degrees or 1.0)
    between = max(0.0, (ratio.error or 0.0) ** 2 - ratio.noise**2)
    left = (distance / margin) ** 2 - between
    times = ratio.noise**2 / left if left > 0 else math.inf
    return math.ceil(times * comparison.rounds) if 1 < times <= _MOST_REPEATS else None


def _sharpest(comparison: Comparison) -> RatioOfRuns:
    """The evidence that says most."""
    return min(comparison.evidence, key=lambda ratio: ratio.error or 0.0)


def _mean_count(comparison: Comparison) -> float:
    """The harmonic mean of both runs' processes, which is what counts for the error."""
    now, baseline = comparison.processes
    return 2 / (1 / now + 1 / baseline)
