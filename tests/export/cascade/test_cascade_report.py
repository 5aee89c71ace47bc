"""The curve of a cascade: which points, what they cost, and their page."""

import dataclasses

import numpy as np
import pytest

from edgeclip.export.cascade.cascade_report import (
    CascadeReport,
    Costs,
    CurvePoint,
    cascade_page,
    curve,
    curve_table,
)
from edgeclip.profiles.report.write_page import html_of, markdown_of
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    ESCALATE_NONE,
    PairedOutcomes,
    threshold_grid,
)
from edgeclip.runtime.device.link import load_link
from tests.page import Page

COSTS = Costs(student_ms=2.0, teacher_ms=10.0, query_bytes=3000)


@pytest.fixture
def outcomes() -> PairedOutcomes:
    rng = np.random.default_rng(0)
    scores = rng.random(400)
    teacher = rng.random(400) < 0.9
    student = teacher & (rng.random(400) < 0.5 + 0.5 * scores)
    return PairedOutcomes(scores=scores, student=student, escalated=teacher, teacher=teacher)


@pytest.fixture
def points(outcomes: PairedOutcomes) -> tuple[CurvePoint, ...]:
    return curve(outcomes, threshold_grid(outcomes.scores), certified=60, costs=COSTS)


def test_goes_from_all_to_none(outcomes: PairedOutcomes, points: tuple[CurvePoint, ...]) -> None:
    first, last = points[0], points[-1]
    assert (first.threshold, first.escalated, first.kept.value) == (ESCALATE_ALL, 1.0, 1.0)
    assert (last.threshold, last.escalated) == (ESCALATE_NONE, 0.0)
    assert last.quality.value == outcomes.student.mean()
    shares = [point.escalated for point in points]
    assert shares == sorted(shares, reverse=True)
    assert 10 <= len(points) <= 26


def test_both_sides_of_the_last_certified_point_are_there(outcomes: PairedOutcomes) -> None:
    grid = threshold_grid(outcomes.scores)
    for certified in (0, 1, 37, len(grid)):
        found = [p.threshold for p in curve(outcomes, grid, certified=certified) if p.certified]
        assert found == [] if certified == 0 else found[-1] == grid[certified - 1]


def test_time_and_bytes_grow_with_the_share(points: tuple[CurvePoint, ...]) -> None:
    for point in points:
        assert point.mean_ms == pytest.approx(2.0 + 10.0 * point.escalated)
        assert point.mean_bytes == pytest.approx(3000 * point.escalated)


def test_a_link_costs_its_round_trip_and_the_bytes() -> None:
    link = load_link("wifi")
    costs = dataclasses.replace(COSTS, link=link)
    assert costs.link_ms == pytest.approx(link.rtt_ms + 3000 * 8 / (link.up_mbps * 1000))
    assert costs.always_ms == pytest.approx(costs.link_ms + 10.0)
    assert costs.mean_ms(0.5) == pytest.approx(2.0 + costs.always_ms / 2)
    assert COSTS.link_ms == 0.0


def test_table_has_a_line_for_each_point(points: tuple[CurvePoint, ...]) -> None:
    lines = curve_table(points, COSTS).splitlines()
    assert len(lines) == len(points) + 1
    assert lines[0].split()[-5:] == ["ms", "of", "teacher", "bytes", "up"]
    assert "mean ms" not in curve_table(points, None)


def test_page_is_whole_and_escaped(points: tuple[CurvePoint, ...]) -> None:
    report = CascadeReport(
        title="<script>alert(1)</script>",
        verdict="nothing & nobody",
        bound=0.95,
        points=points,
        costs=COSTS,
        certificate=None,
        machine="a <b>",
    )
    html = html_of(cascade_page(report))
    found = Page(html)
    assert found.open == []
    assert "script" not in found.tags
    assert found.tags.count("svg") == 2
    assert found.tags.count("tr") == len(points) + 1
    assert "nothing &amp; nobody" in html
    assert "http" not in html.replace("http-equiv", "")
    told = markdown_of(cascade_page(report))
    assert told.count("| all |") == 1
