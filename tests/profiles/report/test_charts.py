"""Charts: every one is drawn, as valid SVG with real text, in the colours of the page."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.profiles.report.charts import (
    BandChart,
    BoundChart,
    Dot,
    DotRow,
    HistogramChart,
    RowChart,
    ScatterChart,
    ScatterPoint,
    Series,
    StackBar,
    StackChart,
    SweepChart,
    TrainingCurve,
    distribution,
    frontier,
)
from edgeclip.profiles.report.drawing import (
    Chart,
    bounds,
    fit,
    place_labels,
    svg,
    text_width,
    tick_names,
    ticks,
)
from edgeclip.runtime.errors import MissingExtraError
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.report.test_bundle_report import HOSTILE, around

ODD = (f"{HOSTILE} $\\frac{{x}}{{ a\x00b\ud800 模型 😀 {'x' * 400}", "")


def chart(kind: str, name: str = "fp32") -> Chart:
    """A chart of each kind, with `name` wherever text can stand."""
    values = [around(value, 0.1) for value in (1.0, 2.0, 9.0)]
    points = tuple(
        ScatterPoint(name=f"{name} {at}", x=value, y=value, facts=(name,), radius=0.3 * at)
        for at, value in enumerate(values)
    )
    rows = (DotRow(name, (Dot(values[0]), Dot(values[1], 1)), name),) * 2
    bars = (StackBar(name, (("load", 2.0), (name, 3.0)), name, mark=6.0, chosen=True),) * 2
    series = Series(name, tuple(values), tuple(values), ("1", "2", "4"))
    shares = distribution(
        name,
        np.linspace(0, 1, 100),
        name,
        other=(np.linspace(-0.5, 0.5, 90), name),
        marks=((name, 0.25),),
    )
    assert shares is not None
    found: dict[str, Chart] = {
        "distribution": shares,
        "scatter": ScatterChart(
            title=name,
            points=points,
            x_name=name,
            y_name=name,
            front=frontier(points),
            bar=(1.5, name),
            reference=(2.0, name),
            note=name,
        ),
        "roofline": ScatterChart(
            title=name,
            points=points,
            x_name=name,
            y_name=name,
            x_limits=(0.1, 30.0),
            y_limits=(0.1, 30.0),
            y_log=True,
            roofs=((around(8.0, 0.1), name),),
            slope=(2.0, name),
        ),
        "rows": RowChart(
            rows=rows, axis_name=name, title=name, legend=((0, name),), reference=(1.0, name)
        ),
        "stack": StackChart(bars=bars, axis_name=name, title=name),
        "legend": StackChart(
            bars=bars,
            axis_name=name,
            title=name,
            legend=True,
            mark_name="95th percentile",
            limit=(4.0, name),
        ),
        "histogram": HistogramChart(
            title=name,
            samples=(*(1.0 + at / 100 for at in range(200)), 90.0),
            median=values[0],
            tail=("p99", values[1]),
        ),
        "sweep": SweepChart(
            title=name, series=(series, series), x_limits=(0.5, 10.0), y_limits=(0.5, 10.0)
        ),
        "loss": TrainingCurve(name, (1.0, 2.0, 3.0), (9.0, 0.01, float("nan"))),
        "agreement": TrainingCurve(name, (1.0, 2.0), (0.1, 0.9), reference=(0.95, name)),
        "band": BandChart(
            title=name,
            x=(0.0, 0.5, 1.0),
            y=(around(0.8, 0.1), around(0.9, 0.1), around(0.95, 0.1)),
            x_name=name,
            y_name=name,
            below={0.0: name, 1.0: name},
            bar=(0.9, name),
            marked=(1, name),
        ),
        "bound": BoundChart(title=name, value=around(0.9, 0.1), bound=0.85, at_least=True),
        "open bound": BoundChart(
            title=name, value=Interval(0.9, -math.inf, math.inf), bound=0.85, at_least=True
        ),
    }
    return found[kind]


KINDS = (
    *("scatter", "roofline", "rows", "stack", "legend"),
    *("histogram", "distribution", "sweep", "loss", "agreement", "band", "bound"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_chart_is_valid_svg_with_a_title_a_description_and_real_text(kind: str) -> None:
    picture = svg(chart(kind))
    root = ElementTree.fromstring(picture)
    assert root.attrib["role"] == "img"
    title, description = root.findtext("title"), root.findtext("desc")
    assert title == chart(kind).title
    assert description == " ".join(chart(kind).description.split())
    assert any(node.tag == "text" for node in root.iter())
    assert "http" not in picture
    assert "<style" not in picture
    # Every colour is one of the page's own.
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", picture)
    style = (Path(sys.modules[svg.__module__].__file__ or "").parent / "report.css").read_text()
    for name in set(re.findall(r"var\(--([a-z]+)\)", picture)):
        assert f"--{name}:" in style


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ODD)
def test_odd_names_stay_text(kind: str, name: str) -> None:
    root = ElementTree.fromstring(svg(chart(kind, name), narrow=not name, alone=not name))
    assert not any(node.tag.endswith("script") for node in root.iter())


def test_a_file_of_its_own_has_its_size_and_colours() -> None:
    root = ElementTree.fromstring(svg(chart("legend"), alone=True))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert int(root.attrib["width"]) > 0
    assert "var(" not in svg(chart("legend"), alone=True)


def test_nothing_to_draw_is_no_picture() -> None:
    scatter, rows = chart("scatter"), chart("rows")
    assert isinstance(scatter, ScatterChart)
    assert isinstance(rows, RowChart)
    empty: tuple[Chart, ...] = (
        replace(scatter, points=()),
        replace(rows, rows=()),
        StackChart(bars=(), axis_name="ms", title="x"),
        HistogramChart(title="x", samples=(), median=around(1, 0), tail=None),
        HistogramChart(title="x", samples=(float("nan"), 0.0), median=around(1, 0), tail=None),
        SweepChart(title="x", series=(), x_limits=(1, 2), y_limits=(1, 2)),
        TrainingCurve("x", (1.0,), (float("inf"),)),
    )
    for one in empty:
        assert svg(one) == ""
        assert one.description is not None


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("others", [(), (Interval(2.0, 1.5, 3.0),)])
def test_ends_that_are_not_known_can_be_drawn(log: bool, others: tuple[Interval, ...]) -> None:
    open_ends = (
        Interval(1.0, 0.0, math.inf),
        Interval(2.0, 1.5, math.inf),
        Interval(3.0, -math.inf, math.inf),
    )
    values = (*open_ends, *others)
    points = tuple(ScatterPoint(name=str(each.value), x=each, y=each) for each in values)
    series = (Series("1 thread", values, values, tuple("1248"[: len(values)])),)
    charts: tuple[Chart, ...] = (
        ScatterChart(
            title="t",
            points=points,
            x_name="x",
            y_name="y",
            y_log=log,
            roofs=((open_ends[0], "peak"),),
            slope=(1.0, "memory"),
        ),
        RowChart(
            rows=tuple(DotRow("r", (Dot(one),)) for one in values),
            axis_name="x",
            title="t",
            log=log,
        ),
        SweepChart(title="s", series=series, x_limits=bounds(values), y_limits=bounds(values)),
    )
    for one in charts:
        paths = [node.attrib["d"] for node in ElementTree.fromstring(svg(one)).iter("path")]
        assert not any("nan" in path or "inf" in path for path in paths)


@settings(max_examples=5, deadline=None)
@given(
    values=st.lists(
        st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1e3), st.floats(0, 1)), min_size=1, max_size=6
    ),
    log=st.booleans(),
)
def test_any_values_can_be_drawn(values: list[tuple[float, float, float]], log: bool) -> None:
    intervals = [Interval(v, v / (1 + wide), v * (1 + wide)) for v, wide, _ in values]
    points = tuple(
        ScatterPoint(name=str(at), x=one, y=one, radius=values[at][2], chosen=at == 0)
        for at, one in enumerate(intervals)
    )
    scatter = ScatterChart(
        title="t", points=points, x_name="x", y_name="y", x_limits=(1e-7, 1e7),
        y_limits=(1e-7, 1e7), y_log=log, front=frontier(points), bar=(1.0, "bar"),
    )  # fmt: skip
    rows = RowChart(
        rows=tuple(DotRow("r", (Dot(one),)) for one in intervals), axis_name="x", title="t"
    )
    histogram = HistogramChart(
        title="h", samples=tuple(one.value for one in intervals), median=intervals[0], tail=None
    )
    for one in (scatter, rows, histogram):
        root = ElementTree.fromstring(svg(one, narrow=log))
        for node in root.iter("path"):
            assert "nan" not in node.attrib.get("d", "")
            assert "inf" not in node.attrib.get("d", "")


@given(
    low=st.floats(1e-6, 1e6), ratio=st.floats(1.05, 1e6), count=st.integers(3, 8), log=st.booleans()
)
def test_every_axis_has_two_ticks_inside(low: float, ratio: float, count: int, log: bool) -> None:
    high = low * ratio
    found = ticks(low, high, count, log=log)
    assert len(found) >= 2
    assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in found)
    names = tick_names(found)
    assert len(set(names)) == len(names)


def test_labels_never_overlap_in_a_crowd() -> None:
    marks = [(200.0 + 3 * k, 150.0 + k, 10.0) for k in range(8)]
    boxes = place_labels(marks, [(90.0, 30.0)] * 8, [], (0.0, 0.0, 600.0, 400.0))
    placed = [box for box in boxes if box is not None]
    assert len(placed) == 8
    for at, one in enumerate(placed):
        assert 0 <= one[0] < one[2] <= 600
        assert 0 <= one[1] < one[3] <= 400
        for other in placed[at + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]


def test_text_is_cut_in_its_middle() -> None:
    assert fit("short", 100) == "short"
    cut = fit("a very long name of a subject int8", 100)
    assert "…" in cut
    assert cut.endswith("int8")
    assert text_width(cut) <= 100


def test_the_front_is_what_no_other_beats() -> None:
    def point(ms: float, quality: float) -> ScatterPoint:
        return ScatterPoint(name="", x=around(ms, 0), y=around(quality, 0))

    points = [point(3, 0.9), point(1, 0.5), point(2, 0.4), point(2, 0.9), point(5, 0.95)]
    assert frontier(points) == (1, 3, 4)


def test_loss_curve_needs_a_value_for_each_step() -> None:
    with pytest.raises(ValueError, match="2 steps but 1 values"):
        TrainingCurve("loss", (1.0, 2.0), (0.5,))


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"edgeclip\[report\]"):
        svg(chart("bound"))


def test_matplotlib_and_jinja_are_imported_only_to_draw() -> None:
    code = (
        "import sys, edgeclip.profiles.cli.profile, edgeclip.profiles.cli.report;"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_user_s_own_settings_of_matplotlib_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    before = svg(chart("rows"))
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 40.0)
    assert svg(chart("rows")) == before
    assert matplotlib.rcParams["text.usetex"] is True


def test_a_distribution_counts_every_value_once() -> None:
    chart = distribution("lengths", np.array([3, 3, 4, 7, np.nan]), "tokens", whole=True)
    assert chart is not None
    assert (chart.total, chart.median, chart.log) == (4, 3.5, False)
    assert sum(chart.counts) == 4
    assert chart.counts[int(3 - chart.low)] == 2
    assert chart.description == "4 of tokens, median 3.50"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.booleans())
def test_no_value_of_a_distribution_is_lost(values: list[float], whole: bool) -> None:
    given_values = np.round(values) if whole else np.array(values)
    chart = distribution("any", given_values, "unit", whole=whole)
    assert chart is not None
    assert sum(chart.counts) + sum(chart.beyond) == len(values)
    svg(chart)


def test_nothing_has_no_distribution() -> None:
    assert distribution("none", np.array([np.nan, np.inf]), "unit") is None
