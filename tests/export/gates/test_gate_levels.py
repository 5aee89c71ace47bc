"""Gates keep their level and have power, by simulation; `guarantees.py` does it at length."""

import pytest

from tests.export.gates.simulate_gates import (
    burst_passes,
    clustered_passes,
    outcome_shares,
    passes_after_raising,
    passes_in_looks,
)

pytestmark = pytest.mark.slow

LEVEL = 0.05 + 0.014  # and two standard errors of a thousand repetitions
REPETITIONS = 1000


@pytest.mark.parametrize(("count", "churn"), [(100, 0.05), (1000, 0.01), (3000, 0.02)])
def test_a_loss_of_exactly_the_bound_neither_passes_nor_fails(count: int, churn: float) -> None:
    found = outcome_shares(count, 0.01, churn, REPETITIONS)
    assert found["passed"] <= LEVEL
    assert found["failed"] <= LEVEL


def test_small_samples_do_not_decide_and_large_ones_do() -> None:
    assert outcome_shares(100, 0.02, 0.02, REPETITIONS)["passed"] <= 0.01
    assert outcome_shares(100, 0.0, 0.02, REPETITIONS)["failed"] <= 0.01
    assert outcome_shares(3000, 0.0, 0.01, REPETITIONS)["passed"] >= 0.98
    assert outcome_shares(3000, 0.02, 0.02, REPETITIONS)["failed"] >= 0.95


def test_declared_looks_and_clusters_keep_the_level() -> None:
    raised = passes_after_raising((500, 1000, 2000, 4000), 0.01, 0.02, REPETITIONS, declared=True)
    assert raised <= LEVEL
    assert passes_in_looks(3000, 0.01, 0.02, REPETITIONS, 3) <= LEVEL
    assert clustered_passes(600, 5, 0.01, 0.02, REPETITIONS, declared=True) <= LEVEL
    assert burst_passes(1000, 0.05, 20, 0.01, 0.02, REPETITIONS) <= LEVEL
