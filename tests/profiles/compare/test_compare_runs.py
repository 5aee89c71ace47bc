import dataclasses

import numpy as np
import pytest
from scipy import stats

from edgeclip.profiles.compare.compare_runs import compare_runs, estimate_ratio, subjects_only_in
from edgeclip.profiles.record.conditions import Interference
from edgeclip.profiles.record.timing_statistics import ProcessSummary
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.errors import InputError
from tests.conftest import QUICK
from tests.profiles.run_cases import (
    MACHINE,
    compared,
    identity,
    measurement,
    processes,
    run_of,
    run_with,
    yardstick,
)


def test_a_ratio_is_welch_s_and_its_ends_have_their_chances() -> None:
    now = ProcessSummary(processes=5, degrees=4, mean=np.log(1.1), spread=0.03)
    baseline = ProcessSummary(processes=10, degrees=9, mean=0.0, spread=0.01)
    ratio = estimate_ratio(now, baseline)
    assert ratio.value == pytest.approx(1.1)
    assert ratio.error == pytest.approx(np.sqrt(0.03**2 / 5 + 0.01**2 / 10))
    # (0.00018 + 0.00001)^2 / (0.00018^2 / 4 + 0.00001^2 / 9)
    assert ratio.degrees == pytest.approx(4.4506, abs=1e-3)
    assert ratio.interval.low < ratio.lower_bound(0.95) < 1.1 < ratio.upper_bound(0.95)
    for confidence in (0.6, 0.95, 0.999):
        above = np.log(1.1 / ratio.lower_bound(confidence)) / ratio.error
        assert stats.t(ratio.degrees).cdf(above) == pytest.approx(confidence)
        product = ratio.lower_bound(confidence) * ratio.upper_bound(confidence)
        assert product == pytest.approx(1.1**2)


def test_processes_that_agree_to_the_last_digit_leave_no_doubt() -> None:
    side = ProcessSummary(processes=4, degrees=3, mean=0.0, spread=0.0)
    ratio = estimate_ratio(side, side)
    assert (ratio.error, ratio.degrees) == (0, 6)
    assert ratio.upper_bound(0.975) == ratio.lower_bound(0.975) == 1


def test_one_process_tells_nothing_of_others() -> None:
    one = ProcessSummary(processes=1, degrees=0, mean=0.0, spread=np.inf)
    five = ProcessSummary(processes=5, degrees=4, mean=0.0, spread=0.02)
    ratio = estimate_ratio(one, five)
    assert (ratio.value, ratio.error) == (1, np.inf)
    assert (ratio.lower_bound(0.6), ratio.upper_bound(0.6)) == (0, np.inf)


def test_intervals_hold_the_true_ratio_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    found = [compared(rng, 1.2).ratio.interval for _ in range(150)]
    hits = sum(item.low <= 1.2 <= item.high for item in found)
    assert 134 <= hits <= 149  # 142 expected


def test_the_yardstick_takes_the_machine_out_of_the_ratio() -> None:
    rng = np.random.default_rng(1)
    stick, subject = processes(rng, 1.0), processes(rng, 3.0)
    # Another hour: each process half as fast again, or more, and slower as it goes on.
    pace = [np.linspace(1.5, 1.5 + 0.2 * number, len(stick[0])) for number in range(5)]
    later = [runs * 1.1 * by for runs, by in zip(processes(rng, 3.0), pace, strict=True)]
    stick_later = [runs * by for runs, by in zip(processes(rng, 1.0), pace, strict=True)]
    now = run_with({"fp32": later}, yardstick=yardstick(stick_later))
    baseline = run_with({"fp32": subject}, yardstick=yardstick(stick))
    (found,) = compare_runs(now, baseline)
    assert found.ratio is found.to_yardstick
    assert found.ratio.value == pytest.approx(1.1, rel=0.02)
    assert found.ratio.interval.low > 1.05
    assert found.times.value == pytest.approx(1.1 * 1.7, rel=0.05)
    assert found.times.interval.low < 1.1 * 1.6 < 1.1 * 1.8 < found.times.interval.high
    for other in (None, yardstick(stick, "another")):
        (plain,) = compare_runs(dataclasses.replace(now, yardstick=other), baseline)
        assert plain.to_yardstick is None
        assert plain.ratio is plain.times


def test_a_yardstick_that_did_not_run_beside_the_subject_is_refused() -> None:
    rng = np.random.default_rng(2)
    run = run_with({"fp32": processes(rng, 1.0)}, yardstick=yardstick(processes(rng, 1.0)[:4]))
    with pytest.raises(InputError, match="same processes and rounds"):
        compare_runs(run, run)


def test_subjects_are_paired_by_part_and_name() -> None:
    rng = np.random.default_rng(3)
    names = {name: processes(rng, ms) for name, ms in (("fp32", 4.0), ("int8", 1.0))}
    text = measurement("fp32", processes(rng, 2.0), part="text")
    now = run_of(*run_with(names).measurements, text)
    baseline = run_with({"int8": names["int8"], "fp16": names["fp32"]})
    (found,) = compare_runs(now, baseline)
    assert (found.part, found.name, found.processes, found.rounds) == ("image", "int8", (5, 5), 20)
    assert found.ratio.value == pytest.approx(1)
    assert found.differences == ()
    assert subjects_only_in(now, baseline) == ("image fp32", "text fp32")
    assert subjects_only_in(baseline, now) == ("image fp16",)
    with pytest.raises(InputError, match="now text fp32; in the baseline image int8, image fp16"):
        compare_runs(run_of(text), baseline)


