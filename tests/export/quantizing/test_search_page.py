import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.export.quantizing.config import Float16, Float32, key
from edgeclip.export.quantizing.search import SearchResult, search
from edgeclip.export.quantizing.search_page import (
    SearchedTower,
    front_section,
    search_page,
    write_search_page,
)
from edgeclip.export.quantizing.search_table import search_table
from edgeclip.export.quantizing.search_task import SearchSpace
from edgeclip.profiles.report.charts import ScatterChart
from edgeclip.profiles.report.sections import Figure
from edgeclip.profiles.report.write_page import html_of
from edgeclip.runtime.errors import InputError
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


def html(result: SearchResult, about: SearchedTower) -> str:
    return html_of(search_page(result, about))


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
    write_search_page(found, tmp_path / "page.html", ABOUT)
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(written)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "script" not in page.tags
    words = " ".join(page.text)
    assert "<bad> & co" in words  # escaped, so that it comes back as it was
    assert "<bad>" not in written
    assert "<student>" not in written
    for number in range(1, len(found.candidates) + 1):
        assert f"{number}: " in words
    for told in ("cannot be made", "20 other pairs", "30 pairs", "edgeclip quantize", "gate 0.005"):
        assert told in words


def test_the_chosen_config_is_marked_in_picture_and_table(found: SearchResult) -> None:
    page = html(found, ABOUT)
    section = front_section(found)
    assert section is not None
    chart = next(block.chart for block in section.blocks if isinstance(block, Figure))
    assert isinstance(chart, ScatterChart)
    assert [point.name.endswith(", chosen") for point in chart.points].count(True) == 1
    assert ", chosen</" in page
    assert "1 in float" in page


def test_a_search_without_times_is_drawn_over_bytes() -> None:
    bench = SumBench(damages=DAMAGES, saved=dict.fromkeys(DAMAGES, 0.1), measured=False)
    result = search(bench, SearchSpace(recipe=RECIPE, smoothing=False))
    page = html(result, replace(ABOUT, here=None))
    assert "graph and weights, MB" in page
    assert "time / fp32" not in page
    assert "No time was measured." in page


def test_a_config_without_usable_embeddings_is_in_the_table_and_not_in_the_picture(
    found: SearchResult,
) -> None:
    broken = replace(
        GATE, name="usable embeddings", value=0.5, low=0.4, high=0.6, bound=1.0, outcome="failed"
    )
    point = replace(found.candidates[1], config=Float16(), records=(broken,))
    page = html(replace(found, candidates=(*found.candidates, point)), ABOUT)
    words = " ".join(Page(page).text)
    assert re.search(r"\d: fp16", words)
    assert "nan" not in page.lower().replace("nano", "")


def test_fp32_alone_and_an_unfinished_search_say_so() -> None:
    bench = SumBench(damages={"a": 0.5, "b": 0.5}, saved={"a": 0.3, "b": 0.3})
    result = search(bench, SearchSpace(recipe=RECIPE, smoothing=False))
    page = html(replace(result, complete=False), ABOUT)
    assert "Only fp32 is to be shipped" in page
    assert "Time was up" in page


def test_the_page_is_not_written_where_it_cannot_be(found: SearchResult, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_search_page(found, tmp_path, ABOUT)


def test_the_table_has_a_line_for_each_config_and_marks_the_choice(found: SearchResult) -> None:
    lines = search_table(found).splitlines()
    numbered = [line for line in lines if re.match(r" *\*?\d+  ", line)]
    assert len(numbered) == len(found.candidates)
    (chosen,) = (line for line in numbered if "*" in line)
    assert found.chosen.name in chosen
    assert any("<bad> & co" in line and "9.00e-01" in line for line in lines)
    assert any(line.startswith("chosen: int8") for line in lines)
    assert any("on 8 inputs (200/s)" in line for line in lines)
    assert "in 4.00 s, 200 inputs a second" in html(found, ABOUT)
    assert found.candidates[0].config == Float32()


def test_a_config_that_misses_its_zero_shot_gate_alone_shows_it(found: SearchResult) -> None:
    record = loss_record("zero-shot top-1 loss", 4.321, 0.5)
    (*others, last) = found.candidates
    missed = replace(last, records=(*last.records, record))
    words = Page(html(replace(found, candidates=(*others, missed)), ABOUT)).text
    assert "zero-shot lost, points" in words
    assert any("4.32" in word for word in words)
    assert "zero-shot lost, points" not in Page(html(found, ABOUT)).text


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
