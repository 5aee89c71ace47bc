"""RatioOfRuns: how many times slower one run was than another, and how surely."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.student_t import chance_below, quantile
from edgeclip.runtime.measuring.timing_statistics import ProcessSummary

_TAIL = 0.025  # beyond each end of a 95% interval
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioOfRuns:
    """The ratio of two typical medians, that of now to that of the baseline.

    Its logarithm has Student's distribution with Welch's degrees of freedom, for the spread
    between the processes of either side (Welch, Biometrika 34, 1947). As in
    `timing_statistics`, the runs within the processes set a floor to what is claimed.

    Attributes:
        value: the ratio; above 1 is slower.
        error: standard error of its logarithm by the spread between processes; None where a
            side has one process only.
        noise: the standard error that the runs within the processes explain.
        degrees: of freedom of `error`; None likewise.
    """

    value: float
    error: float | None
    noise: float
    degrees: float | None

    @property
    def interval(self) -> Interval:
        """The ratio with its 95% interval; one that is too narrow where `error` is None."""
        return Interval(self.value, self.at_least(1 - _TAIL), self.at_most(1 - _TAIL))

    def at_least(self, sureness: float) -> float:
        """The ratio that the true one exceeds, as sure as that, such as 0.95."""
        return self.value * math.exp(-self._margin(sureness))

    def at_most(self, sureness: float) -> float:
        """The ratio that the true one stays below, as sure as that."""
        return self.value * math.exp(self._margin(sureness))

    def chance(self, bound: float) -> float:
        """The chance of a ratio as high as this where the true one is `bound`, or less."""
        above = math.log(self.value / bound)
        within = 1 - _NORMAL.cdf(_over(above, self.noise))
        if self.error is None or self.degrees is None:
            return within
        return max(within, 1 - chance_below(_over(above, self.error), self.degrees))

    def _margin(self, sureness: float) -> float:
        within = _NORMAL.inv_cdf(sureness) * self.noise
        if self.error is None or self.degrees is None:
            return within
        return max(within, quantile(sureness, self.degrees) * self.error)


def ratio_of_runs(now: ProcessSummary, baseline: ProcessSummary) -> RatioOfRuns:
    """Compare two runs, each with the spread of its own processes."""
    error = degrees = None
    if now.spread is not None and baseline.spread is not None:
        error = math.hypot(*(_error(side.spread, side) for side in (now, baseline)))
        degrees = _welch(now, baseline)
    return RatioOfRuns(
        value=math.exp(now.mean - baseline.mean),
        error=error,
        noise=math.hypot(*(_error(side.noise, side) for side in (now, baseline))),
        degrees=degrees,
    )


def _error(spread: float | None, side: ProcessSummary) -> float:
    """Standard error of the mean of a side's processes that differ so much."""
    return (spread or 0.0) / math.sqrt(side.processes)


def _welch(now: ProcessSummary, baseline: ProcessSummary) -> float:
    """Degrees of freedom by the equation of Welch and Satterthwaite."""
    parts = [(_error(side.spread, side) ** 2, side.degrees) for side in (now, baseline)]
    below = sum(part**2 / degrees for part, degrees in parts)
    if below == 0:  # processes that agree to the last digit
        return float(sum(degrees for _, degrees in parts))
    return sum(part for part, _ in parts) ** 2 / below


def _over(above: float, error: float) -> float:
    """In standard errors."""
    if error == 0:
        return math.inf if above > 0 else -math.inf
    return above / error
