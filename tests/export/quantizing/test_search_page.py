import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.export.quantizing.config import Float16, Float32, key
from edgeclip.export.quantizing.search import SearchResult, search
from edgeclip.export.quantizing.search_page import (
    ChartPoint,
    FrontChart,
    SearchedTower,
    front_chart,
    render_search,
    search_page,
)
from edgeclip.export.quantizing.search_table import search_table
from edgeclip.export.quantizing.search_task import SearchSpace
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval
from tests.conftest import GATE
from tests.export.quantizing.search_cases import RECIPE, SumBench, loss_record
from tests.page import Page

DAMAGES = {"fine": 0.001, "<bad> & co": 0.9, "middling": 0.004}
ABOUT = SearchedTower(
    title="The image tower of <student>",
    command="edgeclip quantize '<student>' --out q",
    ranges="10 pairs",
    steering="20 other pairs",
    test="30 pairs",
    here="a test",
)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    bench = SumBench(
        damages=DAMAGES,
        saved={"fine": 0.2, "<bad> & co": 0.1, "middling": 0.05},
        impossible=frozenset({key(Float16())}),
    )
    space = SearchSpace(recipe=RECIPE, smoothing=False, others=(Float16(),))
    return search(bench, space, rank=True)


def test_the_page_needs_no_network_and_shows_every_config(
    found: SearchResult, tmp_path: Path
) -> None:
    search_page(found, tmp_path / "page.html", ABOUT)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "script" not in page.tags
    words = " ".join(page.text)
    assert "<bad> & co" in words  # escaped, so that it comes back as it was
    assert "<bad>" not in html
    assert "<student>" not in html
    for number in range(1, len(found.points) + 1):
        assert f"{number}: " in words
    for told in ("cannot be made", "20 other pairs", "30 pairs", "edgeclip quantize", "gate 0.005"):
        assert told in words


def test_the_chosen_config_is_marked_in_picture_and_table(found: SearchResult) -> None:
    html = render_search(found, ABOUT)
    assert html.count('class="s2 chosen"') >= 2  # a mark in each picture, wide and narrow
    assert ", chosen</" in html
    assert "1 in float" in html


def test_a_search_without_times_is_drawn_over_bytes() -> None:
    bench = SumBench(damages=DAMAGES, saved=dict.fromkeys(DAMAGES, 0.1), measured=False)
    result = search(bench, SearchSpace(recipe=RECIPE, smoothing=False))
    html = render_search(result, replace(ABOUT, here=None))
    assert "graph and weights, MB" in html
    assert "time / fp32" not in html
    assert "No time was measured." in html


def test_a_config_without_usable_embeddings_is_in_the_table_and_not_in_the_picture(
    found: SearchResult,
) -> None:
    broken = replace(
        GATE, name="usable embeddings", value=0.5, low=0.4, high=0.6, bound=1.0, passed=False
    )
    point = replace(found.points[1], config=Float16(), records=(broken,))
    html = render_search(replace(found, points=(*found.points, point)), ABOUT)
    words = " ".join(Page(html).text)
    assert re.search(r"\d: fp16", words)
    assert "nan" not in html.lower().replace("nano", "")


def test_fp32_alone_and_an_unfinished_search_say_so() -> None:
    bench = SumBench(damages={"a": 0.5, "b": 0.5}, saved={"a": 0.3, "b": 0.3})
    result = search(bench, SearchSpace(recipe=RECIPE, smoothing=False))
    html = render_search(replace(result, complete=False), ABOUT)
    assert "Only fp32 is to be shipped" in html
    assert "Time was up" in html


def test_the_page_is_not_written_where_it_cannot_be(found: SearchResult, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        search_page(found, tmp_path, ABOUT)


def point(cost: float, loss: float, number: int = 1) -> ChartPoint:
    return ChartPoint(
        number=number,
        name=f"config {number}",
        spoken=f"{number}",
        cost=Interval(cost, cost - 0.1, cost + 0.1),
        loss=Interval(loss, loss / 2, loss * 2),
        passed=loss < 0.005,
        chosen=number == 1,
        front=True,
    )


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("losses", [(0.0, 0.0), (1e-9, 2.0), (0.004, 0.006), (0.0, 1e-7)])
def test_marks_and_labels_stay_inside_the_picture(
    losses: tuple[float, float], narrow: bool
) -> None:
    points = tuple(point(0.5 + at, loss, at + 1) for at, loss in enumerate(losses))
    for floor, most in ((1e-6, None), (None, 0.025)):
        chart = FrontChart(
            points=points,
            cost_name="time",
            loss_name="loss",
            gate=0.005,
            reference=(1.0, "fp32"),
            floor=floor,
            most=most,
        )
        drawn = front_chart(chart, narrow=narrow)
        width, height = (int(n) for n in re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
        across = [float(n) for n in re.findall(r'\bc?x[12]?="([-\d.]+)"', drawn)]
        up = [float(n) for n in re.findall(r'\bc?y[12]?="([-\d.]+)"', drawn)]
        assert 0 <= min(across) <= max(across) <= width
        assert 0 <= min(up) <= max(up) <= height
    assert front_chart(replace(chart, points=()), narrow=narrow) == ""


def test_the_table_has_a_line_for_each_config_and_marks_the_choice(found: SearchResult) -> None:
    lines = search_table(found).splitlines()
    numbered = [line for line in lines if re.match(r" *\*?\d+  ", line)]
    assert len(numbered) == len(found.points)
    (chosen,) = (line for line in numbered if "*" in line)
    assert found.chosen.name in chosen
    assert any("<bad> & co" in line and "9.00e-01" in line for line in lines)
    assert any(line.startswith("chosen: int8") for line in lines)
    assert any("on 8 inputs (200/s)" in line for line in lines)
    assert "in 4.00 s, 200 inputs a second" in render_search(found, ABOUT)
    assert found.points[0].config == Float32()


def test_a_config_that_misses_its_zero_shot_gate_alone_shows_it(found: SearchResult) -> None:
    record = loss_record("zero-shot top-1 loss", 4.321, 0.5)
    (*others, last) = found.points
    missed = replace(last, records=(*last.records, record))
    words = Page(render_search(replace(found, points=(*others, missed)), ABOUT)).text
    assert "zero-shot lost, points" in words
    assert any("4.32" in word for word in words)
    assert "zero-shot lost, points" not in Page(render_search(found, ABOUT)).text


def test_the_table_says_what_gains_are_and_how_many_groups_are_left_out() -> None:
    damages = {f"group {number}": 0.9 / (1 + number) for number in range(10)}
    bench = SumBench(damages=damages, saved=dict.fromkeys(damages, 0.05), measured=False)
    counted = search_table(search(bench, SearchSpace(recipe=RECIPE, smoothing=False)))
    assert "the worst 8 of 10" in counted
    assert "multiply-adds" in counted
    assert "time saved" not in counted
    few = SumBench(damages=DAMAGES, saved=dict.fromkeys(DAMAGES, 0.1))
    timed = search_table(search(few, SearchSpace(recipe=RECIPE, smoothing=False)))
    assert "time saved" in timed
    assert "the worst" not in timed
