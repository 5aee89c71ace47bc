"""Percentiles, paired ratios and their intervals; Student's t distribution."""

from collections.abc import Sequence

import numpy as np
import pytest

from edgeclip.profiles.record.timing_statistics import (
    RatioEstimate,
    Runs,
    estimate_paired_ratio,
    independent_runs,
    latency_of,
    paired_ratio,
    percentile_interval,
    process_medians,
    rate_interval,
    round_ratios,
    surely_below,
)
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval


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
        assert found.p90_ms is not None
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
        assert part is not None
        assert part.value == pytest.approx(2)
        assert part.low < 1 < 4 < part.high  # two processes tell little


def test_processes_that_agree_exactly_leave_no_doubt() -> None:
    found = latency_of([np.full(20, 3.0)] * 4)
    assert found.p99_ms is None
    assert found.p95_ms is not None
    assert [found.p50_ms.low, found.p95_ms.high] == pytest.approx([3, 3])


def test_one_process_is_judged_by_its_runs() -> None:
    runs = np.random.default_rng(6).exponential(1, 200)
    assert latency_of([runs]).p90_ms == percentile_interval(runs, 90)


@pytest.mark.parametrize(
    ("count", "told"), [(20, 1), (60, 2), (150, 3), (600, 4)], ids=["p50", "p90", "p95", "p99"]
)
def test_a_percentile_of_one_process_is_told_where_its_interval_can_be_known(
    count: int, told: int
) -> None:
    found = latency_of([np.random.default_rng(7).exponential(1, count)])
    shown = [found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.p99_9_ms]
    assert [item is not None for item in shown] == [True] * told + [False] * (5 - told)
    assert all(0 < item.low <= item.value <= item.high < np.inf for item in shown if item)


def test_the_median_of_too_few_runs_has_no_interval() -> None:
    found = latency_of([np.array([3.0, 1.0, 2.0])])
    assert found.p50_ms == Interval(2.0, 0.0, np.inf)
    rate = rate_interval(np.array([0.5, 0.5, 0.5]), 8)
    assert rate == Interval(16.0, 0.0, np.inf)


def test_a_drift_that_both_share_leaves_their_ratio_alone() -> None:
    rng = np.random.default_rng(8)
    reference = [np.linspace(1, 3, 90) * rng.lognormal(0, 0.001, 90) for _ in range(5)]
    values = [runs * 1.25 * rng.lognormal(0, 0.001, 90) for runs in reference]
    ratio = paired_ratio(values, reference)
    assert ratio.low < 1.25 < ratio.high
    assert ratio.high - ratio.low < 0.005
    assert latency_of(values).p50_ms.value == pytest.approx(2.5, rel=0.01)


def test_process_medians_tell_the_spread_between_processes() -> None:
    rng = np.random.default_rng(9)
    apart = process_medians(processes(rng, count=40, spread=0.05, noise=0.001))
    assert apart.spread == pytest.approx(0.05, rel=0.3)
    assert apart.mean == pytest.approx(np.log(2), abs=0.03)
    alone = process_medians([np.ones(5)])
    assert (alone.spread, alone.degrees) == (np.inf, 0)


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
    """The same processes: in turns fast and slow, and first the fast, then the slow ones."""
    fast, slow = np.full(50, 1.0), np.full(50, 1.2)
    turns = latency_of([fast, slow] * 5).p50_ms
    minutes = latency_of([fast] * 5 + [slow] * 5).p50_ms
    assert turns.value == pytest.approx(minutes.value)
    assert minutes.high / minutes.low > 1.2 > turns.high / turns.low


def autoregressive(rng: np.random.Generator, count: int, correlation: float) -> Runs:
    """Standard normal values, each of which correlates with the one before."""
    found = rng.normal(0, 1, count)
    for at in range(1, count):
        found[at] = correlation * found[at - 1] + np.sqrt(1 - correlation**2) * found[at]
    return found


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_percentiles_of_one_process_cover_the_true_ones(correlation: float) -> None:
    rng = np.random.default_rng(1)
    hits = np.zeros(2)
    for _ in range(300):
        runs = 2 * np.exp(0.1 * autoregressive(rng, 200, correlation))
        ninety = percentile_interval(runs, 90)
        hits += [
            covered(percentile_interval(runs, 50), 2),
            covered(ninety, 2 * np.exp(0.12816)),
        ]
    assert min(hits) >= 270  # 285 expected; fewer than 270 has a chance of one in three hundred


def test_runs_that_resemble_their_neighbours_count_for_less() -> None:
    rng = np.random.default_rng(2)
    drifting = np.repeat(rng.normal(10, 1, 25), 8)
    assert independent_runs(rng.normal(0, 1, 200)) > 120
    assert independent_runs(drifting) < 50
    assert independent_runs(np.ones(30)) == 30  # to the last digit: the clock is too coarse
    wide = percentile_interval(drifting, 50)
    narrow = percentile_interval(rng.permutation(drifting), 50)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


@pytest.mark.parametrize("count", [10, 27])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_processes_that_resemble_their_neighbours_are_covered(
    count: int, correlation: float
) -> None:
    rng = np.random.default_rng(3)
    trials = (2 * np.exp(0.02 * autoregressive(rng, count, correlation)) for _ in range(600))
    found = [latency_of([np.array([ms]) for ms in medians]).p50_ms for medians in trials]
    assert sum(covered(item, 2) for item in found) >= 0.93 * 600 - 2 * 6.3


def test_a_ratio_over_processes_is_student_s_and_of_one_process_not_known() -> None:
    reference = np.array([1.0, 2.0, 4.0])
    several = [reference * by for by in (0.25, 0.27, 0.23)]
    ratio = estimate_paired_ratio(several, [reference] * 3)
    logs = np.log([0.25, 0.27, 0.23])
    assert ratio.value == pytest.approx(np.exp(logs.mean()))
    assert np.log(ratio.upper_bound(0.975) / ratio.value) == pytest.approx(
        4.303 * logs.std(ddof=1) / np.sqrt(3), rel=1e-3
    )
    assert paired_ratio(several, [reference] * 3) == ratio.interval
    alone = estimate_paired_ratio([reference / 4], [reference])
    assert (alone.value, alone.lower_bound(0.9), alone.upper_bound(0.9)) == (0.25, 0, np.inf)
    assert paired_ratio([reference / 4], [reference]).value == 0.25


def test_surely_below_is_shown_for_all_together() -> None:
    ratios = [
        RatioEstimate(value=value, error=0.01, degrees=5) for value in (0.9, 0.968, 0.97, 1.2)
    ]
    assert surely_below(ratios) == (True, False, False, False)
    assert surely_below(ratios[1:2]) == (True,)  # t is 2.571 of one, 3.534 of the three left
    assert surely_below(ratios, 0.5) == (False,) * 4
    unknown = RatioEstimate(value=0.1, error=np.inf, degrees=0)
    assert surely_below([unknown]) == (False,)
