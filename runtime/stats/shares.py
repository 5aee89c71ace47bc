"""Estimate shares of hits, losses between two models, and the share of one that another keeps.

Values are hits of items, from 0 to 1. Hits of two models are paired: item i of both is the same.
Items that are not independent, such as near-duplicates, are given as clusters; their spread is
then that between clusters (linearised ratio estimators; Cochran, "Sampling Techniques", 1977,
section 11.7), and Student's t takes the place of the normal distribution.

At the edge, where all hits are equal, a sample shows no spread at all. Wilson's interval (JASA
22, 1927) needs none. For pairs, half a pair is added for each of the four outcomes that a pair of
hits can have (Agresti and Min, "Simple improved confidence intervals for comparing matched
proportions", Statistics in Medicine 24, 2005).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.clusters import Clusters, check_shares, cluster_sums
from edgeclip.runtime.stats.interval import Estimate
from edgeclip.runtime.stats.student_t import normal_quantile, solve_fieller, student_t_quantile

_HALF = 0.5  # weight of each added observation
_ADDED = np.array([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])  # (reference, ours)


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
        return max(0.0, self._wilson(confidence, -1))

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; 1 at most."""
        return min(1.0, self._wilson(confidence, 1))

    def _wilson(self, confidence: float, side: int) -> float:
        z = _deviations(confidence, self.clusters)
        if math.isinf(z):
            return side * math.inf
        n, p = self.effective, self.value
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return (centre + side * half) / (1 + z * z / n)


def estimate_share(hits: NDArray[Any], clusters: Clusters | None = None) -> ShareEstimate:
    """Estimate the mean of hits.

    Values between 0 and 1, such as the mean over two directions, spread less than hits and
    misses, and values of clusters more: the count in Wilson's formula is divided by that ratio of
    variances (the design effect; Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015), for which half
    a hit and half a miss are added.

    Args:
        hits: values in [0, 1], booleans or floats [N].
        clusters: integers [N], equal for items that belong together; None for independent items.

    Raises:
        InputError: an empty array, another shape, or a value that is no share.
    """
    (values,) = check_shares(hits)
    sizes, (sums,) = cluster_sums(clusters, values)
    count, size = len(sizes), float(sizes.mean())
    total = size * (count + 2 * _HALF)
    share = (float(sums.sum()) + _HALF * size) / total
    squares = float(((sums - share * sizes) ** 2).sum())
    squares += _HALF * size**2 * (share**2 + (1 - share) ** 2)
    design_effect = squares / (total * share * (1 - share))
    return ShareEstimate(
        value=float(values.mean()),
        effective=len(values) / design_effect,
        clusters=None if clusters is None else count,
    )


@dataclass(frozen=True, slots=True)
class _PairMoments:
    """Moments of cluster sums of paired hits, with the half-pairs added.

    Attributes:
        means: of (reference, ours), a pair's.
        covariance: of these means [2, 2].
    """

    means: Values
    covariance: Values


def _pair_moments(reference: Values, ours: Values, clusters: Clusters | None) -> _PairMoments:
    sizes, sums = cluster_sums(clusters, reference, ours)
    size = float(sizes.mean())
    rows = np.concatenate([np.stack(sums, axis=1), size * _ADDED])
    sizes = np.concatenate([sizes, np.full(len(_ADDED), size)])
    weights = np.ones(len(rows))
    weights[-len(_ADDED) :] = _HALF
    total = float(weights @ sizes)
    means = (weights @ rows) / total
    residuals = rows - np.outer(sizes, means)
    covariance = (residuals * weights[:, None]).T @ residuals / total**2
    return _PairMoments(means, np.asarray(covariance))


@dataclass(frozen=True, slots=True)
class LossEstimate(Estimate):
    """A difference of paired means with Wald's bounds around the mean of pairs and half-pairs.

    Attributes:
        value: the difference of the sample.
        centre: the difference with half-pairs.
        error: its standard error.
        clusters: number of clusters; None where items are independent.
    """

    value: float
    centre: float
    error: float
    clusters: int | None

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; -1 at least."""
        return max(-1.0, self.centre - _deviations(confidence, self.clusters) * self.error)

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; 1 at most."""
        return min(1.0, self.centre + _deviations(confidence, self.clusters) * self.error)


def estimate_loss(
    reference: NDArray[Any], ours: NDArray[Any], clusters: Clusters | None = None
) -> LossEstimate:
    """Estimate mean(reference) - mean(ours), over hits of the same items.

    Args:
        reference, ours: values in [0, 1], booleans or floats [N].
        clusters: integers [N], equal for items that belong together; None for independent items.

    Raises:
        InputError: arrays that are empty, of other shapes or lengths, or values that are no shares.
    """
    theirs, mine = check_shares(reference, ours)
    found = _pair_moments(theirs, mine, clusters)
    sign = np.array([1.0, -1.0])
    return LossEstimate(
        value=float(theirs.mean() - mine.mean()),
        centre=float(sign @ found.means),
        error=math.sqrt(max(0.0, float(sign @ found.covariance @ sign))),
        clusters=None if clusters is None else len(np.unique(clusters)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class KeptEstimate(Estimate):
    """A ratio of paired means with Fieller's bounds, with half-pairs.

    Attributes:
        value: the ratio of the sample.
        moments: of the pairs and half-pairs.
        clusters: number of clusters; None where items are independent.
    """

    value: float
    moments: _PairMoments
    clusters: int | None

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`; 0 at least."""
        return max(0.0, self._ends(confidence)[0])

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`; infinite where the reference's mean is not surely above 0."""
        return self._ends(confidence)[1]

    def _ends(self, confidence: float) -> tuple[float, float]:
        (below, above), covariance = self.moments.means, self.moments.covariance
        deviations = _deviations(confidence, self.clusters)
        return solve_fieller(
            float(above),
            float(below),
            (float(covariance[1, 1]), float(covariance[0, 1]), float(covariance[0, 0])),
            deviations,
        )


def estimate_kept(
    ours: NDArray[Any], reference: NDArray[Any], clusters: Clusters | None = None
) -> KeptEstimate:
    """Estimate mean(ours) / mean(reference), over hits of the same items.

    Args:
        ours, reference: values in [0, 1], booleans or floats [N].
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
    return KeptEstimate(
        value=float(mine.mean() / theirs.mean()),
        moments=_pair_moments(theirs, mine, clusters),
        clusters=None if clusters is None else len(np.unique(clusters)),
    )
