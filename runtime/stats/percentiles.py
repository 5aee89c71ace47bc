"""Order statistics: bounds of percentiles, and of the errors of predictions.

They hold for any distribution. A percentile's bounds are order statistics of the sample with exact
binomial ranks (David and Nagaraja, "Order Statistics", 2003, section 7.1). A prediction's error is
bounded by an order statistic of the errors of earlier predictions (split conformal prediction; Lei
et al., JASA 113, 2018), if the new case and the earlier ones are exchangeable.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.clusters import check_values
from edgeclip.runtime.stats.interval import Estimate

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class PercentileEstimate(Estimate):
    """A percentile with order statistics as bounds.

    Attributes:
        value: the percentile of the sample, median-unbiased (Hyndman and Fan 1996, method 8).
        ordered: the sample, ascending: float64 [N].
        percent: which percentile, 0 to 100.
        independent: number of independent values that tell as much as the sample.
        least, most: what no value can be below and above; the bounds that too small a sample has.
    """

    value: float
    ordered: Values
    percent: float
    independent: int
    least: float
    most: float

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; `least` where the sample is too small."""
        rank = _lower_rank(self.independent, self.percent, confidence)
        if rank == 0:
            return self.least
        place = math.floor((rank - 1) / self.independent * len(self.ordered) + _ROUNDING)
        return float(self.ordered[place])

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; `most` where the sample is too small."""
        rank = _lower_rank(self.independent, 100 - self.percent, confidence)  # from the other end
        if rank == 0:
            return self.most
        place = math.floor((rank - 1) / self.independent * len(self.ordered) + _ROUNDING)
        return float(self.ordered[len(self.ordered) - 1 - place])


def estimate_percentile(
    values: NDArray[Any],
    percent: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    independent: int | None = None,
) -> PercentileEstimate:
    """Estimate a percentile of values [N], of any unit.

    Args:
        values: numbers [N].
        percent: which percentile, 0 < percent < 100.
        least, most: bounds of all possible values, such as -1 and 1 for cosines.
        independent: how many independent values tell as much, where neighbours are alike; None for
            all.

    Raises:
        InputError: an empty array, another shape, NaN or infinity, or a percentile out of range.
    """
    (found,) = check_values(values)
    if not 0 < percent < 100:
        raise InputError(f"a percentile lies between 0 and 100, not at {percent}")
    return PercentileEstimate(
        value=float(np.percentile(found, percent, method="median_unbiased")),
        ordered=np.sort(found),
        percent=percent,
        independent=len(found) if independent is None else max(1, min(independent, len(found))),
        least=least,
        most=most,
    )


def least_count(percent: float, confidence: float) -> int:
    """Return from how many values on a percentile has a lower and an upper bound.

    Args:
        percent: which percentile, 0 < percent < 100.
        confidence: of each bound, in (0.5, 1); 0.975 for a 95% interval.
    """
    nearer = min(percent, 100 - percent) / 100
    return math.ceil(math.log1p(-confidence) / math.log1p(-nearer) - _ROUNDING)


@lru_cache(maxsize=4096)
def _lower_rank(count: int, percent: float, confidence: float) -> int:
    """Largest rank k, from 1, whose order statistic is below the percentile with `confidence`.

    At least k of the values lie at or below it: P(binomial(count, percent / 100) >= k). 0 if there
    is none.
    """
    share = percent / 100
    if count * math.log1p(-share) > math.log1p(-confidence) + _ROUNDING:
        return 0  # that no value at all lies below is too likely
    steps = np.arange(1, count + 1, dtype=np.float64)
    ratios = np.log(count + 1 - steps) - np.log(steps) + math.log(share) - math.log1p(-share)
    logs = np.concatenate([[0.0], np.cumsum(ratios)]) + count * math.log1p(-share)
    below = np.cumsum(np.exp(logs))  # P(binomial <= k)
    return int(np.searchsorted(below, 1 - confidence + _ROUNDING * (1 - confidence), "right"))


def conformal_bound(errors: NDArray[Any], level: float) -> float:
    """Return a bound that the next error keeps with probability `level`, in (0, 1).

    It is the ceil((N + 1) x level)-th smallest of the errors [N]; infinite where N is too small,
    that is where `level` is above `conformal_level`.

    Raises:
        InputError: NaN or infinity, or another shape.
    """
    if not np.size(errors):
        return math.inf
    (found,) = check_values(errors)
    rank = math.ceil((len(found) + 1) * level - _ROUNDING)
    return float(np.sort(found)[rank - 1]) if rank <= len(found) else math.inf


def conformal_level(count: int) -> float:
    """Return the highest level at which `count` errors bound the next one: their largest."""
    return count / (count + 1)
