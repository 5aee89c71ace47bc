"""Certify a cascade: choose a threshold by fixed-sequence testing on labelled queries."""

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
from edgeclip.runtime.quality.intervals import Interval, bootstrap, bootstrap_ratio
from edgeclip.runtime.spec import Tower

PValue = Callable[[Values, float, float], float]  # of values in [low, high]

_STAKES = 30
_ORDER_SEED = 0


def hoeffding_bentkus(values: Values, low: float, high: float) -> float:
    """P-value of "the mean of `values` [N] in [low, high] is at most 0".

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


def betting(values: Values, low: float, high: float) -> float:
    """P-value of "the mean of `values` [N] in [low, high] is at most 0", low < 0 < high.

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


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """How many hypotheses are rejected: those before the first whose p-value is above `delta`.

    P-values behind that one are not asked for.
    """
    rejected = 0
    for p_value in p_values:
        if p_value > delta:
            break
        rejected += 1
    return rejected


def share_error(count: int, delta: float) -> float:
    """How far shares below any threshold, seen in `count` draws, may be off the true ones.

    With probability 1 - delta, for all thresholds at once (Dvoretzky, Kiefer and Wolfowitz 1956
    with Massart's constant 1990), so it holds for one that the same draws chose.
    """
    return math.sqrt(math.log(2 / delta) / (2 * count))


@dataclass(frozen=True, slots=True)
class CertifiedThreshold:
    """The boldest certified threshold, its p-value, and how many were certified in all."""

    threshold: float
    p_value: float
    certified: int


def choose_threshold(
    trial: PairedOutcomes,
    grid: Sequence[float],
    *,
    bound: float,
    delta: float,
    p_value: PValue = betting,
) -> CertifiedThreshold | None:
    """Choose the lowest threshold that is certified; None if not even the first one is.

    Args:
        trial: answers to independent queries that `grid` was not made from.
        grid: thresholds from the most cautious to the boldest, see `threshold_grid`.
        bound: the share of the teacher's quality to certify, in (0, 1].
        delta: the chance of a wrong certificate that is accepted, in (0, 1).
        p_value: of "the mean of these values in [low, high] is at most 0".
    """
    order = np.random.default_rng(_ORDER_SEED).permutation(len(trial))
    found: list[float] = []

    def tested() -> Iterable[float]:
        for threshold in grid:
            found.append(p_value(trial.surplus(threshold, bound)[order], -bound, 1.0))
            yield found[-1]

    certified = fixed_sequence(tested(), delta)
    if certified == 0:
        return None
    return CertifiedThreshold(grid[certified - 1], found[certified - 1], certified)


def _relative_entropy(seen: float, null: float) -> float:
    """Kullback-Leibler divergence of two coins, with 0 <= seen < null < 1."""
    rest = (1 - seen) * math.log((1 - seen) / (1 - null))
    return rest if seen == 0 else seen * math.log(seen / null) + rest


