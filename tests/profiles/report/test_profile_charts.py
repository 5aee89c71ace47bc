import dataclasses
import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.profiles.record.measurement import Roofline
from edgeclip.profiles.report.chart_histogram import histogram
from edgeclip.profiles.report.chart_lines import BatchPoint, Series, batch_chart, shared_limits
from edgeclip.profiles.report.chart_parts import (
    SHAPES,
    bounds,
    even_names,
    fit,
    marker,
    room_axis,
    spread_out,
)
from edgeclip.profiles.report.chart_roofline import RoofPoint, roofline_chart
from edgeclip.profiles.report.chart_rows import Dot, Row, RowChart, row_chart
from edgeclip.profiles.report.chart_stack import Bar, stack_chart
from edgeclip.profiles.report.chart_tradeoff import TradePoint, frontier, trade_chart
from edgeclip.profiles.report.profile_data import QualityUnit
from edgeclip.profiles.report.report_charts import text_width
from edgeclip.profiles.report.report_data import ParetoPoint
from edgeclip.profiles.sensors.interference import judge_interference
from edgeclip.runtime.quality.intervals import Interval

LONG = "a subject with a name <b>far</b> too long & more, in int8 · on a device of some name"
both = pytest.mark.parametrize("narrow", [False, True])
positive = st.floats(1e-4, 1e6, allow_nan=False)


def around(value: float, share: float = 0.05) -> Interval:
    return Interval(value, value * (1 - share), value * (1 + share))


def inside(svg: str) -> ElementTree.Element:
    """Parse a picture; every text that is not turned must lie inside its frame."""
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    turned = {e for g in root.iter("g") if "transform" in g.attrib for e in g.iter("text")}
    for element in root.iter("text"):
        if element in turned:
            continue
        long = text_width(element.text or "", 13)
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        left = x - {"start": 0.0, "middle": long / 2, "end": long}[element.attrib["text-anchor"]]
        # The guess of a text's width is generous.
        assert left >= -6, element.text
        assert left + long <= width + 6, element.text
        assert 0 < y <= height, element.text
    assert "nan" not in svg
    assert "inf" not in re.sub(r"<title>.*?</title>|<text.*?</text>|aria-label=\".*?\"", "", svg)
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def test_text_that_is_too_wide_keeps_its_ends() -> None:
    assert fit("short", 200) == "short"
    cut = fit("abcdefghijklmnopqrstuvwxyz", 80)
    assert text_width(cut, 13) <= 80
    assert cut.startswith("abc")
    assert cut.endswith("xyz")
    assert "…" in cut


def test_shapes_differ_and_repeat() -> None:
    drawn = [marker(shape, 10, 10) for shape in range(len(SHAPES))]
    assert len(set(drawn)) == len(SHAPES)
    assert marker(len(SHAPES), 10, 10) == drawn[0]
    assert "&lt;" in marker(0, 1, 1, title="<x>")


@given(st.lists(st.floats(0, 200, allow_nan=False), min_size=1, max_size=8))
def test_names_are_moved_apart(places: list[float]) -> None:
    moved = spread_out(places, 15, 0, 200)
    for low, high in itertools.pairwise(sorted(moved)):
        assert high - low >= 15 - 1e-6
    assert min(moved) >= -1e-6
    assert max(moved) <= 200 + 1e-6


def test_names_that_have_room_stay() -> None:
    assert spread_out([20, 80, 50], 15, 0, 200) == [20, 80, 50]


def test_ticks_have_as_many_decimals_as_their_step() -> None:
    assert [name for _, name in even_names(0.99965, 1.0001, 4)][-1] == "1.0000"
    assert [name for _, name in even_names(0, 10, 2)] == ["0", "5", "10"]


def test_an_axis_turns_logarithmic_by_itself() -> None:
    assert room_axis(1, 100, start=0, end=1, log=None).log
    assert not room_axis(1, 5, start=0, end=1, log=None).log
    assert not room_axis(0, 5, start=0, end=1, log=None).log


