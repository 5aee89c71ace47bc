"""Certify a cascade: choose a threshold by fixed-sequence testing on labelled queries."""

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgeclip.compress.data.clusters import ASSUMED, ClusterBy
from edgeclip.export.cascade.cascade_eval_set import CascadeEvalSet
from edgeclip.export.cascade.cascade_evaluator import CascadeEvaluator, IndexBy
from edgeclip.export.cascade.ledger import Group, Hypothesis, Turn, item_hashes, take_turn
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    Certificate,
    PairedOutcomes,
    Quality,
    QuerySet,
    TowerIdentity,
    needs_teacher,
    threshold_grid,
)
from edgeclip.runtime.cascade.drift import WATCHED_ERROR, WatchedShare
from edgeclip.runtime.cascade.scores import Score
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.betting import betting_p_value
from edgeclip.runtime.stats.clusters import Clusters
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share

_log = logging.getLogger(__name__)

_WATCHED = (0.25, 0.5, 0.75)  # quantiles of the scores


def fixed_sequence_test(p_values: Iterable[float], delta: float) -> int:
    """Count the rejected hypotheses: those before the first whose p-value is above `delta`.

    Later p-values are not computed.
    """
    rejected = 0
    for p_value in p_values:
        if p_value > delta:
            break
        rejected += 1
    return rejected


@dataclass(frozen=True, slots=True)
class CertifiedThreshold:
    """The lowest certified threshold, its p-value, and how many thresholds were certified."""

    threshold: float
    p_value: float
    certified: int


