"""What student, cascade and teacher answered to the same queries: the data of a certificate."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError

# All scores lie between these two, so that thresholds stay finite numbers.
ASK_ALWAYS = 3.0  # a threshold above every score
ASK_NEVER = -2.0  # one below every score

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]


def is_unsure(scores: Values, threshold: float) -> Flags:
    """Tell which queries go to the teacher: bool [N]; a score that is NaN always does."""
    return ~(scores >= threshold)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """Answers to N independent queries, right or wrong.

    Attributes:
        scores: float64 [N], how sure the student was; see `scores`.
        student: bool [N], whether the student's first entry was the right one.
        escalated: the same of the teacher, against the entries that the cascade uses.
        teacher: the same of the teacher by itself: with entries of its own, if the cascade's
            were embedded by the student, and otherwise equal to `escalated`.

    Raises:
        InputError: no queries, or arrays of different lengths.
    """

    scores: Values
    student: Flags
    escalated: Flags
    teacher: Flags

    def __post_init__(self) -> None:
        shapes = {item.shape for item in (self.scores, self.student, self.escalated, self.teacher)}
        if len(shapes) != 1 or self.scores.ndim != 1 or not len(self.scores):
            raise InputError("a trial needs one score and three answers for each of N >= 1 queries")

    def __len__(self) -> int:
        return len(self.scores)

    def right(self, threshold: float) -> Flags:
        """Whether the cascade answers right, query by query: bool [N]."""
        return np.where(is_unsure(self.scores, threshold), self.escalated, self.student)

    def escalated_share(self, threshold: float) -> float:
        """The share of queries that go to the teacher."""
        return float(is_unsure(self.scores, threshold).mean())

    def surplus(self, threshold: float, bound: float) -> Values:
        """Right answers of the cascade minus `bound` times the teacher's: [N], in [-bound, 1].

        Its expectation is 0 or more exactly where the cascade's quality is at least `bound`
        times the teacher's.
        """
        return self.right(threshold).astype(np.float64) - bound * self.teacher


def threshold_grid(calibration: Values, steps: int = 100) -> tuple[float, ...]:
    """Thresholds to try, from `ASK_ALWAYS` down to `ASK_NEVER`: distinct, descending.

    Between them lie the quantiles of the calibration scores [M], `steps` of equal share. They
    must not be the scores that the thresholds are then tested on.

    Raises:
        InputError: no calibration scores, or one that is not finite.
    """
    if calibration.ndim != 1 or not len(calibration) or not np.isfinite(calibration).all():
        raise InputError("thresholds need calibration scores, all of them finite")
    levels = np.arange(1, steps) / steps
    between = np.unique(np.quantile(calibration, levels))
    return (ASK_ALWAYS, *map(float, between[::-1]), ASK_NEVER)