@both
def test_rows_show_every_label_and_figure(narrow: bool) -> None:
    rows = (
        Row("fp32", (Dot(around(2.0)), Dot(around(3.0), 1)), "2.00 ms"),
        Row(LONG, (Dot(around(200.0)),), "200 ms"),
    )
    chart = RowChart(
        rows=rows,
        axis_name="ms",
        label="Latency",
        legend=tuple(enumerate(("p50", "p90", "p95", "p99", "p99.9"))),
        reference=(1.0, "as slow as the reference"),
    )
    root = inside(row_chart(chart, narrow=narrow))
    shown = texts(root)
    assert {"fp32", "2.00 ms", "200 ms", "ms (log)", "as slow as the reference", "p99.9"} <= {
        *shown
    }
    assert "2.00 ms" in root.attrib["aria-label"]
    assert LONG in root.attrib["aria-label"]


@both
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(positive, min_size=1, max_size=5), min_size=1, max_size=6))
def test_rows_stay_inside(narrow: bool, values: list[list[float]]) -> None:
    rows = tuple(
        Row(f"row {at}", tuple(Dot(around(v), k) for k, v in enumerate(row)), "figure")
        for at, row in enumerate(values)
    )
    chart = RowChart(rows=rows, axis_name="ms", label="rows")
    root = inside(row_chart(chart, narrow=narrow))
    width = float(root.attrib["viewBox"].split()[2])
    for element in root.iter("line"):
        assert -1 <= float(element.attrib["x1"]) <= width + 1


@both
def test_an_interval_over_decades_does_not_hide_the_others(narrow: bool) -> None:
    wide = Interval(1.0, 1e-9, 1e9)
    rows = (Row("a", (Dot(wide),)), Row("b", (Dot(around(1.5)),)))
    svg = row_chart(RowChart(rows=rows, axis_name="ms", label="x"), narrow=narrow)
    root = inside(svg)
    width = float(root.attrib["viewBox"].split()[2])
    whiskers = [e.attrib for e in root.iter("line") if e.attrib["class"] == "whisker"]
    assert len(whiskers) == 1 + 3  # neither end of the first is drawn
    assert all(0 <= float(one[x]) <= width for one in whiskers for x in ("x1", "x2"))
    assert bounds([wide]) == (0.25, 4.0)
    assert bounds([Interval(-1.0, -2.0, 0.5)]) == (-2.0, 0.5)


def test_no_rows_are_no_chart() -> None:
    assert row_chart(RowChart(rows=(), axis_name="ms", label="x"), narrow=False) == ""


def counts(root: ElementTree.Element) -> list[int]:
    titles = [bar.findtext("title") or "" for bar in root.iter("rect")]
    return [int(title.rpartition(": ")[2].replace(",", "")) for title in titles]


def test_a_histogram_shows_the_body_and_counts_the_rest() -> None:
    body = np.random.default_rng(0).normal(1.0, 0.01, 997)
    samples = np.concatenate([body, [3.0, 4.0, 40.0]])
    root = inside(histogram("int8", samples, median=around(1.0), tail=("p99", around(1.02))))
    assert sum(counts(root)) == 997
    assert {"1,000 runs", "p50 1.00", "p99 1.02", "ms", "3 slower, up to 40.0 →"} <= {*texts(root)}
    assert "3 slower, up to 40.0" in root.attrib["aria-label"]


def test_a_lone_run_is_seen() -> None:
    samples = np.concatenate([np.full(900, 1.0), np.full(99, 30.0), [5.0]])
    root = inside(histogram("int8", samples, median=around(1.0), tail=None))
    assert sum(counts(root)) == 1000
    assert "ms (log)" in texts(root)
    assert min(float(bar.attrib["height"]) for bar in root.iter("rect")) == 2.0


def test_histograms_of_few_and_of_odd_numbers() -> None:
    def draw(*samples: float) -> str:
        return histogram(LONG, np.array(samples), median=around(2.0), tail=("p90", around(2.0)))

    assert draw() == ""
    assert draw(np.nan, -1.0, 0.0) == ""
    assert counts(inside(draw(2.0, 2.0, 2.0))) == [3]
    assert sum(counts(inside(draw(2.0, np.inf, 3.0)))) == 2


def sweep(name: str, *rates: float) -> Series:
    return Series(
        name,
        tuple(
            BatchPoint(batch=4**at, rate=around(rate), ms=around(1000 * 4**at / rate))
            for at, rate in enumerate(rates)
        ),
    )


