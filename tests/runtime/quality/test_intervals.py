import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality import intervals
from edgeclip.runtime.quality.intervals import (
    bootstrap,
    bootstrap_difference,
    bootstrap_percentile,
    bootstrap_ratio,
)
from edgeclip.runtime.stats.interval import Interval


def test_constant_values_have_no_width() -> None:
    assert bootstrap(np.full(30, 0.25)) == Interval(0.25, 0.25, 0.25)


def test_the_interval_of_a_share_is_near_the_normal_one() -> None:
    hits = np.repeat([1.0, 0.0], [800, 200])
    interval = bootstrap(hits)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert interval.value == pytest.approx(0.8)
    assert interval.low == pytest.approx(0.8 - half, abs=0.004)
    assert interval.high == pytest.approx(0.8 + half, abs=0.004)


def test_pairing_narrows_a_difference() -> None:
    generator = np.random.default_rng(1)
    difficulty = generator.normal(size=500)
    ours, reference = difficulty + 0.1, difficulty + generator.normal(scale=0.05, size=500)
    paired = bootstrap_difference(ours, reference)
    assert paired.low < paired.value < paired.high
    assert paired.value == pytest.approx(ours.mean() - reference.mean())
    assert paired.high - paired.low < 0.02  # alone, each mean is unsure by 0.17


def test_a_ratio_of_equal_or_scaled_values_has_no_width() -> None:
    values = np.random.default_rng(0).uniform(0.5, 1, size=50)
    assert bootstrap_ratio(values, values) == Interval(1.0, 1.0, 1.0)
    half = bootstrap_ratio(values / 2, values)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_by_a_slow_loop() -> None:
    generator = np.random.default_rng(5)
    ours, reference = generator.integers(0, 3, (2, 40)) / 2 + 0.5
    ratios = []
    draws = np.random.default_rng(0)
    for _ in range(300):
        items = draws.integers(0, 40, size=40)
        ratios.append(ours[items].mean() / reference[items].mean())
    interval = bootstrap_ratio(ours, reference, draws=300)
    assert interval.low == pytest.approx(np.quantile(ratios, 0.025), abs=0.02)
    assert interval.high == pytest.approx(np.quantile(ratios, 0.975), abs=0.02)


def test_a_percentile_and_its_interval() -> None:
    values = np.linspace(0, 1, 101)
    interval = bootstrap_percentile(values, 1)
    assert interval.value == pytest.approx(0.01)
    assert 0 <= interval.low < 0.01 < interval.high < 0.06


def test_booleans_seed_and_level() -> None:
    hits = np.arange(200) % 3 == 0
    assert bootstrap(hits, seed=4) == bootstrap(hits, seed=4)
    assert bootstrap(hits, seed=4) != bootstrap(hits, seed=5)
    narrow, wide = bootstrap(hits, level=0.5), bootstrap(hits, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=100)
    whole = bootstrap(values)
    monkeypatch.setattr(intervals, "_INDICES_AT_ONCE", 700)
    chunked = bootstrap(values)
    assert chunked.value == whole.value
    assert chunked.low == pytest.approx(whole.low, abs=0.02)
    assert chunked.high == pytest.approx(whole.high, abs=0.02)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_an_interval_lies_within_the_values(values: list[float]) -> None:
    interval = bootstrap(np.array(values), draws=50)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack


@pytest.mark.parametrize(
    "values", [np.zeros(0), np.zeros((3, 2)), np.array([1.0, np.nan]), np.array([np.inf])]
)
def test_values_that_are_none_are_refused(values: np.ndarray) -> None:
    with pytest.raises(InputError):
        bootstrap(values)


def test_misuse_is_refused() -> None:
    with pytest.raises(InputError, match="3 and 4 items"):
        bootstrap_difference(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="more items"):
        bootstrap_ratio(np.ones(4), np.array([0.0, 0.0, 0.0, 1.0]))
    with pytest.raises(InputError, match="draws"):
        bootstrap(np.ones(3), draws=0)
    with pytest.raises(InputError, match="level"):
        bootstrap(np.ones(3), level=95)
    with pytest.raises(InputError, match="percentile"):
        bootstrap_percentile(np.ones(3), 101)
