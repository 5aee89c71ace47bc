"""Certificates and the watch are wrong as rarely as they say; `guarantees.py` asks 1,000 times.

By chance a share of exactly 5% is seen as more than 6.7% in one of a hundred runs of 1,000, and as
more than 9.3% of 150.
"""

import pytest

from tests.export.cascade.simulate_certificates import (
    false_alarms,
    wrong_certificates,
    wrong_of_several,
    wrong_when_raised,
)

pytestmark = pytest.mark.slow

REPETITIONS, FEW = 1000, 150
DELTA = 0.05
MOST, MOST_OF_FEW = 0.067, 0.093


def test_a_single_certificate() -> None:
    assert wrong_certificates(REPETITIONS, delta=DELTA) <= MOST


def test_ties_of_scores_and_few_queries() -> None:
    assert wrong_certificates(REPETITIONS, delta=DELTA, tied=True) <= MOST
    assert wrong_certificates(REPETITIONS, delta=DELTA, count=60) <= MOST
    assert wrong_certificates(REPETITIONS, delta=DELTA, count=3) <= MOST


@pytest.mark.parametrize("cluster", [5, 20])
def test_clusters_that_are_declared(cluster: int) -> None:
    assert wrong_certificates(REPETITIONS, delta=DELTA, cluster=cluster) <= MOST


def test_clusters_that_are_not_declared_are_why_they_must_be() -> None:
    assert wrong_certificates(FEW, delta=DELTA, cluster=20, declared=False) > 0.2


def test_the_count_is_raised_until_it_certifies() -> None:
    assert wrong_when_raised(FEW, delta=DELTA) <= MOST_OF_FEW


def test_several_students_on_one_test_set() -> None:
    assert wrong_of_several(FEW, delta=DELTA) <= MOST_OF_FEW


def test_the_watch_over_thirty_starts() -> None:
    assert false_alarms(FEW, alpha=DELTA) <= MOST_OF_FEW
