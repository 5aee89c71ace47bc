"""From questions to a certificate: student and teacher answer, a threshold is chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from edgeclip.export.examine import Examiner, IndexBy
from edgeclip.export.questions import Questions
from edgeclip.runtime.cascade.certificate import (
    Certificate,
    Quality,
    QuerySet,
    TowerIdentity,
)
from edgeclip.runtime.cascade.drift import ScoreSample
from edgeclip.runtime.cascade.risk_control import Chosen, choose_threshold, share_error
from edgeclip.runtime.cascade.scores import Score
from edgeclip.runtime.cascade.trial import ASK_ALWAYS, Trial, Values, threshold_grid
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.intervals import Interval, bootstrap, bootstrap_ratio
from edgeclip.runtime.spec import Tower

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
    questions: Questions
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

    def examiner(self) -> Examiner:
        """Who asks the questions.

        Raises:
            SpaceMismatchError: student and teacher are of different embedding spaces.
            InputError: a score that such queries do not have.
        """
        return Examiner(
            self.student, self.teacher, self.questions, self.score, index_by=self.index_by
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certified:
    """What came of it.

    Attributes:
        trial: what was answered to the test queries.
        grid: the thresholds, from the most cautious to the boldest.
        chosen: the boldest that is certified; None if none is.
        certificate: for it; None if every query would have to be escalated.
    """

    trial: Trial
    grid: tuple[float, ...]
    chosen: Chosen | None
    certificate: Certificate | None

    @property
    def count(self) -> int:
        """How many thresholds of the grid are certified, from the first on."""
        return 0 if self.chosen is None else self.chosen.certified


def certify(
    plan: CascadePlan,
    examiner: Examiner | None = None,
    progress: Progress = lambda line: None,
) -> Certified:
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
    if chosen is not None and chosen.threshold < ASK_ALWAYS:
        certificate = _certificate(plan, trial, calibration, chosen)
    return Certified(trial=trial, grid=grid, chosen=chosen, certificate=certificate)


def _certificate(
    plan: CascadePlan, trial: Trial, calibration: Values, chosen: Chosen
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
