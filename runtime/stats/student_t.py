"""Student's t: its distribution, and estimates of means and of ratios of means that rest on it.

The values must be independent: runs of different processes or loads, not runs of one process,
and best divided by a yardstick measured in the same minute.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.clusters import Clusters, check_values, cluster_sums
from edgeclip.runtime.stats.interval import Estimate

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class MeanEstimate(Estimate):
    """A mean with Student's t bounds.

    Attributes:
        value: the mean.
        error: its standard error; infinite for a single value.
        degrees: degrees of freedom of `error`.
        least, most: what no mean can be below and above, the bounds that a single value has.
    """

    value: float
    error: float
    degrees: int
    least: float = -math.inf
    most: float = math.inf

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`."""
        return max(self.least, self.value - self._margin(confidence))

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`."""
        return min(self.most, self.value + self._margin(confidence))

    def _margin(self, confidence: float) -> float:
        if self.degrees < 1:
            return math.inf
        return student_t_quantile(confidence, self.degrees) * self.error


def estimate_mean(
    values: NDArray[Any],
    clusters: Clusters | None = None,
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> MeanEstimate:
    """Estimate the mean of values [N], of any unit.

    Its level is that of a sum that is nearly normal: of values of which one in a thousand is far
    away, samples that missed these have bounds that are too narrow.

    Args:
        values: numbers [N].
        clusters: integers [N], equal for items that belong together; None for independent items.
        least, most: bounds of all possible values, such as -1 and 1 for cosines.

    Raises:
        InputError: an empty array, another shape, NaN or infinity.
    """
    (found,) = check_values(values)
    sizes, (sums,) = cluster_sums(clusters, found)
    mean, count = float(found.mean()), len(sizes)
    if count < 2:
        return MeanEstimate(mean, math.inf, 0, least, most)
    squares = float(((sums - mean * sizes) ** 2).sum())
    error = math.sqrt(squares * count / (count - 1)) / len(found)
    return MeanEstimate(mean, error, count - 1, least, most)


@dataclass(frozen=True, slots=True)
class MeanRatioEstimate(Estimate):
    """A ratio of paired means with Fieller's bounds.

    Attributes:
        value: the ratio.
        means: of values and reference.
        variances: of the mean of the values, covariance of both means, variance of the
            reference's.
        degrees: degrees of freedom of `variances`.
    """

    value: float
    means: tuple[float, float]
    variances: tuple[float, float, float]
    degrees: int

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; 0 at least."""
        return max(0.0, self._ends(confidence)[0])

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; infinite where the reference's mean is not surely above 0."""
        return self._ends(confidence)[1]

    def _ends(self, confidence: float) -> tuple[float, float]:
        if self.degrees < 1:
            return 0.0, math.inf
        t = student_t_quantile(confidence, self.degrees)
        return solve_fieller(*self.means, self.variances, t)


def estimate_mean_ratio(values: NDArray[Any], reference: NDArray[Any]) -> MeanRatioEstimate:
    """Estimate mean(values) / mean(reference) of positive values of the same items [N].

    Raises:
        InputError: arrays that are empty, of other shapes or lengths, or a value below 0, or a
            reference that is 0 throughout.
    """
    above, below = check_values(values, reference)
    if min(above.min(), below.min()) < 0 or not below.any():
        raise InputError("a ratio needs values of 0 or more, and a reference that is not always 0")
    count = len(above)
    variances = (0.0, 0.0, 0.0)
    if count > 1:
        covariance = np.cov(above, below) / count
        variances = (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))
    means = (float(above.mean()), float(below.mean()))
    return MeanRatioEstimate(means[0] / means[1], means, variances, count - 1)


def solve_fieller(
    above: float, below: float, variances: tuple[float, float, float], deviations: float
) -> tuple[float, float]:
    """Return the ends of Fieller's set for above / below: (0, infinity) where it is unbounded.

    The set holds each ratio r for which above - r x below is within `deviations` of its standard
    errors (Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16, 1954).

    Args:
        above, below: two means.
        variances: variance of `above`, covariance of both, variance of `below`.
        deviations: of the standard error.
    """
    square = deviations**2
    if not below**2 > square * variances[2]:
        return 0.0, math.inf
    leading = below**2 - square * variances[2]
    middle = above * below - square * variances[1]
    last = above**2 - square * variances[0]
    root = math.sqrt(max(0.0, middle**2 - leading * last))
    return (middle - root) / leading, (middle + root) / leading


@lru_cache(maxsize=1024)
def normal_quantile(chance: float) -> float:
    """Quantile function of the standard normal distribution; `chance` in (0, 1)."""
    return _NORMAL.inv_cdf(chance)


# Student's t distribution, with x = tan(angle) * sqrt(degrees): its density over the angle is
# proportional to cos(angle) ** (degrees - 1), which Gauss-Legendre quadrature integrates exactly
# enough. It spares the runtime a dependency on SciPy.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_MAX_STEPS, _TOLERANCE = 100, 1e-13  # of Newton's method, which takes about ten steps


@lru_cache(maxsize=1024)
def student_t_quantile(chance: float, degrees: float) -> float:
    """Quantile function of Student's t; `chance` in (0, 1), `degrees` of freedom at least 1."""
    if chance < 0.5:
        return -student_t_quantile(1 - chance, degrees)
    angle = 0.0
    for _ in range(_MAX_STEPS):  # the distribution function is concave here: no overshoot
        step = (chance - _cdf_of_angle(angle, degrees)) / _density_of_angle(angle, degrees)
        angle += step
        if abs(step) < _TOLERANCE:
            break
    return math.sqrt(degrees) * math.tan(angle)


def _cdf_of_angle(angle: float, degrees: float) -> float:
    heights = np.cos(angle * (_NODES + 1) / 2) ** (degrees - 1)
    return 0.5 + _density_of_angle(0.0, degrees) * angle / 2 * float(_WEIGHTS @ heights)


def _density_of_angle(angle: float, degrees: float) -> float:
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    return float(scale / math.sqrt(math.pi) * math.cos(angle) ** (degrees - 1))
