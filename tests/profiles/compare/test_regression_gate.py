import dataclasses
import re

import numpy as np
import pytest

from edgeclip.profiles.compare.compare_runs import Comparison, compare_runs, estimate_ratio
from edgeclip.profiles.compare.regression_gate import (
    parse_max_regression,
    regression_gate,
)
from edgeclip.profiles.record.timing_statistics import ProcessSummary
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.three_outcomes import Outcome
from tests.profiles.run_cases import (
    MACHINE,
    compared,
    measurement,
    processes,
    run_of,
    run_with,
    yardstick,
)

MODEL = compared(np.random.default_rng(0), 1.0)
TRIALS = 400


def drawn(
    rng: np.random.Generator, ratio: float, *, spread: float = 0.015, count: int = 5
) -> Comparison:
    """A comparison as `compare_runs` would make it, without the cost of single runs."""
    sides = []
    for truth in (ratio, 1.0):
        logs = np.log(truth) + rng.normal(0, spread, count)
        sides.append(
            ProcessSummary(
                processes=count,
                mean=logs.mean(),
                spread=logs.std(ddof=1),
                degrees=count - 1,
            )
        )
    return dataclasses.replace(
        MODEL, times=estimate_ratio(*sides), fastest=None, processes=(count, count)
    )


def share(outcome: Outcome, ratio: float, *, spread: float = 0.015, subjects: int = 1) -> float:
    rng = np.random.default_rng(1)
    trials = ([drawn(rng, ratio, spread=spread) for _ in range(subjects)] for _ in range(TRIALS))
    return sum(regression_gate(trial, 0.05).outcome == outcome for trial in trials) / TRIALS


def test_a_slowdown_of_twice_the_bound_is_found_and_one_of_nothing_passes() -> None:
    assert share("failed", 1.10) >= 0.95
    assert share("passed", 1.00) >= 0.95
    assert share("failed", 1.00) <= 0.01


def test_what_just_costs_the_bound_fails_rarely_and_passes_rarely() -> None:
    assert share("failed", 1.05) <= 0.07
    assert share("passed", 1.05) <= 0.07


def test_many_subjects_together_raise_no_more_false_alarms_than_one() -> None:
    assert share("failed", 1.05, subjects=8) <= 0.07
    assert share("passed", 1.05, subjects=8) <= 0.01


def test_noise_is_no_evidence() -> None:
    assert share("undecided", 1.10, spread=0.1) >= 0.8
    assert share("failed", 1.00, spread=0.1) <= 0.01


def with_fastest(typical: Comparison, fastest: Comparison) -> Comparison:
    return dataclasses.replace(typical, fastest=fastest.times)


def shares(
    typical: float, fastest: float, *, seed: int, count: int = 5, spreads: tuple[float, float]
) -> dict[Outcome, float]:
    rng = np.random.default_rng(seed)
    found = [
        regression_gate(
            [
                with_fastest(
                    drawn(rng, typical, spread=spreads[0], count=count),
                    drawn(rng, fastest, spread=spreads[1], count=count),
                )
            ],
            0.05,
        ).outcome
        for _ in range(TRIALS)
    ]
    outcomes: tuple[Outcome, ...] = ("passed", "failed", "undecided")
    return {outcome: found.count(outcome) / TRIALS for outcome in outcomes}


def test_both_evidences_must_be_inside_the_bound_to_pass() -> None:
    level = 0.05 + 3 * np.sqrt(0.05 * 0.95 / TRIALS)
    for typical, fastest in ((1.051, 1.0), (1.0, 1.051), (1.051, 1.051)):
        found = shares(typical, fastest, seed=6, spreads=(0.01, 0.01))
        assert found["passed"] <= level
    assert shares(1.0, 1.0, seed=6, spreads=(0.01, 0.01))["passed"] >= 0.9


def test_either_evidence_shows_a_regression() -> None:
    """As where other programs hide what is typical, or where only some runs are slower."""
    for typical, fastest, spreads in (
        (1.12, 1.12, (0.1, 0.01)),
        (1.12, 1.0, (0.01, 0.01)),
        (1.0, 1.12, (0.01, 0.01)),
    ):
        found = shares(typical, fastest, seed=7, spreads=spreads)
        assert found["failed"] >= 0.9
        assert found["passed"] <= 0.01
    for typical, fastest in ((1.05, 1.0), (1.0, 1.05), (1.05, 1.05)):
        assert shares(typical, fastest, seed=8, spreads=(0.01, 0.01))["failed"] <= 0.07


