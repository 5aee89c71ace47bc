import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.profiles.report.report_charts import (
    Axis,
    headline_chart,
    linear_ticks,
    log_ticks,
    loss_chart,
    text,
    tick_name,
)
from edgeclip.profiles.report.report_data import Headline, LossCurve
from edgeclip.profiles.report.report_labels import Anchor, Box, place_labels
from edgeclip.runtime.console import digits, megabytes, seconds
from edgeclip.runtime.quality.intervals import Interval


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


def test_axis_maps_ends_and_middle() -> None:
    linear = Axis(low=0, high=10, start=100, end=0)
    assert [linear.at(v) for v in (0, 5, 10)] == [100, 50, 0]
    log = Axis(low=1, high=100, start=0, end=200, log=True)
    assert log.at(10) == pytest.approx(100)


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0.812, 0.899, 5) == [0.82, 0.84, 0.86, 0.88]
    assert linear_ticks(0, 6, 3) == [0, 2, 4, 6]
    assert log_ticks(0.9, 110, 3) == [1, 10, 100]
    assert log_ticks(1.4, 12, 7) == [1.5, 2, 3, 5, 7, 10]


@given(low=floats(1e-6, 1e6), ratio=floats(1.05, 1e6), count=st.integers(3, 8))
def test_every_axis_has_at_least_two_ticks_inside(low: float, ratio: float, count: int) -> None:
    high = low * ratio
    for ticks in (linear_ticks(low, high, count), log_ticks(low, high, count)):
        assert len(ticks) >= 2
        assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)


def test_labels_never_overlap_in_a_crowd() -> None:
    anchors = [Anchor(x=200 + 3 * k, y=150 + k, radius=10, width=90, height=30) for k in range(8)]
    area = Box(0, 0, 600, 400)
    placed = [box for box in place_labels(anchors, [], area) if box is not None]
    assert len(placed) == 8
    for at, box in enumerate(placed):
        assert area.contains(box)
        assert all(box.overlap(other) == 0 for other in placed[at + 1 :])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(floats(0, 300), floats(0, 300), floats(3, 34), floats(20, 200)),
        min_size=1,
        max_size=9,
    )
)
def test_labels_never_overlap_nor_leave_the_area(
    circles: list[tuple[float, float, float, float]],
) -> None:
    anchors = [Anchor(x=x, y=y, radius=r, width=w, height=32) for x, y, r, w in circles]
    area = Box(0, 0, 300, 320)
    placed = [box for box in place_labels(anchors, [], area) if box is not None]
    assert placed  # the first label always fits
    for at, box in enumerate(placed):
        assert area.contains(box)
        assert all(box.overlap(other) == 0 for other in placed[at + 1 :])


def test_a_label_without_room_is_left_out() -> None:
    anchors = [Anchor(x=50, y=20, radius=3, width=90, height=30) for _ in range(3)]
    assert sum(box is not None for box in place_labels(anchors, [], Box(0, 0, 100, 40))) == 1


def test_a_lone_label_stands_to_the_right() -> None:
    (box,) = place_labels(
        [Anchor(x=100, y=100, radius=10, width=80, height=20)], [], Box(0, 0, 400, 200)
    )
    assert box is not None
    assert (box.x, box.y) == (115, 90)


def test_loss_chart_draws_few_points_and_ignores_what_is_not_finite() -> None:
    steps = tuple(float(i) for i in range(5000))
    values = tuple(math.nan if i == 7 else 5 - i / 2000 for i in range(5000))
    root = ElementTree.fromstring(loss_chart(LossCurve("loss", steps, values)))
    (curve,) = (path for path in root.iter("path"))
    assert 100 <= curve.attrib["d"].count("L") <= 200
    assert "nan" not in curve.attrib["d"]
    assert "4999 logged steps" in root.attrib["aria-label"]


def test_loss_chart_turns_logarithmic_when_a_linear_axis_would_hide_the_end() -> None:
    steep = LossCurve("loss", (1.0, 2.0, 3.0), (1000.0, 10.0, 1.0))
    flat = LossCurve("loss", (1.0, 2.0, 3.0), (3.0, 2.0, 1.0))
    assert "logarithmic" in loss_chart(steep)
    assert "logarithmic" not in loss_chart(flat)


@pytest.mark.parametrize("values", [(2.0, 2.0), (0.0, 0.0), (-1.0, 1.0)])
def test_loss_chart_of_flat_and_negative_values(values: tuple[float, float]) -> None:
    ElementTree.fromstring(loss_chart(LossCurve("loss", (1.0, 1.0), values)))


def test_loss_chart_of_nothing_finite_is_nothing() -> None:
    assert loss_chart(LossCurve("loss", (1.0,), (math.inf,))) == ""


def test_headline_marks_the_good_side_of_the_bar() -> None:
    def good(direction: str) -> tuple[float, float]:
        headline = Headline(
            name="kept",
            value=Interval(0.5, 0.4, 0.6),
            bar=0.45,
            direction=">=" if direction == ">=" else "<=",
        )
        root = ElementTree.fromstring(headline_chart(headline))
        lines = {element.attrib["class"]: element for element in root.iter("line")}
        bar = float(lines["bar"].attrib["x1"])
        at = lines["good"].attrib
        assert bar in (float(at["x1"]), float(at["x2"]))
        return float(at["x1"]), float(at["x2"])

    assert good(">=")[1] == 294
    assert good("<=")[0] == 6


def test_text_is_escaped() -> None:
    assert "<b>" not in text(0, 0, "<b>&")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (12345.6, "12,346"),
        (99.96, "100.0"),
        (math.inf, "inf"),
    ],
)
def test_digits(value: float, shown: str) -> None:
    assert digits(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(41.24, "41.2 s"), (59.99, "1 min 00 s"), (3725, "1 h 02 min")]
)
def test_seconds(value: float, shown: str) -> None:
    assert seconds(value) == shown


def test_sizes_and_ticks_have_short_names() -> None:
    assert megabytes(1_980_000) == "1.98 MB"
    assert megabytes(None) == "unavailable"
    assert [tick_name(v) for v in (0, 2000, 0.5, 7.5e-4)] == ["0", "2,000", "0.5", "7.5e-4"]