def choose_threshold(
    outcomes: PairedOutcomes,
    grid: Sequence[float],
    *,
    bound: float,
    delta: float,
    order: Sequence[int] | None = None,
) -> CertifiedThreshold | None:
    """Choose the lowest certified threshold by fixed-sequence testing; None if there is none.

    One bet is made on each cluster: on the sum of its surplus over the size of the largest one,
    so that the promise is one of queries, not of clusters.

    Args:
        outcomes: answers to queries that `grid` was not made from.
        grid: thresholds from the one that escalates most to the one that escalates least, as
            `threshold_grid` makes them.
        bound: the share of the teacher's quality to certify, in (0, 1].
        delta: the chance of a wrong certificate that is accepted, in (0, 1).
        order: the clusters in the order of the bets, as positions among the sorted ids of
            `outcomes.clusters`; by default as they come. It must not depend on the outcomes.
    """
    ids = np.arange(len(outcomes)) if outcomes.clusters is None else outcomes.clusters
    distinct, which, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    places = np.arange(len(distinct)) if order is None else np.asarray(order, dtype=np.int64)
    largest = sizes.max()
    found: list[float] = []

    def tested() -> Iterable[float]:
        for threshold in grid:
            sums = np.bincount(which, outcomes.surplus(threshold, bound)) / largest
            found.append(betting_p_value(sums[places], -bound))
            yield found[-1]

    certified = fixed_sequence_test(tested(), delta)
    if certified == 0:
        return None
    return CertifiedThreshold(grid[certified - 1], found[certified - 1], certified)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CascadePlan:
    """Student, teacher, queries and the promise to certify.

    Attributes:
        student: the encoder on the device.
        teacher: the encoder on the server, in the same embedding space.
        eval_set: the labelled queries.
        score: the confidence score of the student's answers.
        bound: the share of the teacher's quality to keep.
        delta: the accepted chance of a wrong certificate.
        index_by: which encoder embeds the entries.
        cluster_by: how queries that depend on each other are found.
        ledger: file that keeps which hypotheses were tried; None for none, so that the promise is
            one of a single try.
        command: the command line, for the record.

    Raises:
        InputError: bound or delta out of range, or student and teacher are the same tower, so
            that asking the teacher changes no answer.
    """

    student: Encoder
    teacher: Encoder
    eval_set: CascadeEvalSet
    score: Score
    bound: float = 0.95
    delta: float = 0.05
    index_by: IndexBy = "teacher"
    cluster_by: ClusterBy = "none"
    ledger: Path | None = None
    command: str

    def __post_init__(self) -> None:
        if not (0 < self.bound <= 1 and 0 < self.delta < 1):
            raise InputError(
                f"need 0 < share <= 1 and 0 < delta < 1, got {self.bound:g} and {self.delta:g}"
            )
        self._refuse_own_teacher()

    def _refuse_own_teacher(self) -> None:
        """Refuse a teacher that is the student itself: its certificate would never escalate."""
        query, both = self.eval_set.query, (self.student, self.teacher)
        if not all(encoder.bundle.manifest.has(query) for encoder in both):
            return  # the evaluator reports the missing tower
        student, teacher = (_identity(encoder, query) for encoder in both)
        if student.hashes == teacher.hashes:
            raise InputError(
                f"the teacher {self.teacher.bundle.path} has the {query} tower of its student in "
                f"{student.precision}, so it would change no answer: name the bundle of a larger "
                "model as the teacher"
            )

    def evaluator(self) -> CascadeEvaluator:
        """Make the evaluator of this plan.

        Raises:
            SpaceMismatchError: student and teacher are of different embedding spaces.
            InputError: the score is not defined for such queries.
        """
        return CascadeEvaluator(
            self.student, self.teacher, self.eval_set, self.score, index_by=self.index_by
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertificationResult:
    """The outcomes on the test queries, the tested thresholds, and the certificate.

    Attributes:
        outcomes: the answers of student and teacher to the test queries.
        grid: the thresholds, from the one that escalates most to the one that escalates least.
        chosen: the lowest certified threshold; None if none is certified.
        turn: which part of delta the try had, and why.
        tested_at: that part.
        certificate: the certificate of `chosen`; None if every query would have to be escalated.
    """

    outcomes: PairedOutcomes
    grid: tuple[float, ...]
    chosen: CertifiedThreshold | None
    turn: Turn
    tested_at: float
    certificate: Certificate | None

    @property
    def count(self) -> int:
        """The number of certified thresholds, from the start of the grid."""
        return 0 if self.chosen is None else self.chosen.certified


def certify(
    plan: CascadePlan,
    evaluator: CascadeEvaluator | None = None,
) -> CertificationResult:
    """Evaluate student and teacher, and certify the lowest threshold that keeps the bound.

    Args:
        plan: student, teacher, queries and the promise.
        evaluator: the plan's evaluator, if the caller has made it already.

    Raises:
        SpaceMismatchError: student and teacher are of different embedding spaces.
        InputError: a picture cannot be read, the score does not fit the queries, or the
            teacher has no answer right.
        EngineError: a tower cannot be run.
    """
    evaluator, eval_set = evaluator or plan.evaluator(), plan.eval_set
    _log.info("asking the student about %s ...", eval_set.calibration.name)
    calibration = evaluator.scores(eval_set.calibration)
    grid = threshold_grid(calibration)
    clusters = evaluator.clusters(eval_set.test, plan.cluster_by)
    groups = _groups(item_hashes(eval_set.test), clusters)
    if len(groups) < 2:
        raise InputError(
            f"all queries of {eval_set.test.name} belong together by {plan.cluster_by}, so they "
            "are one observation: give pictures of more, or another --cluster-by"
        )
    # Before the outcomes: a try that was stopped halfway has been seen as well.
    turn = take_turn(plan.ledger, _hypothesis(plan, evaluator, groups), groups)
    tested_at = turn.part_of(plan.delta)
    _log.info("asking student and teacher about %s ...", eval_set.test.name)
    outcomes = evaluator.paired_outcomes(eval_set.test, clusters)
    if not outcomes.teacher.any():
        raise InputError("the teacher has no answer right: give it queries that it can answer")
    _log.info("testing %d thresholds ...", len(grid))
    chosen = choose_threshold(outcomes, grid, bound=plan.bound, delta=tested_at, order=turn.order)
    certificate = None
    if chosen is not None and chosen.threshold < ESCALATE_ALL:
        watched = watched_shares(calibration, outcomes.scores, clusters)
        differs = disagreement(outcomes, chosen.threshold, len(grid))
        certificate = _certificate(plan, evaluator, outcomes, (watched, differs), chosen, turn)
    return CertificationResult(
        outcomes=outcomes,
        grid=grid,
        chosen=chosen,
        turn=turn,
        tested_at=tested_at,
        certificate=certificate,
    )


def watched_shares(
    calibration: Values, scores: Values, clusters: Clusters | None = None
) -> tuple[WatchedShare, ...]:
    """Return the shares of low scores that a device watches, below quartiles of `calibration`.

    These marks do not depend on the test, so that any interval misses its share with probability
    half of `WATCHED_ERROR` at most, divided evenly between all ends (Bonferroni).

    Args:
        calibration: scores of other queries of the same population, [M].
        scores: of the test queries, [N].
        clusters: of the test queries, int64 [N]; None where all are independent.
    """
    marks = np.unique(np.quantile(calibration, _WATCHED)).tolist()
    confidence = 1 - WATCHED_ERROR / 2 / (2 * len(marks))
    found = []
    for mark in marks:
        share = estimate_share(needs_teacher(scores, mark), clusters)
        found.append(WatchedShare(below=mark, share=share.interval_at(confidence)))
    return tuple(found)


def disagreement(outcomes: PairedOutcomes, threshold: float, tried: int) -> Interval | None:
    """Return the share of queries answered alone whose first entry is not the teacher's.

    Its upper end is below the true share with half of `WATCHED_ERROR` at most, whichever of the
    `tried` thresholds was chosen (Bonferroni). None where no query is answered alone, or which
    entries came first is not known.
    """
    alone = ~needs_teacher(outcomes.scores, threshold)
    if outcomes.agree is None or not alone.any():
        return None
    clusters = None if outcomes.clusters is None else outcomes.clusters[alone]
    found = estimate_share(~outcomes.agree[alone], clusters)
    return found.interval_at(1 - WATCHED_ERROR / 2 / tried)


def _groups(items: Sequence[str], clusters: Clusters | None) -> tuple[Group, ...]:
    """Return the items of each cluster, sorted, the clusters in the order of their ids."""
    if clusters is None:
        return tuple((item,) for item in items)
    found: dict[int, list[str]] = {number: [] for number in sorted(set(clusters.tolist()))}
    for item, number in zip(items, clusters.tolist(), strict=True):
        found[number].append(item)
    return tuple(tuple(sorted(group)) for group in found.values())


def _hypothesis(
    plan: CascadePlan, evaluator: CascadeEvaluator, groups: Sequence[Group]
) -> Hypothesis:
    eval_set = plan.eval_set
    student = _identity(plan.student, eval_set.query)
    entries = f"{evaluator.embedder} {eval_set.entries_identity}"
    return Hypothesis(
        student=student.hashes,
        teacher=_identity(plan.teacher, eval_set.query).hashes,
        precision=student.precision,
        query=eval_set.query,
        task=eval_set.task,
        index_by=plan.index_by,
        score=plan.score,
        bound=plan.bound,
        entries=hashlib.sha256(entries.encode()).hexdigest(),
        grid=hashlib.sha256(eval_set.calibration.identity.encode()).hexdigest(),
        cluster_by=plan.cluster_by,
        largest=max(map(len, groups)),
        size=plan.student.spec.image.size,
    )


def _certificate(
    plan: CascadePlan,
    evaluator: CascadeEvaluator,
    outcomes: PairedOutcomes,
    seen: tuple[tuple[WatchedShare, ...], Interval | None],
    chosen: CertifiedThreshold,
    turn: Turn,
) -> Certificate:
    eval_set, right = plan.eval_set, outcomes.correct(chosen.threshold)
    clusters, labels = outcomes.clusters, evaluator.labels
    other: Tower = "text" if eval_set.query == "image" else "image"
    kept = estimate_kept(right, outcomes.teacher, clusters).interval
    if not math.isfinite(kept.high):
        raise InputError(
            "the teacher has too few answers right to be compared with: give it more queries that "
            "it can answer"
        )
    sizes = np.ones(1) if clusters is None else np.unique(clusters, return_counts=True)[1]
    return Certificate(
        query=eval_set.query,
        bound=plan.bound,
        delta=plan.delta,
        tested_at=turn.part_of(plan.delta),
        p_value=chosen.p_value,
        try_number=turn.number,
        space=plan.student.space,
        student=_identity(plan.student, eval_set.query),
        student_index=_identity(plan.student, other) if plan.index_by == "student" else None,
        teacher=_identity(plan.teacher, eval_set.query),
        score=plan.score,
        threshold=chosen.threshold,
        escalated=estimate_share(
            needs_teacher(outcomes.scores, chosen.threshold), clusters
        ).interval,
        watched=seen[0],
        disagreement=seen[1],
        quality=Quality(
            student=estimate_share(outcomes.student, clusters).interval,
            teacher=estimate_share(outcomes.teacher, clusters).interval,
            cascade=estimate_share(right, clusters).interval,
            kept=kept,
        ),
        tested_on=QuerySet(
            data=eval_set.test.name,
            identity=eval_set.identity,
            count=len(outcomes),
            clusters=len(outcomes) if clusters is None else len(sizes),
            largest=int(sizes.max()),
            cluster_by=plan.cluster_by,
            assumed=ASSUMED[plan.cluster_by],
            entries=eval_set.entry_count,
            index_by=plan.index_by,
            embedder=evaluator.embedder,
            task=eval_set.task,
            labels=None if labels is None else labels.entries.digest,
            teacher_labels=None if labels is None else labels.teacher.digest,
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=plan.command,
    )


def _identity(encoder: Encoder, query: Tower) -> TowerIdentity:
    return TowerIdentity.of(encoder.bundle.manifest, query, encoder.precisions[query])
