"""Certify a cascade: choose a threshold by fixed-sequence testing on labelled queries."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from edgeclip.export.cascade.cascade_eval_set import CascadeEvalSet
from edgeclip.export.cascade.cascade_evaluator import CascadeEvaluator, IndexBy
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    Certificate,
    PairedOutcomes,
    Quality,
    QuerySet,
    TowerIdentity,
    threshold_grid,
)
from edgeclip.runtime.cascade.drift import ScoreSample
from edgeclip.runtime.cascade.scores import Score
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import bootstrap, bootstrap_ratio
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval

_log = logging.getLogger(__name__)

PValue = Callable[[Values, float, float], float]  # of values in [low, high]

_STAKES = 30
_ORDER_SEED = 0


def hoeffding_bentkus_p_value(values: Values, low: float, high: float) -> float:
    """Return the p-value of "the mean of `values` [N] in [low, high] is at most 0".

    The smaller of Hoeffding's (1963) bound in its relative-entropy form and e times a
    binomial tail (Bentkus 2004), as Bates et al. (2021) join them. It sees the mean alone, so
    it is wide where most values are close to their mean.
    """
    count = len(values)
    losses = (high - values) / (high - low)
    mean, null = float(losses.mean()), high / (high - low)
    if mean >= null:
        return 1.0
    hoeffding = math.exp(-count * _relative_entropy(mean, null))
    bentkus = math.e * _binomial_tail(math.ceil(count * mean), count, null)
    return min(1.0, hoeffding, bentkus)


def betting_p_value(values: Values, low: float, high: float) -> float:
    """Return the p-value of "the mean of `values` [N] in [low, high] is at most 0", low < 0 < high.

    Under that hypothesis no bet on the values pays: the mean over stakes s of
    prod(1 + s x value), with 0 < s < -1 / low, is a nonnegative supermartingale that begins at
    1, so by Ville's inequality it ever reaches 1/p with probability at most p (Waudby-Smith and
    Ramdas 2024, section 4; a grid of stakes instead of one that is guessed). It profits from
    values that vary little. The values come in an order that does not depend on them.

    Raises:
        ValueError: `low` is not below 0.
    """
    if low >= 0:
        raise ValueError(f"a bet needs values that may be negative, not low = {low}")
    stakes = np.arange(1, _STAKES + 1) / (_STAKES + 1) / -low
    distinct, which = np.unique(values, return_inverse=True)
    gains = np.log1p(np.outer(distinct, stakes))  # few values differ: answers are right or wrong
    wealth = np.cumsum(gains[which], axis=0)
    largest = wealth.max(axis=1)
    mean = largest + np.log(np.exp(wealth - largest[:, None]).mean(axis=1))
    return math.exp(-max(0.0, float(mean.max())))


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


def share_error(count: int, delta: float) -> float:
    """Bound the error of the share of scores below any threshold, from `count` samples.

    With probability 1 - delta, for all thresholds at once (Dvoretzky, Kiefer and Wolfowitz 1956
    with Massart's constant 1990), so it holds for a threshold chosen on the same samples.
    """
    return math.sqrt(math.log(2 / delta) / (2 * count))


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
    p_value: PValue = betting_p_value,
) -> CertifiedThreshold | None:
    """Choose the lowest certified threshold by fixed-sequence testing; None if there is none.

    Args:
        outcomes: answers to independent queries that `grid` was not made from.
        grid: thresholds from the one that escalates most to the one that escalates least, as
            `threshold_grid` makes them.
        bound: the share of the teacher's quality to certify, in (0, 1].
        delta: the chance of a wrong certificate that is accepted, in (0, 1).
        p_value: p-value of "the mean of these values in [low, high] is at most 0".
    """
    order = np.random.default_rng(_ORDER_SEED).permutation(len(outcomes))
    found: list[float] = []

    def tested() -> Iterable[float]:
        for threshold in grid:
            found.append(p_value(outcomes.surplus(threshold, bound)[order], -bound, 1.0))
            yield found[-1]

    certified = fixed_sequence_test(tested(), delta)
    if certified == 0:
        return None
    return CertifiedThreshold(grid[certified - 1], found[certified - 1], certified)


def _relative_entropy(seen: float, null: float) -> float:
    """Return the Kullback-Leibler divergence of two Bernoullis, with 0 <= seen < null < 1."""
    rest = (1 - seen) * math.log((1 - seen) / (1 - null))
    return rest if seen == 0 else seen * math.log(seen / null) + rest


def _binomial_tail(most: int, count: int, share: float) -> float:
    """Return P(Binomial(count, share) <= most)."""
    number = np.arange(most + 1)
    logs = np.array([math.lgamma(n + 1) + math.lgamma(count - n + 1) for n in number])
    logs = math.lgamma(count + 1) - logs
    logs += number * math.log(share) + (count - number) * math.log1p(-share)
    return float(np.exp(np.logaddexp.reduce(logs)))


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
        certificate: the certificate of `chosen`; None if every query would have to be escalated.
    """

    outcomes: PairedOutcomes
    grid: tuple[float, ...]
    chosen: CertifiedThreshold | None
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
    _log.info("asking student and teacher about %s ...", eval_set.test.name)
    outcomes = evaluator.paired_outcomes(eval_set.test)
    if not outcomes.teacher.any():
        raise InputError("the teacher has no answer right: give it queries that it can answer")
    grid = threshold_grid(calibration)
    _log.info("testing %d thresholds ...", len(grid))
    chosen = choose_threshold(outcomes, grid, bound=plan.bound, delta=plan.delta)
    certificate = None
    if chosen is not None and chosen.threshold < ESCALATE_ALL:
        certificate = _certificate(plan, outcomes, calibration, chosen)
    return CertificationResult(outcomes=outcomes, grid=grid, chosen=chosen, certificate=certificate)


def _certificate(
    plan: CascadePlan, outcomes: PairedOutcomes, calibration: Values, chosen: CertifiedThreshold
) -> Certificate:
    eval_set, right = plan.eval_set, outcomes.correct(chosen.threshold)
    other: Tower = "text" if eval_set.query == "image" else "image"
    share, error = (
        outcomes.escalated_share(chosen.threshold),
        share_error(len(outcomes), plan.delta),
    )
    return Certificate(
        query=eval_set.query,
        bound=plan.bound,
        delta=plan.delta,
        p_value=chosen.p_value,
        space=plan.student.space,
        student=_identity(plan.student, eval_set.query),
        student_index=_identity(plan.student, other) if plan.index_by == "student" else None,
        teacher=_identity(plan.teacher, eval_set.query),
        score=plan.score,
        threshold=chosen.threshold,
        escalated=Interval(share, max(0.0, share - error), min(1.0, share + error)),
        quality=Quality(
            student=bootstrap(outcomes.student),
            teacher=bootstrap(outcomes.teacher),
            cascade=bootstrap(right),
            kept=bootstrap_ratio(right, outcomes.teacher),
        ),
        sample=ScoreSample.of(calibration, outcomes.scores),
        tested_on=QuerySet(
            data=eval_set.test.name,
            identity=eval_set.identity,
            count=len(outcomes),
            entries=eval_set.entry_count,
            index_by=plan.index_by,
            task=eval_set.task,
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=plan.command,
    )


def _identity(encoder: Encoder, query: Tower) -> TowerIdentity:
    return TowerIdentity.of(encoder.bundle.manifest, query, encoder.precisions[query])
