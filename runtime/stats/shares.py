"""Estimate shares of hits, losses between two models, and the share of one that another keeps.

Values are hits of items, from 0 to 1 (see `check_shares`). Hits of two models are paired: item i of
both is the same. Items that are not independent, such as near-duplicates, are given as clusters;
their spread is then that between clusters (linearised ratio estimators; Cochran, "Sampling
Techniques", 1977, section 11.7), and Student's t takes the place of the normal distribution.

At the edge, where nearly all hits are equal, a sample shows no spread. Wilson's interval (JASA
22, 1927) needs none; where fewer than four hits or misses were seen, that side's bound is exact
(Clopper and Pearson, Biometrika 26, 1934), as Wilson's is too near there (Brown, Cai and DasGupta,
Statistical Science 16, 2001, section 4.1.1). To pairs, z^2 / 2 are added in which only the one
model hits, and as many in which only the other does, as Agresti and Coull (The American
Statistician 52, 1998) add hits and misses to a share: with half a pair each (Agresti and Min,
Statistics in Medicine 24, 2005) a true loss of 2 points lies outside the 95% interval of 100 pairs
in 14% of the cases.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.clusters import Clusters, check_shares, cluster_sums, effective_count
from edgeclip.runtime.stats.interval import Estimate
from edgeclip.runtime.stats.student_t import normal_quantile, solve_fieller, student_t_quantile

_HALF = 0.5  # hits and misses that are added to find how much clusters spread
_FEW = 4  # hits or misses from which on Wilson's bounds are good enough
_ROUNDING = 1e-9
_ONE_SIDED = np.array([(1.0, 0.0, 1.0), (0.0, 1.0, 1.0)])  # (reference, ours, items) of added pairs


def _deviations(confidence: float, clusters: int | None) -> float:
    """How many standard errors a one-sided bound lies away; `clusters` is None for single items."""
    if clusters is None:
        return normal_quantile(confidence)
    return math.inf if clusters < 2 else student_t_quantile(confidence, clusters - 1)


@dataclass(frozen=True, slots=True)
class ShareEstimate(Estimate):
    """A share with Wilson's bounds.

    Attributes:
        value: the share.
        effective: number of independent hits or misses that tell as much as the sample.
        clusters: number of clusters; None where items are independent.
    """

    value: float
    effective: float
    clusters: int | None

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; 0 at least."""
        return self._least(self.value, confidence)

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; 1 at most."""
        return 1 - self._least(1 - self.value, confidence)

    def _least(self, share: float, confidence: float) -> float:
        """Lower bound of a share of hits, or of misses."""
        z, n = _deviations(confidence, self.clusters), self.effective
        if math.isinf(z):
            return 0.0
        centre = share + z * z / (2 * n)
        half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
        wilson = (centre - half) / (1 + z * z / n)
        if share * n < _FEW:
            wilson = min(wilson, _exact(share * n, n, confidence))
        return max(0.0, wilson)


def _exact(hits: float, count: float, confidence: float) -> float:
    """Lower bound of a share by Clopper and Pearson; between whole numbers it is interpolated."""
    below = math.floor(hits + _ROUNDING)
    low = _exact_of(below, count, confidence)
    if hits - below < _ROUNDING or below + 1 > count:
        return low
    return low + (hits - below) * (_exact_of(below + 1, count, confidence) - low)


@lru_cache(maxsize=4096)
def _exact_of(hits: int, count: float, confidence: float) -> float:
    """Solve P(binomial(count, share) >= hits) = 1 - confidence for the share, by bisection."""
    low, high = 0.0, min(1.0, hits / count)
    ways = [_choose(count, k) for k in range(hits)]
    for _ in range(50):
        share = (low + high) / 2
        fewer = sum(way * share**k * (1 - share) ** (count - k) for k, way in enumerate(ways))
        low, high = (share, high) if fewer > confidence else (low, share)
    return low


def _choose(count: float, chosen: int) -> float:
    return math.prod((count - k) / (k + 1) for k in range(chosen))


def estimate_share(hits: NDArray[Any], clusters: Clusters | None = None) -> ShareEstimate:
    """Estimate the mean of hits.

    Values between 0 and 1, such as the mean over two directions, spread less than hits and
    misses, and values of clusters more: the count in Wilson's formula is divided by that ratio of
    variances (the design effect; Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015), for which half
    a hit and half a miss are added.

    Args:
        hits: hits, booleans or floats [N].
        clusters: integers [N], equal for items that belong together; None for independent items.

    Raises:
        InputError: an empty array, another shape, or values that are no hits.
    """
    (values,) = check_shares(hits)
    sizes, (sums,) = cluster_sums(clusters, values)
    size = float((sizes**2).sum() / sizes.sum())  # of the cluster of an item, not of a cluster
    total = float(sizes.sum()) + 2 * _HALF * size
    share = (float(sums.sum()) + _HALF * size) / total
    squares = float(((sums - share * sizes) ** 2).sum())
    squares += _HALF * size**2 * (share**2 + (1 - share) ** 2)
    design_effect = squares / (total * share * (1 - share))
    effective = len(values) / design_effect
    if clusters is None:
        return ShareEstimate(float(values.mean()), effective, None)
    return ShareEstimate(float(values.mean()), min(effective, effective_count(sizes)), len(sizes))


@dataclass(frozen=True, slots=True, eq=False)
class PairSums:
    """Sums over clusters of (reference's hits, our hits, items), from which all bounds follow.

    Attributes:
        first: sum of the three [3].
        second: sum of their products [3, 3].
        clusters: number of clusters; None where items are independent.
    """

    first: Values
    second: Values
    clusters: int | None

    @classmethod
    def of(cls, reference: Values, ours: Values, clusters: Clusters | None) -> "PairSums":
        """Sum the hits of pairs [N]."""
        sizes, sums = cluster_sums(clusters, reference, ours)
        rows = np.stack([*sums, sizes], axis=1)
        count = None if clusters is None else len(sizes)
        return cls(rows.sum(axis=0), rows.T @ rows, count)

    def deviations(self, confidence: float) -> float:
        """How many standard errors a one-sided bound lies away."""
        return _deviations(confidence, self.clusters)

    def moments(self, confidence: float) -> tuple[Values, Values]:
        """Return the means of (reference, ours) [2] with the added pairs, and their covariance."""
        weight = normal_quantile(confidence) ** 2 / 2
        # As large as the cluster of a mean item: large clusters are rare, and tell most.
        added = _ONE_SIDED * float(self.second[2, 2] / self.first[2])
        first = self.first + weight * added.sum(axis=0)
        second = self.second + weight * added.T @ added
        means = first[:2] / first[2]
        of_residuals = np.column_stack([np.eye(2), -means])
        covariance: Values = of_residuals @ second @ of_residuals.T / first[2] ** 2
        return means, covariance


@dataclass(frozen=True, slots=True, eq=False)
class LossEstimate(Estimate):
    """A difference of paired means with Wald's bounds around that of pairs and added pairs.

    Attributes:
        value: the difference of the sample.
        sums: of the pairs.
    """

    value: float
    sums: PairSums

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; -1 at least."""
        centre, margin = self._wald(confidence)
        return max(-1.0, centre - margin)

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; 1 at most."""
        centre, margin = self._wald(confidence)
        return min(1.0, centre + margin)

    def _wald(self, confidence: float) -> tuple[float, float]:
        means, covariance = self.sums.moments(confidence)
        variance = covariance[0, 0] - 2 * covariance[0, 1] + covariance[1, 1]
        margin = self.sums.deviations(confidence) * math.sqrt(max(0.0, float(variance)))
        return float(means[0] - means[1]), margin


def estimate_loss(
    reference: NDArray[Any], ours: NDArray[Any], clusters: Clusters | None = None
) -> LossEstimate:
    """Estimate mean(reference) - mean(ours), over hits of the same items.

    Args:
        reference, ours: hits, booleans or floats [N].
        clusters: integers [N], equal for items that belong together; None for independent items.

    Raises:
        InputError: arrays that are empty, of other shapes or lengths, or values that are no hits.
    """
    theirs, mine = check_shares(reference, ours)
    value = float(theirs.mean() - mine.mean())
    return LossEstimate(value, PairSums.of(theirs, mine, clusters))


@dataclass(frozen=True, slots=True, eq=False)
class KeptEstimate(Estimate):
    """A ratio of paired means with Fieller's bounds, of pairs and added pairs.

    Attributes:
        value: the ratio of the sample.
        sums: of the pairs.
    """

    value: float
    sums: PairSums

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; 0 at least."""
        return max(0.0, self._fieller(confidence)[0])

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; infinite where the reference's mean is not surely above 0."""
        return self._fieller(confidence)[1]

    def _fieller(self, confidence: float) -> tuple[float, float]:
        (below, above), found = self.sums.moments(confidence)
        variances = (float(found[1, 1]), float(found[0, 1]), float(found[0, 0]))
        return solve_fieller(
            float(above), float(below), variances, self.sums.deviations(confidence)
        )


def estimate_kept(
    ours: NDArray[Any], reference: NDArray[Any], clusters: Clusters | None = None
) -> KeptEstimate:
    """Estimate mean(ours) / mean(reference), over hits of the same items.

    Args:
        ours, reference: hits, booleans or floats [N].
        clusters: integers [N], equal for items that belong together; None for independent items.

    Raises:
        InputError: as `estimate_loss`, or the reference has no hit at all.
    """
    mine, theirs = check_shares(ours, reference)
    if not theirs.any():
        raise InputError(
            "the reference has no hit, so no share of it can be kept: give it items that it can "
            "answer"
        )
    value = float(mine.mean() / theirs.mean())
    return KeptEstimate(value, PairSums.of(theirs, mine, clusters))
