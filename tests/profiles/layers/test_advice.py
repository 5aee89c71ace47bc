import dataclasses
from typing import Any

import pytest

from edgeclip.profiles.layers.advice import MOST, advise, amdahl
from edgeclip.profiles.record.conditions import Interference
from edgeclip.profiles.record.measurement import (
    ColdStart,
    WarmUp,
)
from tests.profiles.layers.advice_cases import (
    CPU,
    REST,
    ROOFLINE,
    SLOW,
    WAITING,
    advice,
    cpu_time,
    in_precision,
    interference,
    layers,
    measurement,
    node,
    only,
    point,
    stages,
)
from tests.profiles.measure.run_cases import MACHINE, run_of


def test_nothing_is_said_of_what_is_unremarkable() -> None:
    assert advice(measurement()) == ()


def test_a_roofline_is_not_needed() -> None:
    item = measurement()
    assert advise(item, None, (), CPU, MACHINE, run_of(item)) == ()


# --- Can the figures be believed?


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contended": True, "cpu": cpu_time(waiting=0.3)}, "30% waiting"),
        ({"warm_up": WarmUp(runs=7, settled=False)}, "still moved after 7 runs"),
    ],
)
def test_a_disturbed_measurement_is_made_again(changes: dict[str, Any], words: str) -> None:
    found = only(advice(measurement(**changes)))
    assert found.topic == "measure again"
    assert words in found.evidence
    assert found.at_most is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (interference("others used 40%", disturbed=True), "others used 40%"),
        (interference(disturbed=None, throttled=True), "slowed for its heat"),
        (interference(disturbed=True), "other work"),
    ],
)
def test_a_disturbed_run_is_made_again_before_all_else(found: Interference, words: str) -> None:
    item = measurement(stages=stages(decode=90.0, run=10.0))
    first, second = advice(item, run=run_of(item, interference=found))
    assert (first.topic, second.topic) == ("measure again", "pictures")
    assert words in first.evidence


def test_peaks_of_a_disturbed_machine_are_measured_again() -> None:
    item = measurement()
    for found, topics in (
        (interference("others used 40%", disturbed=True), ["measure again"]),
        (interference(disturbed=False), []),
        (interference(disturbed=None), []),
    ):
        roof = dataclasses.replace(ROOFLINE, interference=found)
        told = advise(item, roof, (), CPU, MACHINE, run_of(item))
        assert [each.topic for each in told] == topics
        assert all("others used 40% while peaks were measured" in each.evidence for each in told)


def test_what_cannot_be_told_is_no_disturbance() -> None:
    item = measurement(contended=None, cpu=cpu_time(waiting=None))
    unknown = interference(disturbed=None)
    assert advice(item, run=run_of(item, interference=unknown)) == ()
    assert advice(item, run=run_of(item, interference=interference(disturbed=False))) == ()


# --- Pictures, start


def test_decoding_that_dominates_asks_for_smaller_pictures() -> None:
    item = measurement(stages=stages(read=1.0, decode=5.0, resize=2.0, run=2.0))
    found = only(advice(item))
    assert found.topic == "pictures"
    assert found.at_most == pytest.approx(10 / 2)
    assert "80% of 10 ms" in found.evidence
    assert "encode_pixels" in found.what


@pytest.mark.parametrize(
    "ms",
    [
        {"decode": 4.0, "resize": 1.0, "run": 5.5},  # less than half
        {"decode": 5.05, "run": 4.95},  # more, but the intervals meet
        {"decode": 9.0, "post": 1.0},  # the tower did not run
        {"run": 9.0},
    ],
)
def test_decoding_that_does_not_dominate_is_left_alone(ms: dict[str, float]) -> None:
    assert advice(measurement(stages=stages(**ms))) == ()


def cold_start(load_ms: float, import_ms: float = 300.0) -> ColdStart:
    return ColdStart(
        processes=3,
        import_ms=import_ms,
        load_ms=load_ms,
        first_run_ms=100.0,
        peak_memory_mb=None,
        file_bytes=1,
    )


OPENVINO = dataclasses.replace(CPU, engine="onnxruntime-openvino")


def test_a_slow_load_asks_for_what_was_built_before() -> None:
    found = only(advice(measurement(cold_start=cold_start(3600.0)), device=OPENVINO))
    assert found.topic == found.gains == "start"
    assert f"`edgeclip build BUNDLE --device {CPU.name} --out FOLDER` writes EP" in found.what
    assert found.at_most == pytest.approx(10)


def test_a_load_that_cannot_be_prepared_or_is_short_is_left_alone() -> None:
    assert advice(measurement(cold_start=cold_start(3600.0))) == ()  # the CPU's session
    assert advice(measurement(cold_start=cold_start(450.0, 50.0)), device=OPENVINO) == ()
    assert advice(measurement(cold_start=cold_start(600.0, 900.0)), device=OPENVINO) == ()


# --- All together


def test_at_most_three_and_the_largest_gain_first() -> None:
    sweep = (point(1, 2, 10.0), point(1, 4, 6.0), point(8, 2, 60.0))
    slow = dataclasses.replace(
        in_precision("fp32", 10.0),
        sweep=sweep,
        stages=stages(decode=9.0, run=1.0),
        layers=layers(SLOW, node(2.0, "Cast")),
    )
    found = advice(slow, in_precision("int8", 5.0))
    assert [item.topic for item in found] == ["pictures", "precision", "threads"]
    assert len(found) == MOST
    assert [item.saves for item in found] == sorted((item.saves for item in found), reverse=True)
    disturbed = dataclasses.replace(slow, contended=True)
    topics = [item.topic for item in advice(disturbed, in_precision("int8", 5.0))]
    assert topics == ["measure again", "pictures", "precision"]


def test_a_topic_comes_once() -> None:
    """Faster int8 of this run says more than what the roofline would allow."""
    slow = dataclasses.replace(in_precision("fp32", 10.0), layers=layers(WAITING, REST))
    found = [item for item in advice(slow, in_precision("int8", 5.0)) if item.topic == "precision"]
    assert "in place of fp32" in only(found).what


@pytest.mark.parametrize(
    ("share", "times", "expected"), [(0.5, float("inf"), 2), (0.5, 2, 4 / 3), (0, 9, 1)]
)
def test_amdahl(share: float, times: float, expected: float) -> None:
    assert amdahl(share, times) == pytest.approx(expected)
    assert amdahl(1.0) == pytest.approx(1000)
