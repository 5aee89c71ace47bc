"""Percentiles, paired ratios and their intervals; Student's t distribution."""

from collections.abc import Sequence

import numpy as np
import pytest

from edgeclip.profiles.record import timing_statistics
from edgeclip.profiles.record.timing_statistics import (
    Runs,
    latency_of,
    paired_ratio,
    percentile_interval,
    process_medians,
    rate_interval,
    round_ratios,
)
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import student_t_cdf, student_t_quantile


def processes(
    rng: np.random.Generator, *, count: int = 5, spread: float = 0.02, noise: float = 0.02
) -> list[Runs]:
    """Runs of 2 ms of a typical process, each like its neighbours, in processes that differ."""
    found = []
    for effect in rng.normal(0, spread, count):
        alike = np.convolve(rng.normal(0, 1, 108), np.ones(9) / 3, mode="valid")  # 100 runs
        found.append(2 * np.exp(effect + noise * alike))
    return found


def covered(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(("spread", "noise"), [(0.02, 0.02), (0.02, 0.002), (0.0, 0.02)])
def test_intervals_of_five_processes_hold_the_truth_about_as_often_as_they_say(
    spread: float, noise: float
) -> None:
    rng = np.random.default_rng(3)
    hits = np.zeros(2)
    for _ in range(150):
        found = latency_of(processes(rng, spread=spread, noise=noise))
        ninety = 2 * np.exp(1.2816 * noise)
        hits += [covered(found.p50_ms, 2), covered(found.p90_ms, ninety)]
    # 142 expected; 135 or fewer has a chance of one in two hundred. Where the processes do not
    # differ, the interval is a little too wide, which nobody can know from five of them.
    assert min(hits) >= 134
    assert spread == 0 or max(hits) <= 149


def test_resampling_the_processes_would_claim_too_much() -> None:
    rng = np.random.default_rng(4)
    runs = processes(rng)
    logs = np.log([np.median(item) for item in runs])
    draws = rng.choice(logs, (1000, 5)).mean(axis=1)
    naive = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    found = latency_of(runs).p50_ms
    assert np.log(found.high / found.low) > 1.4 * naive


def test_a_typical_process_is_the_geometric_mean_of_all() -> None:
    found = latency_of([np.full(100, 1.0), np.full(300, 4.0)])
    assert found.runs == 400
    assert found.p99_ms is not None
    assert found.p99_9_ms is None  # the first process has too few runs to know it
    for part in (found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms):
        assert part.value == pytest.approx(2)
        assert part.low < 1 < 4 < part.high  # two processes tell little


def test_processes_that_agree_exactly_leave_no_doubt() -> None:
    found = latency_of([np.full(20, 3.0)] * 4)
    assert found.p99_ms is None
    assert [found.p50_ms.low, found.p95_ms.high] == pytest.approx([3, 3])


def test_processes_that_agree_by_chance_claim_no_more_than_their_runs() -> None:
    rng = np.random.default_rng(5)
    runs = rng.lognormal(0, 0.1, 60)
    many = latency_of([rng.permutation(runs) for _ in range(4)]).p50_ms
    one = latency_of([runs]).p50_ms
    assert np.log(many.high / many.low) == pytest.approx(np.log(one.high / one.low) / 2, rel=0.35)


def test_one_process_is_judged_by_its_runs() -> None:
    runs = np.random.default_rng(6).exponential(1, 200)
    assert latency_of([runs]).p90_ms == percentile_interval(runs, 90)


def test_many_runs_are_drawn_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = np.random.default_rng(7).exponential(1, 50)
    whole = percentile_interval(runs, 95)
    monkeypatch.setattr(timing_statistics, "_VALUES_AT_ONCE", 170)
    assert percentile_interval(runs, 95) == whole


def test_a_drift_that_both_share_leaves_their_ratio_alone() -> None:
    rng = np.random.default_rng(8)
    reference = [np.linspace(1, 3, 90) * rng.lognormal(0, 0.001, 90) for _ in range(5)]
    values = [runs * 1.25 * rng.lognormal(0, 0.001, 90) for runs in reference]
    ratio = paired_ratio(values, reference)
    assert ratio.low < 1.25 < ratio.high
    assert ratio.high - ratio.low < 0.005
    assert latency_of(values).p50_ms.value == pytest.approx(2.5, rel=0.01)


def test_process_medians_tell_spread_from_noise() -> None:
    rng = np.random.default_rng(9)
    apart = process_medians(processes(rng, count=40, spread=0.05, noise=0.001))
    alike = process_medians(processes(rng, count=40, spread=0.0, noise=0.05))
    assert apart.spread == pytest.approx(0.05, rel=0.3)
    assert apart.noise < 0.001
    assert alike.spread is not None
    assert 0.5 < alike.noise / alike.spread < 1.3
    assert apart.mean == pytest.approx(np.log(2), abs=0.03)
    assert process_medians([np.ones(5)]).spread is None


@pytest.mark.parametrize("reference", [[np.ones(3)], [np.ones(3), np.ones(4)]])
def test_only_what_ran_together_is_paired(reference: Sequence[Runs]) -> None:
    with pytest.raises(InputError, match="2 processes of 3/3 runs"):
        round_ratios([np.ones(3), np.ones(3)], reference)


@pytest.mark.parametrize("nothing", [[], [np.ones(0)], [np.ones(3), np.ones(0)]])
def test_no_runs_have_no_percentile(nothing: Sequence[Runs]) -> None:
    with pytest.raises(InputError, match="no run was timed"):
        latency_of(nothing)


def test_one_disturbed_process_of_five_changes_little() -> None:
    rng = np.random.default_rng(7)
    quiet = processes(rng, spread=0.01)
    found = process_medians(quiet)
    disturbed = process_medians([*quiet[:4], 2 * quiet[4]])
    assert abs(disturbed.mean - found.mean) < 0.01
    assert found.spread is not None
    assert disturbed.spread is not None
    assert disturbed.spread < 0.05  # its standard deviation would be 0.3
    assert (found.processes, found.degrees) == (5, 2)


def test_without_trimming_the_spread_is_the_standard_deviation() -> None:
    runs = processes(np.random.default_rng(8), count=4)
    logs = np.log([np.percentile(item, 50, method="median_unbiased") for item in runs])
    found = process_medians(runs)
    assert found.mean == pytest.approx(logs.mean())
    assert found.spread == pytest.approx(logs.std(ddof=1))
    assert found.degrees == 3


def test_a_machine_with_slower_minutes_makes_intervals_wider() -> None:
    """The same ten processes: in turns fast and slow, and first the fast, then the slow ones."""
    fast, slow = np.full(50, 1.0), np.full(50, 1.2)
    turns = latency_of([fast, slow] * 5).p50_ms
    minutes = latency_of([fast] * 5 + [slow] * 5).p50_ms
    assert turns.value == pytest.approx(minutes.value)
    assert minutes.high / minutes.low > 1.2 > turns.high / turns.low


# Abramowitz and Stegun, table 26.10.
TABLE = [
    (0.975, 1, 12.706),
    (0.95, 1, 6.314),
    (0.975, 4, 2.776),
    (0.95, 8, 1.860),
    (0.999, 3, 10.215),
    (0.975, 30, 2.042),
    (0.975, 1e6, 1.960),
]


@pytest.mark.parametrize(("chance", "degrees", "t"), TABLE)
def test_quantiles_and_chances_are_those_of_the_table(
    chance: float, degrees: float, t: float
) -> None:
    assert student_t_quantile(chance, degrees) == pytest.approx(t, abs=6e-4)
    assert student_t_cdf(t, degrees) == pytest.approx(chance, abs=1e-4)


@pytest.mark.parametrize("degrees", [1, 2.5, 7.81, 40, 1000])
@pytest.mark.parametrize("chance", [0.001, 0.05, 0.3, 0.5, 0.9, 0.9999])
def test_a_quantile_has_its_chance_and_its_mirror(degrees: float, chance: float) -> None:
    t = student_t_quantile(chance, degrees)
    assert student_t_cdf(t, degrees) == pytest.approx(chance, abs=1e-9)
    assert student_t_quantile(1 - chance, degrees) == pytest.approx(-t, rel=1e-6, abs=1e-9)


def test_percentile_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        interval = percentile_interval(rng.exponential(1.0, 80), 50)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= np.log(2) <= interval.high
    assert 50 <= hits <= 60  # 57 expected; fewer than 50 has a chance of one in a thousand


def test_interval_is_wider_for_runs_that_resemble_their_neighbours() -> None:
    rng = np.random.default_rng(2)
    drifting = np.repeat(rng.normal(10, 1, 25), 8)
    wide = percentile_interval(drifting, 50)
    narrow = percentile_interval(rng.permutation(drifting), 50)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_paired_ratio_and_rate() -> None:
    reference = np.array([1.0, 2.0, 4.0])
    assert paired_ratio([reference / 4], [reference]).value == 0.25
    rate = rate_interval(np.array([0.5, 0.5, 0.5]), 8)
    assert (rate.low, rate.value, rate.high) == (16, 16, 16)
