"""A search as one HTML page that needs no network: the picture, every point, the proof."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgeclip.export.quantizing.damage_section import damage_section
from edgeclip.export.quantizing.point import Point, measured
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.search_chart import ChartPoint, FrontChart, front_chart
from edgeclip.export.quantizing.search_names import short_names
from edgeclip.export.quantizing.search_table import misses_of, ordered
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.reporting.chart_parts import both_widths
from edgeclip.runtime.reporting.profile_blocks import (
    Block,
    Cell,
    Column,
    Commands,
    Figure,
    Heading,
    Note,
    Section,
    Table,
    columns,
    interval_cell,
    ratio_cell,
    section_of,
)
from edgeclip.runtime.reporting.profile_report import _environment
from edgeclip.runtime.reporting.profile_summary import Alarm, Card, Summary
from edgeclip.runtime.reporting.report_format import digits, megabytes, seconds

_TEMPLATE = "profile_template.html.j2"
_LEAST_LOSS = 1e-6  # of cosine: less is drawn at the foot of the picture
_COSINE, _R1 = "mean cosine", "R@1 loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedTower:
    """What was searched, in words.

    Attributes:
        title: such as "The image tower of student, for this-machine".
        command: what was typed.
        ranges, steering, test: the pairs that each was done on.
        here: where times were measured; None where this machine is not the device.
    """

    title: str
    command: str
    ranges: str
    steering: str
    test: str
    here: str | None


def search_page(result: SearchResult, path: Path, about: SearchedTower) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    html = render_search(result, about)
    with atomic_file(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_search(result: SearchResult, about: SearchedTower) -> str:
    """The page as HTML text; whatever comes from files is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    found = (
        _pictures(result, about),
        _points(result),
        _judged(result),
        damage_section(result),
        _failed(result),
        _method(result, about),
    )
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            title=about.title,
            lead=_lead(result, about),
            summary=_summary(result),
            sections=[section for section in found if section is not None],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    )


def _lead(result: SearchResult, about: SearchedTower) -> str:
    spent = seconds(sum(point.seconds for point in result.points))
    where = f"Times are from {about.here}." if about.here else "No time was measured."
    return f"{len(result.points)} configs were made and judged in {spent}. {where}"


def _summary(result: SearchResult) -> Summary:
    chosen, fp32 = result.chosen, result.points[0]
    last = result.judged[-1].records if result.judged else ()
    if chosen.key == fp32.key:
        return Summary(f"Nothing but fp32 is to be shipped: {result.why}.", "", _alarms(result), ())
    cards = [Card("Size", megabytes(chosen.bytes), f"fp32 {megabytes(fp32.bytes)}", chosen.name)]
    if chosen.latency is not None:
        ratio, ms = chosen.latency.ratio, chosen.latency.ms
        note = f"{digits(ms.value)} ms, fp32 {digits(chosen.latency.reference_ms.value)} ms"
        cards.insert(0, _card("Time, fp32 is 1", ratio, 3, note))
    for name, title, places in ((_COSINE, "Mean cosine with fp32", 5), (_R1, "R@1 lost, points", 2)):
        value = measured(last, name)
        if value is not None:
            cards.append(_card(title, value, places, "on the test pairs"))
    verdict = f"{chosen.name}: {result.why}, and inside them on the test pairs."
    return Summary(verdict, "pass", _alarms(result), tuple(cards))


def _card(name: str, value: Interval, places: int, note: str) -> Card:
    span = f"{value.low:.{places}f} to {value.high:.{places}f}"
    return Card(name, f"{value.value:.{places}f}", span, note)


def _alarms(result: SearchResult) -> tuple[Alarm, ...]:
    alarms = []
    if not result.complete:
        alarms.append(Alarm("Time was up before all was tried: run it again to go on.", "miss"))
    disturbed = sum(point.latency is not None and point.latency.contended for point in result.points)
    if disturbed:
        alarms.append(
            Alarm(
                f"{disturbed} of {len(result.points)} points were timed while other programs took "
                "the processor: their intervals are wide.",
                "miss",
            )
        )
    if len(result.judged) > 1:
        alarms.append(
            Alarm(f"The test pairs were looked at {len(result.judged)} times, once a config.", "")
        )
    return tuple(alarms)


def _pictures(result: SearchResult, about: SearchedTower) -> Section | None:
    timed = result.points[0].latency is not None
    reference = (1.0, "fp32") if timed else None
    cost = f"time of one call at batch 1, fp32 is 1{'' if about.here is None else ' here'}"
    cost = "time of one call at batch 1, fp32 is 1" if timed else "graph and weights, MB"
    losses = (
        ("1 - mean cosine with fp32 (log)", _COSINE, _LEAST_LOSS),
        ("R@1 lost, points of 100", _R1, None),
    )
    figures: list[Block] = []
    for title, gate, floor in losses:
        points = _chart_points(result, gate)
        bound = _bound(result.points, gate)
        if not points or bound is None:
            continue
        chart = FrontChart(
            points=points,
            cost_name=cost,
            loss_name=title,
            gate=bound,
            reference=reference,
            floor=floor,
        )
        picture = both_widths(lambda narrow, chart=chart: front_chart(chart, narrow=narrow))  # type: ignore[misc]
        figures.append(Figure(picture=picture, caption=_caption(gate)))
    return section_of("front", "What each config loses, and what it takes", figures)