def test_lines_are_named_at_their_ends_without_overlap() -> None:
    series = [sweep(f"{n} threads", 100 + n, 109 + n, 120 + n) for n in (1, 2, 4, 8)]
    root = inside(batch_chart("int8", series, shared_limits(series)))
    ends = [float(e.attrib["y"]) for e in root.iter("text") if "threads" in (e.text or "")]
    assert len(ends) == 4
    assert min(b - a for a, b in itertools.pairwise(sorted(ends))) >= 14.9
    assert {"1", "4", "16"} <= {*texts(root)}  # the batches
    assert "105 at 4" not in root.attrib["aria-label"]
    assert "8 threads: 108 at 1, 9.26 ms" in root.attrib["aria-label"]


def test_lines_of_one_batch_are_no_chart() -> None:
    series = [sweep("1 thread", 3.0)]
    assert batch_chart("x", series, shared_limits(series)) == ""


@both
def test_stacked_parts_are_named_or_numbered_and_fill_their_bar(narrow: bool) -> None:
    bars = [
        Bar("one", (("decode", 6.0), ("run", 3.5), ("post", 0.1)), "9.60 ms"),
        Bar(LONG, (("decode", 1.0), ("run", 1.0)), "2.00 ms"),
    ]
    root = inside(stack_chart(bars, axis_name="ms", label="Steps", narrow=narrow))
    shown = texts(root)
    assert "1 decode" in shown
    assert "9.60 ms" in shown
    rects = list(root.iter("rect"))
    assert len(rects) == 5
    for left, right in itertools.pairwise(rects[:3]):
        end = float(left.attrib["x"]) + float(left.attrib["width"])
        assert end == pytest.approx(float(right.attrib["x"]), abs=0.2)
    assert {e.attrib["class"] for e in root.iter("g")} >= {"s0", "s1", "s2"}


def test_bars_of_nothing_are_no_chart() -> None:
    assert stack_chart([], axis_name="ms", label="x", narrow=False) == ""
    assert stack_chart([Bar("a", (("b", 0.0),), "")], axis_name="ms", label="", narrow=True) == ""


def trade(name: str, quality: float, ms: float, size: int = 10**6) -> TradePoint:
    wide = Interval(quality, quality - 1e-4, quality + 1e-4)
    point = ParetoPoint(name=name, role="student", quality=wide, latency_ms=around(ms), bytes=size)
    return TradePoint(point, (f"{ms} ms", "12 mJ"))


@both
@pytest.mark.parametrize(
    ("unit", "values", "tick"),
    [
        ("cosine", (0.9999, 0.9971), "0.998"),
        ("share", (0.91, 0.95), "92%"),
        ("points", (0.0, -0.35), "-0.2"),
    ],
)
def test_tradeoff_in_any_unit(
    narrow: bool, unit: QualityUnit, values: tuple[float, float], tick: str
) -> None:
    points = [trade("fp32", values[0], 2.0, 4_000_000), trade("int8 <x>", values[1], 1.0)]
    svg = trade_chart(points, quality_name="quality", unit=unit, latency_name="p50", narrow=narrow)
    root = inside(svg)
    assert any(tick in shown for shown in texts(root)), texts(root)
    assert {"fp32", "int8 <x>", "2.0 ms · 12 mJ"} <= {*texts(root)}
    radii = [float(r) for r in re.findall(r'r="([\d.]+)" class="area"', svg)]
    assert radii[0] / radii[1] == pytest.approx(2, rel=0.02)


def test_frontier_keeps_only_what_nothing_beats() -> None:
    slow, fast, beaten = (
        trade(name, quality, ms).point
        for name, quality, ms in (("slow", 0.9, 9.0), ("fast", 0.8, 1.0), ("no", 0.79, 2.0))
    )
    assert frontier([slow, beaten, fast]) == [fast, slow]


@both
def test_tradeoff_shows_a_share_to_reach_and_says_every_fact(narrow: bool) -> None:
    points = [trade("fp32", 0.8, 2.0), trade("int8 & <friends>", 0.84, 1.0)]
    root = inside(
        trade_chart(
            points,
            quality_name="R@1",
            unit="share",
            latency_name="pair",
            narrow=narrow,
            bar=0.6,
        )
    )
    assert "bar 60.0%" in texts(root)
    assert "int8 & <friends>: 1.0 ms, 12 mJ" in root.attrib["aria-label"]
    assert root.findtext("title") == root.attrib["aria-label"]