def test_measurements_without_single_runs_are_refused() -> None:
    run = run_of(measurement("fp32", processes(np.random.default_rng(4), 1.0), samples_ms=()))
    with pytest.raises(InputError, match="image fp32 kept no single runs"):
        compare_runs(run, run)


def test_everything_that_differs_is_named() -> None:
    rng = np.random.default_rng(5)
    samples = processes(rng, 1.0)
    machine = dataclasses.replace(
        MACHINE, cpu="other", os="Linux 7", packages=(("numpy", "2"), ("onnxruntime", "1.31"))
    )
    other = identity(threads=4, engine="tensorrt", sha256="b" * 64, input_shape=(1, 96, 96, 3))
    workload = dataclasses.replace(run_of().workload, processes=4)
    interference = Interference(
        waiting_share=0.3,
        steal_share=None,
        others_share=None,
        throttled=None,
        disturbed=True,
        reasons=("much",),
    )
    now = run_of(
        measurement("fp32", samples, identity=other, input_shape=(1, 96, 96, 3)),
        machine=machine,
        workload=workload,
        interference=interference,
    )
    (found,) = compare_runs(now, run_of(measurement("fp32", samples, contended=True)))
    assert [item.what for item in found.differences] == [
        "machine",
        "input shape",
        "system",
        "workload",
        "engine",
        "threads",
        "bundle",
        "packages",
    ]
    shape, packages = found.difference("input shape"), found.difference("packages")
    assert shape is not None
    assert packages is not None
    assert (shape.now, shape.baseline) == ("1 x 96 x 96 x 3", "1 x 64 x 64 x 3")
    assert packages.now == "numpy 2, onnxruntime 1.31"
    assert packages.baseline == "numpy absent, onnxruntime absent"
    assert found.disturbed == ("now", "baseline")


@pytest.mark.parametrize(
    "workload",
    [
        dataclasses.replace(QUICK, repeats=40),
        dataclasses.replace(QUICK, turn_seconds=2.0),
        dataclasses.replace(QUICK, min_warmup_runs=50),
        dataclasses.replace(QUICK, max_warmup_seconds=9.0),
    ],
)
def test_other_amounts_are_refused(workload: Workload) -> None:
    now = run_with({"fp32": processes(np.random.default_rng(6), 1.0)}, workload=QUICK)
    other = dataclasses.replace(now, workload=workload)
    with pytest.raises(InputError, match=r"different amounts \(.* with the same --workload"):
        compare_runs(now, other)


def test_more_processes_of_the_same_amount_are_compared() -> None:
    rng = np.random.default_rng(6)
    now = run_with({"fp32": processes(rng, 1.0)})
    more = run_with({"fp32": processes(rng, 1.0, count=9)})
    workload = dataclasses.replace(now.workload, processes=9)
    (found,) = compare_runs(now, dataclasses.replace(more, workload=workload))
    assert found.processes == (5, 9)
    assert [item.what for item in found.differences] == ["workload"]


def test_the_fastest_of_more_rounds_is_no_faster_program() -> None:
    """The same workload gives a run that has more time more rounds, and a faster fastest one."""
    rng = np.random.default_rng(7)
    sides = [[rng.exponential(0.2, rounds) + 1 for _ in range(200)] for rounds in (10, 300)]
    few, many = (run_with({"fp32": side}) for side in sides)
    (found,) = compare_runs(few, many)
    assert found.fastest is not None
    assert found.fastest.interval.low < 1 < found.fastest.interval.high
    every = [np.median([runs.min() for runs in side]) for side in sides]
    assert every[0] / every[1] > 1.01


def test_the_fastest_runs_are_those_of_each_process_over_the_yardstick_s() -> None:
    """A machine of half the speed, on which other programs slow most runs of every process."""
    stick = [np.array([1.0, 3.0, 1.2]), np.array([2.0, 4.0, 9.0])]
    ours = [np.array([9.0, 2.0, 7.0]), np.array([8.0, 4.0, 5.0])]
    before = [np.array([1.0, 1.5, 1.1]), np.array([1.0, 8.0, 2.0])]
    now = run_of(measurement("fp32", ours), yardstick=yardstick(stick))
    baseline = run_of(measurement("fp32", before), yardstick=yardstick([np.ones(3), np.ones(3)]))
    (found,) = compare_runs(now, baseline)
    assert found.fastest is not None
    assert found.fastest.value == pytest.approx(2)
    assert found.evidence == (found.ratio, found.fastest)
    (plain,) = compare_runs(dataclasses.replace(now, yardstick=None), baseline)
    assert plain.fastest is not None
    assert plain.fastest.value == pytest.approx(8**0.5)
