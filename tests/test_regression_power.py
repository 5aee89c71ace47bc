"""A small run of the benchmark of the regression gate's power: levels are kept, and power is there.

The shares are those of a fixed seed; what is allowed is the level and three standard errors.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # scripts import each other by name

from regression_power import (
    BOUND,
    LOAD_EFFECTS,
    SURELY,
    Slower,
    share_of_subjects,
    surely_faster,
    verdicts,
    wrong,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [5, 10])
def test_the_gate_is_wrong_no_more_often_than_it_says(count: int) -> None:
    bars = list(wrong(np.random.default_rng(1), count, 80))
    assert len(bars) == 5
    assert [bar.line() for bar in bars if not bar.passed] == []


def test_ten_processes_tell_twice_the_bound_from_nothing() -> None:
    rng = np.random.default_rng(2)
    slow, same = (verdicts(rng, 10, Slower(by, by), 30) for by in (2 * BOUND - 1, 1.0))
    assert share_of_subjects(slow, "failed").value > 0.9
    assert share_of_subjects(same, "passed").value > 0.7


@pytest.mark.parametrize("effect", LOAD_EFFECTS)
def test_equals_are_not_surely_faster_however_loads_differ(effect: float) -> None:
    rng, repetitions = np.random.default_rng(3), 400
    found = surely_faster(rng, effect, 1.0, repetitions)
    assert found.value <= SURELY + 3 * np.sqrt(SURELY * (1 - SURELY) / repetitions)
    assert surely_faster(rng, effect, 0.8, 20).value == 1
