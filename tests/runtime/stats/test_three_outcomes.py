from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.stats.interval import Estimate
from edgeclip.runtime.stats.student_t import estimate_mean, normal_quantile
from edgeclip.runtime.stats.three_outcomes import BoundTest, Direction, judge, overall


@dataclass(frozen=True)
class Normal(Estimate):
    """A value with a known standard error."""

    value: float
    error: float = 1.0

    def lower_bound(self, confidence: float) -> float:
        return self.value - normal_quantile(confidence) * self.error

    def upper_bound(self, confidence: float) -> float:
        return self.value + normal_quantile(confidence) * self.error


def at_most(*values: float) -> BoundTest:
    return BoundTest(tuple(map(Normal, values)), "<=", 0.0)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [(-2.0, "passed"), (-1.6, "undecided"), (0, "undecided"), (1.6, "undecided"), (2.0, "failed")],
)
def test_a_single_bound(value: float, outcome: str) -> None:
    assert judge([at_most(value)]) == (outcome,)
    mirrored = BoundTest((Normal(-value),), ">=", 0.0)
    assert judge([mirrored]) == (outcome,)


def test_all_evidence_must_be_inside_to_pass() -> None:
    assert judge([at_most(-2.0, -5.0)]) == ("passed",)
    assert judge([at_most(-1.0, -5.0)]) == ("undecided",)


def test_any_evidence_outside_fails_at_holms_level() -> None:
    # Of two estimates the larger must be beyond the 97.5% quantile, 1.96.
    assert judge([at_most(1.9, -5.0)]) == ("undecided",)
    assert judge([at_most(2.0, -5.0)]) == ("failed",)
    # Once one has failed, the next is tested at the full level.
    assert judge([at_most(1.7), at_most(2.0)]) == ("failed", "failed")
    assert judge([at_most(1.7), at_most(1.9)]) == ("undecided", "undecided")


def test_overall() -> None:
    assert overall(["passed", "passed"]) == "passed"
    assert overall(["passed", "undecided"]) == "undecided"
    assert overall(["passed", "undecided", "failed"]) == "failed"


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=6), st.sampled_from([">=", "<="]))
def test_more_tests_never_turn_an_outcome_around(values: list[float], direction: Direction) -> None:
    tests = [BoundTest((Normal(value),), direction, 0.0) for value in values]
    together = judge(tests)
    alone = [judge([test])[0] for test in tests]
    for one, other in zip(together, alone, strict=True):
        assert one == other or (other, one) == ("failed", "undecided")


@pytest.mark.slow
def test_levels_hold() -> None:
    """Eight means at their bound: no more than 5% of the runs fail any, and 5% pass each."""
    rng = np.random.default_rng(0)
    failed, passed = 0, 0
    for _ in range(2000):
        tests = [BoundTest((estimate_mean(rng.normal(size=12)),), "<=", 0.0) for _ in range(8)]
        outcomes = judge(tests)
        failed += "failed" in outcomes
        passed += outcomes.count("passed")
    assert failed / 2000 <= 0.05 + 0.015
    assert passed / 16_000 <= 0.05 + 0.006
