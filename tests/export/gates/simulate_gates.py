"""Simulate gates on drawn hits whose true loss is known, with the product's own judgement."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.gates.gates import Gate, MeasuredGate, judge_gates
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.stats.shares import estimate_loss
from edgeclip.runtime.stats.student_t import estimate_mean
from edgeclip.runtime.stats.three_outcomes import Outcome

Ids = NDArray[np.int64]
GATE = Gate("R@1 loss", "<=", 1.0, "points")
_FOUND = 0.95  # share that the reference finds


def draw_hits(
    rng: np.random.Generator, count: int, loss: float, churn: float
) -> tuple[Values, Values]:
    """Hits of a reference and a candidate [count] that loses `loss` and changes `churn` of them."""
    lost, gained = (churn + loss) / 2, (churn - loss) / 2
    reference = rng.random(count) < _FOUND
    rate = np.where(reference, lost / _FOUND, gained / (1 - _FOUND))
    return reference.astype(float), (reference ^ (rng.random(count) < rate)).astype(float)


def judge_loss(reference: Values, candidate: Values, looks: int = 1) -> GateRecord:
    """Judge the loss of R@1 against a bound of one point."""
    estimate = estimate_loss(reference, candidate)
    (record,) = judge_gates([MeasuredGate(gate=GATE, estimate=estimate, scale=100)], looks)
    return record


def outcome_shares(
    count: int, loss: float, churn: float, repetitions: int, seed: int = 0
) -> dict[Outcome, float]:
    """Share of each outcome of candidates that truly lose `loss`."""
    rng = np.random.default_rng(seed)
    found = Counter(
        judge_loss(*draw_hits(rng, count, loss, churn)).outcome for _ in range(repetitions)
    )
    outcomes: tuple[Outcome, ...] = ("passed", "failed", "undecided")
    return {outcome: found[outcome] / repetitions for outcome in outcomes}


def passes_after_raising(
    counts: Sequence[int], loss: float, churn: float, repetitions: int, *, declared: bool
) -> float:
    """Share of candidates that pass at some count when it is raised until they do.

    `declared` tells whether the number of looks is declared.
    """
    looks = len(counts) if declared else 1
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(repetitions):
        reference, candidate = draw_hits(rng, max(counts), loss, churn)
        passed += any(judge_loss(reference[:n], candidate[:n], looks).passed for n in counts)
    return passed / repetitions


def passes_in_looks(count: int, loss: float, churn: float, repetitions: int, looks: int) -> float:
    """Share of searches of which some of `looks` equal candidates passes on the same pairs."""
    rng = np.random.default_rng(2)
    passed = 0
    for _ in range(repetitions):
        reference = draw_hits(rng, count, 0.0, 0.0)[0]
        candidates = []
        for _ in range(looks):
            lost, gained = (churn + loss) / 2, (churn - loss) / 2
            rate = np.where(reference > 0, lost / _FOUND, gained / (1 - _FOUND))
            candidates.append(np.abs(reference - (rng.random(count) < rate)))
        passed += any(judge_loss(reference, item, looks).passed for item in candidates)
    return passed / repetitions


def clustered_passes(
    clusters: int, size: int, loss: float, churn: float, repetitions: int, *, declared: bool
) -> float:
    """Share that passes where `size` near-duplicates have the same hits."""
    return _grouped_passes(lambda _: np.full(clusters, size), loss, churn, repetitions, declared)


def burst_passes(
    groups: int, bursts: float, size: int, loss: float, churn: float, repetitions: int
) -> float:
    """Share that passes where a share `bursts` of single pictures are bursts of `size` instead."""

    def sizes(rng: np.random.Generator) -> Ids:
        return np.where(rng.random(groups) < bursts, size, 1)

    return _grouped_passes(sizes, loss, churn, repetitions, declared=True)


def _grouped_passes(
    sizes_of: Callable[[np.random.Generator], Ids],
    loss: float,
    churn: float,
    repetitions: int,
    declared: bool,
) -> float:
    rng = np.random.default_rng(3)
    passed = 0
    for _ in range(repetitions):
        sizes = sizes_of(rng)
        reference, candidate = (
            np.repeat(item, sizes) for item in draw_hits(rng, len(sizes), loss, churn)
        )
        ids = np.repeat(np.arange(len(sizes)), sizes) if declared else None
        estimate = estimate_loss(reference, candidate, ids)
        (record,) = judge_gates([MeasuredGate(gate=GATE, estimate=estimate, scale=100)])
        passed += record.passed
    return passed / repetitions


def mean_cosine_passes(count: int, collapsed: float, value: float, repetitions: int) -> float:
    """Share that passes a bound of the mean cosine that it misses by a hair.

    A share `collapsed` of the cosines is `value`, all others are as high as the miss asks for.
    """
    bound = 0.995
    others = (bound - 1e-4 - collapsed * value) / (1 - collapsed)
    gate, rng = Gate("mean cosine", ">=", bound, "cosine"), np.random.default_rng(4)
    passed = 0
    for _ in range(repetitions):
        cosines = np.where(rng.random(count) < collapsed, value, others)
        estimate = estimate_mean(cosines + rng.normal(0, 1e-5, count), least=-1.0, most=1.0)
        (record,) = judge_gates([MeasuredGate(gate=gate, estimate=estimate)])
        passed += record.passed
    return passed / repetitions