@both
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 1), positive), min_size=1, max_size=7))
def test_tradeoff_stays_inside(narrow: bool, spots: list[tuple[float, float]]) -> None:
    points = [trade(f"m{at}", q, ms) for at, (q, ms) in enumerate(spots)]
    svg = trade_chart(points, quality_name="q", unit="points", latency_name="p50", narrow=narrow)
    inside(svg)


def test_tradeoff_of_equal_sizes_of_nothing() -> None:
    inside(
        trade_chart(
            [trade("a", 1.0, 1.0, 0)],
            quality_name="q",
            unit="cosine",
            latency_name="p50",
            narrow=True,
        )
    )
    assert trade_chart([], quality_name="", unit="share", latency_name="", narrow=True) == ""


def roof(bandwidth: float = 20.0) -> Roofline:
    return Roofline(
        threads=2,
        peak_gflops=(("fp32", around(230.0)), ("int8", around(800.0))),
        bandwidth_gb_s=around(bandwidth),
        method="measured",
    )


@both
def test_roofline_names_roofs_and_layers(narrow: bool) -> None:
    points = [
        RoofPoint(number=at, name=f"layers.{at}/fc1", intensity=x, gflops=y, share=0.1)
        for at, (x, y) in enumerate([(40, 300), (38, 280), (0.1, 2), (12, 150)], 1)
    ]
    root = inside(roofline_chart(points, roof(), title="int8", named=3, narrow=narrow))
    shown = texts(root)
    assert {"fp32 230", "int8 800", "memory 20.0 GB/s"} <= {*shown}
    assert ("1" if narrow else "1 layers.1/fc1") in shown
    assert "4 layers.4/fc1" not in shown
    assert len(list(root.iter("circle"))) == 8


@both
def test_a_disturbed_roofline_is_marked(narrow: bool) -> None:
    point = RoofPoint(number=1, name="a", intensity=1.0, gflops=10.0, share=1.0)
    for share in (0.01, 0.4):
        marked = dataclasses.replace(roof(), interference=judge_interference(others_share=share))
        picture = roofline_chart([point], marked, title="int8", named=1, narrow=narrow)
        assert any(each.startswith("disturbed") for each in texts(inside(picture))) is (share > 0.1)
        assert ("int8, disturbed." in picture) is (share > 0.1)


def test_the_slope_meets_the_roofs_at_their_ridges() -> None:
    points = [RoofPoint(number=1, name="a", intensity=1.0, gflops=10.0, share=1.0)]
    root = inside(roofline_chart(points, roof(), title="x", named=1, narrow=False))
    *roofs, slope = [e.attrib for e in root.iter("line") if e.attrib["class"] == "roof"]
    for one in roofs:
        # A point of the slope at the roof's height lies where the roof begins.
        share = (float(one["y1"]) - float(slope["y1"])) / (float(slope["y2"]) - float(slope["y1"]))
        across = float(slope["x1"]) + share * (float(slope["x2"]) - float(slope["x1"]))
        assert across == pytest.approx(float(one["x1"]), abs=0.3)


@both
@settings(max_examples=25, deadline=None)
@given(
    spots=st.lists(st.tuples(positive, positive), min_size=1, max_size=6),
    bandwidth=st.floats(0.5, 4000),
)
def test_roofline_stays_inside(
    narrow: bool, spots: list[tuple[float, float]], bandwidth: float
) -> None:
    points = [
        RoofPoint(number=at, name=LONG, intensity=x, gflops=y, share=0.2)
        for at, (x, y) in enumerate(spots, 1)
    ]
    inside(roofline_chart(points, roof(bandwidth), title=LONG, named=6, narrow=narrow))


def test_a_roofline_without_peaks_or_layers_is_none() -> None:
    empty = Roofline(threads=1, peak_gflops=(), bandwidth_gb_s=around(1.0), method="")
    point = RoofPoint(number=1, name="a", intensity=1.0, gflops=1.0, share=1.0)
    assert roofline_chart([point], empty, title="", named=1, narrow=False) == ""
    assert roofline_chart([], roof(), title="", named=1, narrow=False) == ""
