import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.student_t import (
    estimate_mean,
    estimate_mean_ratio,
    student_t_quantile,
)


@given(st.floats(0.001, 0.999), st.floats(1, 500))
def test_the_distribution_is_scipys(chance: float, degrees: float) -> None:
    expected = float(stats.t(degrees).ppf(chance))
    assert student_t_quantile(chance, degrees) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_mean_has_students_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 12)
    interval = estimate_mean(values).interval
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_clusters_widen_a_mean() -> None:
    one = np.random.default_rng(0).normal(size=10)
    alone = estimate_mean(one).interval
    declared = estimate_mean(np.repeat(one, 7), np.repeat(np.arange(10), 7)).interval
    assert (declared.low, declared.high) == pytest.approx((alone.low, alone.high))


def test_one_value_bounds_nothing() -> None:
    interval = estimate_mean(np.array([3.0])).interval
    assert (interval.low, interval.value, interval.high) == (-math.inf, 3, math.inf)
    ratio = estimate_mean_ratio(np.array([1.0]), np.array([2.0])).interval
    assert (ratio.low, ratio.value, ratio.high) == (0, 0.5, math.inf)


def test_proportional_values_have_an_exact_ratio() -> None:
    reference = np.random.default_rng(0).uniform(1, 2, 20)
    ratio = estimate_mean_ratio(reference / 4, reference).interval
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_a_ratio_needs_positive_values() -> None:
    with pytest.raises(InputError, match="a ratio needs values of 0 or more"):
        estimate_mean_ratio(np.array([1.0, -1.0]), np.ones(2))
    with pytest.raises(InputError, match="not always 0"):
        estimate_mean_ratio(np.ones(2), np.zeros(2))


@pytest.mark.slow
def test_ratios_of_skewed_times_are_covered() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        reference = rng.lognormal(sigma=0.3, size=30)
        ratio = estimate_mean_ratio(reference * rng.lognormal(-0.02, 0.2, 30) / 2, reference)
        hits += ratio.interval.low <= 0.5 <= ratio.interval.high
    assert hits >= 930