def test_a_verdict_says_what_is_shown() -> None:
    rng = np.random.default_rng(2)
    slow, same, fast = (drawn(rng, ratio) for ratio in (1.3, 1.0, 0.8))
    verdict = regression_gate([same, slow, fast], 0.05)
    assert [item.outcome for item in verdict.judged] == ["passed", "failed", "passed"]
    assert verdict.outcome == "failed"
    assert verdict.fails()
    assert verdict.judged[1].lower > 1.2
    assert verdict.judged[2].upper < 0.9
    assert {item.advice for item in verdict.judged} == {""}
    alone = regression_gate([slow], 0.05).judged[0]
    assert alone.lower > verdict.judged[1].lower  # Holm asks more of one of three
    assert not regression_gate([same, fast], 0.05).fails(undecided_fails=True)


def test_what_was_not_measured_is_undecided() -> None:
    verdict = regression_gate([MODEL], 0.10, not_measured=["text fp32"])
    assert verdict.judged[0].outcome == "passed"
    assert verdict.outcome == "undecided"
    assert not verdict.fails()
    assert verdict.fails(undecided_fails=True)


def test_following_the_advice_decides() -> None:
    rng = np.random.default_rng(3)
    noisy = drawn(rng, 1.10, spread=0.03)
    judged = regression_gate([noisy], 0.05).judged[0]
    assert judged.outcome == "undecided"
    words = judged.advice.split()
    assert words[:3] == ["too", "noisy:", "about"]
    count = int(words[3])
    assert 6 < count <= 50
    assert "tell 10% slower from no slower" in judged.advice
    several = [drawn(rng, 1.10, spread=0.03, count=count) for _ in range(100)]
    assert sum(regression_gate([one], 0.05).outcome == "failed" for one in several) >= 80


@pytest.mark.parametrize(
    ("spread", "advice"),
    [
        (0.05, r"too noisy: about 2\d processes in each run \(5 now\) would tell 10% slower"),
        (0.50, r"not even 50 processes in each run \(5 now\) would tell 10% slower"),
        (0.01, r"^the change lies near the bound: not even 50 processes"),
    ],
)
def test_advice_is_about_what_limits(spread: float, advice: str) -> None:
    slower = ProcessSummary(processes=5, mean=float(np.log(1.045)), spread=spread, degrees=4)
    same = dataclasses.replace(slower, mean=0.0)
    unsure = dataclasses.replace(MODEL, times=estimate_ratio(slower, same), fastest=None)
    assert re.search(advice, regression_gate([unsure], 0.05).judged[0].advice)


def test_one_process_decides_nothing() -> None:
    rng = np.random.default_rng(4)
    runs = [run_with({"fp32": processes(rng, ms, count=1)}) for ms in (2.0, 1.0)]
    (found,) = compare_runs(*runs)
    judged = regression_gate([found], 0.05).judged[0]
    assert judged.outcome == "undecided"
    assert judged.advice.startswith("one process tells nothing of others")


def test_another_machine_needs_the_yardstick_and_permission() -> None:
    rng = np.random.default_rng(5)
    samples, stick = processes(rng, 1.0), yardstick(processes(rng, 1.0))
    other = dataclasses.replace(MACHINE, cpu="other")
    now = run_of(measurement("fp32", samples), machine=other, yardstick=stick)
    baseline = run_of(measurement("fp32", samples), yardstick=stick)
    found = compare_runs(now, baseline)
    with pytest.raises(InputError, match=r"of another machine \(test, .* with --other-machine"):
        regression_gate(found, 0.05)
    assert regression_gate(found, 0.05, allow_difference=True).outcome == "passed"
    plain = compare_runs(dataclasses.replace(now, yardstick=None), baseline)
    with pytest.raises(InputError, match=r"measure it anew on this one$"):
        regression_gate(plain, 0.05, allow_difference=True)


def test_another_input_is_other_work() -> None:
    samples = processes(np.random.default_rng(6), 1.0)
    stick = yardstick(samples)
    runs = [
        run_of(measurement("fp32", samples, input_shape=shape), yardstick=stick)
        for shape in ((1, 77), (1, 16))
    ]
    with pytest.raises(InputError, match="ran on 1 x 77 values, and in the baseline on 1 x 16"):
        regression_gate(compare_runs(*runs), 0.05, allow_difference=True)


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("0.05", 0.05), (" 2.5 % ", 0.025), ("150%", 1.5)]
)
def test_bounds_are_read(text: str, value: float) -> None:
    assert parse_max_regression(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "0", "0%", "-5%", "nan", "inf%", "5%%", "1e999"])
def test_bounds_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"such as 5% or 0\.05"):
        parse_max_regression(text)


def test_a_forgotten_percent_sign_is_noticed() -> None:
    with pytest.raises(InputError, match="--max-regression 5 is 500%: write 5% if you mean that"):
        parse_max_regression("5")


def test_nothing_to_judge_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to judge"):
        regression_gate([], 0.05)
    with pytest.raises(InputError, match="such as 5%"):
        regression_gate([MODEL], 0.0)