def _caption(gate: str) -> str:
    what = "the least mean cosine" if gate == _COSINE else "the most R@1 that may be lost"
    return (
        f"On the steering pairs, with 95% intervals. Circles are inside all gates, crosses are "
        f"not. The dashed line is {what}, the thin one joins what no other config beats in both. "
        "Numbers are those of the table."
    )


def _chart_points(result: SearchResult, gate: str) -> tuple[ChartPoint, ...]:
    points = ordered(result)
    names = short_names(result)
    front = {point.key for point in result.front}
    found = []
    for number, point in enumerate(points, 1):
        loss = point.cosine if gate == _COSINE else point.r1_loss
        if loss is None:
            continue
        if gate == _COSINE:
            loss = Interval(1 - loss.value, 1 - loss.high, 1 - loss.low)
        size = point.bytes / 1e6
        cost = Interval(size, size, size) if point.latency is None else point.latency.ratio
        figure = f"{loss.value:.2e}" if gate == _COSINE else f"{loss.value:.2f}"
        found.append(
            ChartPoint(
                number=number,
                name=names.get(point.key, ""),
                spoken=f"{number} {point.name}: {digits(cost.value)}, loses {figure}",
                cost=cost,
                loss=loss,
                passed=point.passed,
                chosen=point.key == result.chosen.key,
                front=point.key in front,
            )
        )
    return tuple(found)


def _bound(points: Sequence[Point], gate: str) -> float | None:
    """The most that int8 may lose; that of fp32 itself is another."""
    bounds = [
        1 - record.bound if gate == _COSINE else record.bound
        for point in points[1:]
        for record in point.records
        if record.name.startswith(gate)
    ]
    return max(bounds, default=None)


def _points(result: SearchResult) -> Section | None:
    timed = result.points[0].latency is not None
    times = ("time/fp32", "ms") if timed else ()
    names = columns("config", *times, "MB", _COSINE, "1st percentile", "R@1 lost, points")
    rows = []
    for number, point in enumerate(ordered(result), 1):
        latency = point.latency
        figures = (
            (ratio_cell(latency.ratio), interval_cell(latency.ms)) if latency is not None else ()
        )
        tone = "strong" if point.key == result.chosen.key else ""
        shipped = ", chosen" if point.key == result.chosen.key else ""
        rows.append(
            (
                Cell(f"{number} {point.name}{shipped}", tone=tone),  # type: ignore[arg-type]
                *figures,
                Cell(digits(point.bytes / 1e6)),
                _cosine_cell(point.cosine),
                _cosine_cell(point.p1_cosine),
                interval_cell(point.r1_loss),
                _gates_cell(point),
            )
        )
    table = Table(name="Every config", columns=(*names, Column("gates", left=True)), rows=tuple(rows))
    note = "Gates as on the steering pairs, which decide what is tried; they prove nothing yet."
    return section_of("points", "Every config that was tried", [table, Note(note)])


def _gates_cell(point: Point) -> Cell:
    if point.passed:
        return Cell("inside", tone="pass")
    lines = [_short_miss(record) for record in point.records if not record.passed]
    return Cell("misses", "\n".join(lines), tone="miss")


def _short_miss(record: GateRecord) -> str:
    return f"{record.name} {record.value:.4g} (bound {record.bound:g})"


def _cosine_cell(value: Interval | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(f"{value.value:.5f}", f"{value.low:.5f} to {value.high:.5f}")


def _judged(result: SearchResult) -> Section | None:
    blocks: list[Block] = []
    names = {point.key: point.name for point in result.points}
    for judgement in result.judged:
        rows = tuple(
            (
                Cell(record.name),
                Cell(f"{record.value:.5g}", f"{record.low:.5g} to {record.high:.5g}"),
                Cell(f"{record.direction} {record.bound:g} {record.unit}"),
                Cell("pass", tone="pass") if record.passed else Cell("miss", tone="miss"),
            )
            for record in judgement.records
        )
        name = names[judgement.config]
        blocks += [
            Heading(name),
            Table(name=f"Gates of {name}", columns=columns("gate", "value", "bound", ""), rows=rows),
        ]
    if not blocks:
        return None
    note = (
        "No config was chosen on these pairs: each that was about to be shipped was held against "
        "them once, and the next best only if it missed. Choosing on them would make the intervals "
        "lie."
    )
    return section_of("test", "Judged on the test pairs", [Note(note), *blocks])


def _failed(result: SearchResult) -> Section | None:
    rows = tuple((Cell(name), Cell(reason)) for name, reason in result.failed)
    table = Table(name="Not possible here", columns=columns("config", "<reason"), rows=rows)
    return section_of("failed", "What was not possible here", [table] if rows else [])


def _method(result: SearchResult, about: SearchedTower) -> Section | None:
    notes = (
        f"Ranges were found on {about.ranges}. What is tried next was decided on {about.steering}: "
        f"other pairs of the same split. The last judgement is on {about.test}.",
        "Each time is the geometric mean of two measurements in turns with fp32, with engines "
        "loaded anew in both orders; its interval holds those of both. What is shipped must be "
        "faster than fp32 over the whole interval; of configs within 1% the most exact is taken.",
    )
    return section_of(
        "method", "How it was searched", [*map(Note, notes), Commands(lines=(about.command,))]
    )