def _binomial_tail(most: int, count: int, share: float) -> float:
    """P(Binomial(count, share) <= most)."""
    number = np.arange(most + 1)
    logs = np.array([math.lgamma(n + 1) + math.lgamma(count - n + 1) for n in number])
    logs = math.lgamma(count + 1) - logs
    logs += number * math.log(share) + (count - number) * math.log1p(-share)
    return float(np.exp(np.logaddexp.reduce(logs)))


Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CascadePlan:
    """What is to be certified.

    Attributes:
        student: on the device.
        teacher: on the server, in the same embedding space.
        questions: what both are asked.
        score: how sure the student is.
        bound: the share of the teacher's quality to keep.
        delta: the chance of a wrong certificate.
        index_by: who embeds what is chosen from.
        command: what was typed.

    Raises:
        InputError: bound or delta out of range, or student and teacher are the same tower, so
            that asking the teacher changes no answer.
    """

    student: Encoder
    teacher: Encoder
    questions: CascadeEvalSet
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
        """A student never loses to itself: its certificate would say to ask nobody."""
        query, both = self.questions.query, (self.student, self.teacher)
        if not all(encoder.bundle.manifest.has(query) for encoder in both):
            return  # who asks the questions says so
        student, teacher = (_identity(encoder, query) for encoder in both)
        if student.hashes == teacher.hashes:
            raise InputError(
                f"the teacher {self.teacher.bundle.path} has the {query} tower of its student in "
                f"{student.precision}, so it would change no answer: name the bundle of a larger "
                "model as the teacher"
            )

    def examiner(self) -> CascadeEvaluator:
        """Who asks the questions.

        Raises:
            SpaceMismatchError: student and teacher are of different embedding spaces.
            InputError: a score that such queries do not have.
        """
        return CascadeEvaluator(
            self.student, self.teacher, self.questions, self.score, index_by=self.index_by
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertificationResult:
    """What came of it.

    Attributes:
        trial: what was answered to the test queries.
        grid: the thresholds, from the most cautious to the boldest.
        chosen: the boldest that is certified; None if none is.
        certificate: for it; None if every query would have to be escalated.
    """

    trial: PairedOutcomes
    grid: tuple[float, ...]
    chosen: CertifiedThreshold | None
    certificate: Certificate | None

    @property
    def count(self) -> int:
        """How many thresholds of the grid are certified, from the first on."""
        return 0 if self.chosen is None else self.chosen.certified


def certify(
    plan: CascadePlan,
    examiner: CascadeEvaluator | None = None,
    progress: Progress = lambda line: None,
) -> CertificationResult:
    """Ask student and teacher the questions, and choose the boldest certified threshold.

    Args:
        plan: what is to be certified.
        examiner: the plan's, if it is at hand.
        progress: called with a line for a person before each step.

    Raises:
        SpaceMismatchError: student and teacher are of different embedding spaces.
        InputError: a picture cannot be read, the score does not fit the queries, or the
            teacher has no answer right.
        EngineError: a tower cannot be run.
    """
    asks, questions = examiner or plan.examiner(), plan.questions
    progress(f"asking the student about {questions.calibration.name}")
    calibration = asks.scores(questions.calibration)
    progress(f"asking student and teacher about {questions.test.name}")
    trial = asks.trial(questions.test)
    if not trial.teacher.any():
        raise InputError("the teacher has no answer right: give it queries that it can answer")
    grid = threshold_grid(calibration)
    progress(f"testing {len(grid)} thresholds")
    chosen = choose_threshold(trial, grid, bound=plan.bound, delta=plan.delta)
    certificate = None
    if chosen is not None and chosen.threshold < ESCALATE_ALL:
        certificate = _certificate(plan, trial, calibration, chosen)
    return CertificationResult(trial=trial, grid=grid, chosen=chosen, certificate=certificate)


def _certificate(
    plan: CascadePlan, trial: PairedOutcomes, calibration: Values, chosen: CertifiedThreshold
) -> Certificate:
    questions, right = plan.questions, trial.right(chosen.threshold)
    other: Tower = "text" if questions.query == "image" else "image"
    share, error = trial.escalated_share(chosen.threshold), share_error(len(trial), plan.delta)
    return Certificate(
        query=questions.query,
        bound=plan.bound,
        delta=plan.delta,
        p_value=chosen.p_value,
        space=plan.student.space,
        student=_identity(plan.student, questions.query),
        student_index=_identity(plan.student, other) if plan.index_by == "student" else None,
        teacher=_identity(plan.teacher, questions.query),
        score=plan.score,
        threshold=chosen.threshold,
        escalated=Interval(share, max(0.0, share - error), min(1.0, share + error)),
        quality=Quality(
            student=bootstrap(trial.student),
            teacher=bootstrap(trial.teacher),
            cascade=bootstrap(right),
            kept=bootstrap_ratio(right, trial.teacher),
        ),
        sample=ScoreSample.of(calibration, trial.scores),
        tested_on=QuerySet(
            data=questions.test.name,
            identity=questions.identity,
            count=len(trial),
            entries=questions.choices,
            index_by=plan.index_by,
            task=questions.task,
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=plan.command,
    )


def _identity(encoder: Encoder, query: Tower) -> TowerIdentity:
    return TowerIdentity.of(encoder.bundle.manifest, query, encoder.precisions[query])
