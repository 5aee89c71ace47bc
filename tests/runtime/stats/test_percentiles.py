import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.percentiles import (
    conformal_bound,
    conformal_level,
    estimate_percentile,
    least_count,
)

percents = st.sampled_from([1.0, 5.0, 25.0, 50.0, 90.0, 95.0, 99.0, 99.9])


def test_the_median_of_a_hundred_has_ranks_40_and_61() -> None:
    """A table value: P(binomial(100, 1/2) <= 39) = 1.76%, and <= 40 is 2.84%."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    interval = estimate_percentile(values, 50).interval
    assert (interval.low, interval.value, interval.high) == (40, 50.5, 61)


@given(st.integers(1, 600), percents, st.sampled_from([0.9, 0.95, 0.975]))
def test_ranks_are_those_of_the_binomial_distribution(
    count: int, percent: float, confidence: float
) -> None:
    found = estimate_percentile(np.arange(1.0, count + 1.0), percent, least=0.0, most=math.inf)
    below = stats.binom(count, percent / 100)
    low, high = found.lower_bound(confidence), found.upper_bound(confidence)
    # At least `low` values lie at or below the percentile, and one rank more is not sure enough.
    assert low == 0 or below.sf(low - 1) >= confidence - 1e-9
    assert below.sf(low) < confidence + 1e-9
    assert high == math.inf or below.cdf(high - 1) >= confidence - 1e-9
    assert high == 1 or below.cdf(min(high, count + 1) - 2) < confidence + 1e-9


@given(percents, st.sampled_from([0.95, 0.975]))
def test_from_the_least_count_on_both_bounds_exist(percent: float, confidence: float) -> None:
    enough = least_count(percent, confidence)
    for count, exist in ((enough, True), (enough - 1, False)):
        if count == 0:
            continue
        found = estimate_percentile(np.arange(float(count)), percent)
        ends = found.lower_bound(confidence), found.upper_bound(confidence)
        assert all(map(math.isfinite, ends)) == exist


def test_known_least_counts() -> None:
    assert least_count(99, 0.95) == 299  # 0.99^299 is just below 5%
    assert least_count(1, 0.975) == 368
    assert least_count(50, 0.975) == 6


def test_few_cosines_have_the_bounds_that_all_cosines_have() -> None:
    found = estimate_percentile(np.full(27, 0.99), 1, least=-1.0, most=1.0).interval
    assert (found.low, found.value, found.high) == (-1, 0.99, 0.99)
    few = estimate_percentile(np.full(27, 3.0), 99).interval
    assert (few.low, few.value, few.high) == (3, 3, math.inf)


def test_values_that_tell_less_widen_the_interval() -> None:
    values = np.arange(1000.0)
    all_of_them = estimate_percentile(values, 50).interval
    a_tenth = estimate_percentile(values, 50, independent=100).interval
    assert (a_tenth.high - a_tenth.low) / (all_of_them.high - all_of_them.low) == pytest.approx(
        10**0.5, rel=0.1
    )


@pytest.mark.parametrize("percent", [0, 100, -1, math.nan])
def test_percentiles_out_of_range_are_refused(percent: float) -> None:
    with pytest.raises(InputError, match="a percentile lies between 0 and 100"):
        estimate_percentile(np.ones(3), percent)


def test_conformal_bounds_by_hand() -> None:
    errors = np.array([0.3, 0.1, 0.2, 0.5, 0.4, 0.7, 0.6, 0.9, 0.8])
    assert conformal_bound(errors, 0.9) == 0.9  # the 9th of 9
    assert conformal_bound(errors, 0.5) == 0.5  # the 5th
    assert conformal_bound(errors[:8], 0.9) == math.inf
    assert conformal_bound(errors[:3], conformal_level(3)) == 0.3
    assert conformal_level(3) == 0.75
    assert conformal_bound(np.array([]), 0.9) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("count", [9, 27, 100])
def test_the_next_error_keeps_its_bound(count: int) -> None:
    rng = np.random.default_rng(count)
    draws = rng.lognormal(size=(4000, count + 1))
    kept = [row[-1] <= conformal_bound(row[:-1], 0.9) for row in draws]
    assert np.mean(kept) >= 0.9 - 0.015


@pytest.mark.slow
@pytest.mark.parametrize("percent", [1.0, 50.0, 99.0])
@pytest.mark.parametrize("count", [27, 100, 1000])
def test_intervals_of_percentiles_cover_the_truth(percent: float, count: int) -> None:
    rng = np.random.default_rng(count)
    truth = float(stats.lognorm(0.5).ppf(percent / 100))
    hits = 0
    for _ in range(1000):
        found = estimate_percentile(rng.lognormal(sigma=0.5, size=count), percent, least=0.0)
        hits += found.interval.low <= truth <= found.interval.high
    assert hits >= 930
