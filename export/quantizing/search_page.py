"""A quantization search as one HTML page: the trade-off, every candidate, the proof."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from edgeclip.export.quantizing.quantization_candidate import (
    MEAN_COSINE,
    P1_COSINE,
    R1_LOSS,
    ZERO_SHOT_LOSS,
    Point,
    measured,
)
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.search_table import key_points, ordered, short_name
from edgeclip.export.quantizing.sensitivity import GroupDamage
from edgeclip.profiles.report.chart_parts import NARROW, WIDE, both_widths, fit, marker, named_ticks
from edgeclip.profiles.report.chart_rows import Dot, Row, RowChart, row_picture
from edgeclip.profiles.report.chart_scatter import Spot, spot_at, spot_labels, thin_line
from edgeclip.profiles.report.html_page import render_sections, write_page
from edgeclip.profiles.report.profile_blocks import (
    Block,
    Cell,
    Commands,
    Figure,
    Heading,
    Note,
    Section,
    Table,
    Tone,
    columns,
    interval_cell,
    ratio_cell,
    section_of,
)
from edgeclip.profiles.report.profile_summary import Alarm, Card, Summary
from edgeclip.profiles.report.report_charts import Axis, axes, line, svg, text, tick_name
from edgeclip.profiles.report.report_labels import Box
from edgeclip.runtime.console import digits, megabytes, seconds
from edgeclip.runtime.quality.intervals import Interval

_CIRCLE, _TRIANGLE, _CROSS = 0, 3, 4  # in SHAPES
_SIZE, _RING = 4.5, 11.0  # pixels: the radius of a mark, and of the ring around the chosen one
_DECADES = 6  # of a logarithmic axis, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartPoint:
    """A point of the picture.

    Attributes:
        number: its row in the table.
        name: printed beside its number where there is room; empty for the number alone.
        spoken: what a pointer or a screen reader is told.
        cost: across: a ratio to fp32's time, or MB.
        loss: upwards.
        passed: inside its gates.
        chosen: it is shipped.
        front: the thin line goes through it.
    """

    number: int
    name: str
    spoken: str
    cost: Interval
    loss: Interval
    passed: bool
    chosen: bool
    front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontChart:
    """A picture's words and scales.

    Attributes:
        points: what is shown.
        cost_name, loss_name: of the axes, with their units.
        gate: the most that may be lost.
        reference: a cost to compare with, and its name, if there is one.
        floor: the least loss that a logarithmic axis shows, where what is less is drawn;
            None for a linear axis.
        most: the largest loss that is shown, where what is more is drawn as a triangle; None
            for all.
    """

    points: tuple[ChartPoint, ...]
    cost_name: str
    loss_name: str
    gate: float
    reference: tuple[float, str] | None = None
    floor: float | None = None
    most: float | None = None


def front_chart(chart: FrontChart, *, narrow: bool) -> str:
    """Draw the points at 358 pixels (`narrow`) or 760 pixels wide; empty without points.

    Circles are inside all gates, crosses are not, triangles are beyond the picture. Whiskers
    are 95% intervals; a thin line joins the points of the front.
    """
    if not chart.points:
        return ""
    width, height = (NARROW, 400) if narrow else (WIDE, 420)
    x = _cost_axis(chart, start=58, end=width - 12)
    y = _loss_axis(chart, start=height - 46, end=38)
    spots = {point.number: _spot(point, x, y, narrow) for point in chart.points}
    best = sorted((p for p in chart.points if p.front), key=lambda point: point.cost.value)
    front, at = [spots[point.number] for point in best], y.at(chart.gate)
    gate = [Box(x.start, at - 1, x.end - x.start, 2), Box(x.end - 96, at - 18, 96, 18)]
    parts = [
        text(2, 16, fit(f"{chart.loss_name}, lower is better", width - 4)),
        *axes(
            x,
            y,
            x_ticks=named_ticks(x, 4 if narrow else 8, width),
            y_ticks=[(tick, tick_name(tick)) for tick in y.ticks(5)],
        ),
        text(x.end, height - 6, f"{chart.cost_name}, lower is better", anchor="end"),
        *_lines(chart, x, y),
        thin_line(front),
        *(_mark(point, spots[point.number], y) for point in chart.points),
        *spot_labels([*spots.values()], front, gate, x, y),
    ]
    spoken = "; ".join(point.spoken for point in chart.points)
    label = f"{chart.loss_name} against {chart.cost_name}: {spoken}"
    return svg(width, height, parts, label=label, css="narrow" if narrow else "wide")


def _cost_axis(chart: FrontChart, *, start: float, end: float) -> Axis:
    seen = [value for p in chart.points for value in (p.cost.low, p.cost.value, p.cost.high)]
    seen += [] if chart.reference is None else [chart.reference[0]]
    room = max((max(seen) - min(seen)) * 0.06, 0.02 * max(seen))
    return Axis(low=max(0.0, min(seen) - room), high=max(seen) + room, start=start, end=end)


def _loss_axis(chart: FrontChart, *, start: float, end: float) -> Axis:
    values = [chart.gate, *(point.loss.value for point in chart.points)]
    if chart.floor is None:
        ends = [end for point in chart.points for end in (point.loss.low, point.loss.high)]
        low, high = min(0.0, *values, *ends), max(*values, *ends)
        most = high if chart.most is None else min(high, chart.most)
        room = 0.08 * (most - low)
        return Axis(low=low - room, high=most + room, start=start, end=end)
    high = max(values) * 2
    least = max(chart.floor, high / 10**_DECADES)
    low = max(least, min(max(value, least) for value in values)) / 1.8
    return Axis(low=low, high=high, start=start, end=end, log=True)


def _lines(chart: FrontChart, x: Axis, y: Axis) -> list[str]:
    at = y.at(chart.gate)
    parts = [
        line(x.start, at, x.end, at, "bar"),
        text(x.end, at - 6, f"gate {tick_name(chart.gate)}", css="barname", anchor="end"),
    ]
    if chart.reference is not None:
        across = x.at(chart.reference[0])
        parts.append(line(across, y.start, across, y.end, "grid"))
        parts.append(text(across - 5, y.end + 2, chart.reference[1], anchor="end"))
    return parts


def _spot(point: ChartPoint, x: Axis, y: Axis, narrow: bool) -> Spot:
    return spot_at(
        x,
        y,
        point.cost,
        point.loss,
        radius=_RING if point.chosen else _SIZE,
        css=("s2" if point.passed else "s1") + (" chosen" if point.chosen else ""),
        lines=(_words(point, narrow),),
    )


def _words(point: ChartPoint, narrow: bool) -> str:
    if not point.name or narrow:
        return f"{point.number} chosen" if point.chosen else str(point.number)
    return fit(f"{point.number}: {point.name}{', chosen' if point.chosen else ''}", 300)


def _mark(point: ChartPoint, spot: Spot, y: Axis) -> str:
    ring = ""
    if point.chosen:
        ring = f'<circle cx="{spot.x:.1f}" cy="{spot.y:.1f}" r="{_RING:g}" class="area"/>'
    outline = _CIRCLE if point.passed else _CROSS
    if point.loss.value > y.high:
        outline = _TRIANGLE
    shape = marker(outline, spot.x, spot.y, size=_SIZE)
    title = f"<title>{escape(point.spoken)}</title>"
    return f'<g class="{spot.css}">{title}{ring}{spot.whiskers}{shape}</g>'


_SHOWN = 20  # groups in the picture


def damage_section(result: SearchResult) -> Section | None:
    """The damage of each group alone; None where it was not measured."""
    if result.damage is None or not result.damage.groups:
        return None
    groups = result.damage.groups
    chart = RowChart(
        rows=tuple(_row(item) for item in groups[:_SHOWN] if item.divergence.value > 0),
        axis_name="divergence of a row of similarities, nats (log)",
        label="Damage of each group of products alone",
        log=True,
    )
    saved = "time saved, % of fp32" if _timed(result) else "multiply-adds, %"
    table = Table(
        name="All groups",
        columns=columns("group", "divergence, nats", "1 - cosine", saved, "in int8"),
        rows=tuple(_cells(item, result) for item in groups),
        folded=True,
    )
    blocks: list[Block] = [Figure(picture=row_picture(chart), caption=_caption(result)), table]
    note = _measured_in(result)
    return section_of("damage", "What each group of products suffers", [*blocks, Note(note)])


def _caption(result: SearchResult) -> str:
    more = len(result.damage.groups) - _SHOWN if result.damage is not None else 0
    rest = f" The table has the other {more}." if more > 0 else ""
    return (
        "Each group quantized alone, all others in float, the most damaging first. Products that "
        f"read the same value are one group.{rest}"
    )


def _measured_in(result: SearchResult) -> str:
    damage = result.damage
    assert damage is not None
    return (
        f"Measured on {damage.inputs} steering inputs in {seconds(damage.seconds)}, "
        f"{damage.rate:.0f} inputs a second. A group goes back to float "
        "the earlier, the more it damages for the time that it saves."
    )


def _row(item: GroupDamage) -> Row:
    value = item.divergence
    return Row(item.title, (Dot(value),), f"{value.value:.1e}")


def _cells(item: GroupDamage, result: SearchResult) -> tuple[Cell, ...]:
    chosen = result.chosen.config
    kept = set(getattr(chosen, "kept", ()))
    float_only = not hasattr(chosen, "kept")
    inside = "no" if float_only or set(item.nodes) <= kept else "yes"
    loss = item.cosine_loss
    saved = "" if result.gains is None else f"{100 * result.gains.of(item.nodes):+.1f}"
    return (
        Cell(item.title, "\n".join(item.nodes)),
        Cell(f"{item.divergence.value:.2e}", _span(item.divergence.low, item.divergence.high)),
        Cell(f"{loss.value:.2e}", _span(loss.low, loss.high)),
        Cell(saved),
        Cell(inside),
    )


def _span(low: float, high: float) -> str:
    return f"{low:.2e} to {high:.2e}"


def _timed(result: SearchResult) -> bool:
    return result.gains is not None and result.gains.measured


# Of the table, by how the gates' names begin; what no config was judged by has none.
_GATES = {
    MEAN_COSINE: "mean cosine",
    P1_COSINE: "1st percentile",
    R1_LOSS: "R@1 lost, points",
    ZERO_SHOT_LOSS: "zero-shot lost, points",
}
_LEAST_LOSS = 1e-6  # of cosine: less is drawn at the foot of the picture
_MOST_GATES = 5.0  # times the R@1 that may be lost: more is drawn at the top


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


def front_section(result: SearchResult) -> Section | None:
    """Two pictures: loss of cosine and of R@1, each against time, or bytes without any."""
    pictures = (
        _picture(result, MEAN_COSINE, "1 - mean cosine with fp32 (log)"),
        _picture(result, R1_LOSS, "R@1 lost, points"),
    )
    cost = "bytes" if result.points[0].latency is None else "time"
    note = Note(
        "On the steering pairs, with 95% intervals. Circles are inside all gates, crosses are not, "
        "triangles lie beyond the picture. The dashed line is the gate, the loosest where "
        "precisions have different ones; the thin one joins what no other config beats in both "
        f"mean cosine and {cost}. Numbers are those of the table."
    )
    figures: list[Block] = [Figure(picture=item, caption="") for item in pictures if item]
    blocks = [*figures, note] if figures else []
    return section_of("front", "What each config loses, and what it takes", blocks)


def points_section(result: SearchResult) -> Section | None:
    """A table of every config that was tried."""
    timed = result.points[0].latency is not None
    gates = [
        gate
        for gate in _GATES
        if any(measured(point.records, gate) is not None for point in result.points)
    ]
    names = columns(
        "config",
        *(("time / fp32", "ms") if timed else ()),
        "MB",
        *(_GATES[gate] for gate in gates),
        "<gates",
    )
    rows = [
        _candidate_row(number, point, result, gates)
        for number, point in enumerate(ordered(result), 1)
    ]
    table = Table(name="Every config", columns=names, rows=tuple(rows))
    note = "Gates as on the steering pairs, which decide what is tried; they prove nothing yet."
    return section_of("points", "Every config that was tried", [table, Note(note)])


def judged_section(result: SearchResult) -> Section | None:
    """The gates of what was held against the test pairs."""
    points = {point.key: point for point in result.points}
    blocks: list[Block] = []
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
        name = points[judgement.config].name
        head = columns("gate", "value", "bound", "")
        blocks += [Heading(name), Table(name=f"Gates of {name}", columns=head, rows=rows)]
    if not blocks:
        return None
    note = Note(
        "No config was chosen on these pairs: what was about to be shipped was held against them "
        "once, and the next best only if it missed. Choosing on them would make the intervals lie."
    )
    return section_of("test", "Judged on the test pairs", [note, *blocks])


def failed_section(result: SearchResult) -> Section | None:
    """What could not be made or run, and why."""
    rows = tuple((Cell(name), Cell(reason)) for name, reason in result.failed)
    table = Table(name="Not possible here", columns=columns("config", "<reason"), rows=rows)
    return section_of("failed", "What was not possible here", [table] if rows else [])


def method_section(about: SearchedTower) -> Section | None:
    """How it was done, and what to type to do it again."""
    notes = [
        Note(
            f"Ranges were found on {about.ranges}. What was tried next was decided on "
            f"{about.steering}, which are other pairs of the same split. The last judgement is on "
            f"{about.test}."
        )
    ]
    if about.here is not None:
        notes.append(
            Note(
                "Each time is the geometric mean of two measurements in turns with fp32, with "
                "engines loaded anew in both orders; its interval holds those of both. What is "
                "shipped must be faster than fp32 over the whole interval; of configs within 1% "
                "the most exact is taken."
            )
        )
    return section_of("method", "How it was searched", [*notes, Commands(lines=(about.command,))])


def _picture(result: SearchResult, gate: str, name: str) -> str:
    """One of them in both widths; empty if no config has such a figure."""
    points, bound = _chart_points(result, gate), _bound(result.points, gate)
    if not points or bound is None:
        return ""
    timed = result.points[0].latency is not None
    chart = FrontChart(
        points=points,
        cost_name="time at batch 1, fp32 is 1" if timed else "graph and weights, MB",
        loss_name=name,
        gate=bound,
        reference=(1.0, "fp32") if timed else None,
        floor=_LEAST_LOSS if gate == MEAN_COSINE else None,
        most=None if gate == MEAN_COSINE else _MOST_GATES * bound,
    )
    return both_widths(lambda narrow: front_chart(chart, narrow=narrow))


def _chart_points(result: SearchResult, gate: str) -> tuple[ChartPoint, ...]:
    named, front = key_points(result), {point.key for point in result.front}
    found = []
    for number, point in enumerate(ordered(result), 1):
        loss = _loss(point, gate)
        if loss is None:
            continue
        size = point.bytes / 1e6
        cost = Interval(size, size, size) if point.latency is None else point.latency.ratio
        found.append(
            ChartPoint(
                number=number,
                name=short_name(point.config) if point.key in named else "",
                spoken=f"{number} {point.name}: {digits(cost.value)}, loses {digits(loss.value)}",
                cost=cost,
                loss=loss,
                passed=point.passed,
                chosen=point.key == result.chosen.key,
                front=point.key in front,
            )
        )
    return tuple(found)


def _loss(point: Point, gate: str) -> Interval | None:
    cosine = point.cosine
    if gate != MEAN_COSINE or cosine is None:
        return point.r1_loss if gate == R1_LOSS else None
    return Interval(1 - cosine.value, 1 - cosine.high, 1 - cosine.low)


def _bound(points: Sequence[Point], gate: str) -> float | None:
    """The most that configs other than fp32 may lose; the loosest, where they differ."""
    bounds = [
        1 - record.bound if gate == MEAN_COSINE else record.bound
        for point in points[1:]
        for record in point.records
        if record.name.startswith(gate)
    ]
    return max(bounds, default=None)


def _candidate_row(
    number: int, point: Point, result: SearchResult, gates: Sequence[str]
) -> tuple[Cell, ...]:
    chosen = point.key == result.chosen.key
    tone: Tone = "strong" if chosen else ""
    name = f"{number}: {short_name(point.config)}{', chosen' if chosen else ''}"
    latency = point.latency
    times = () if latency is None else (ratio_cell(latency.ratio), interval_cell(latency.ms))
    return (
        Cell(name, tone=tone),
        *times,
        Cell(digits(point.bytes / 1e6)),
        *(_gate_cell(point, gate) for gate in gates),
        Cell("inside", tone="pass") if point.passed else Cell("misses", tone="miss"),
    )


def _gate_cell(point: Point, gate: str) -> Cell:
    """A gate's value and interval; one that is missed shows it."""
    found = [record for record in point.records if record.name.startswith(gate)]
    if not found:
        return Cell("")
    record, places = found[0], 2 if gate in (R1_LOSS, ZERO_SHOT_LOSS) else 5
    span = f"{record.low:.{places}f} to {record.high:.{places}f}"
    return Cell(f"{record.value:.{places}f}", span, "" if record.passed else "miss")


def search_page(result: SearchResult, path: Path, about: SearchedTower) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    write_page(render_search(result, about), path)


def render_search(result: SearchResult, about: SearchedTower) -> str:
    """The page as HTML text; whatever comes from files is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return render_sections(
        title=about.title,
        lead=_lead(result, about),
        summary=_summary(result),
        sections=(
            front_section(result),
            points_section(result),
            judged_section(result),
            damage_section(result),
            failed_section(result),
            method_section(about),
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _lead(result: SearchResult, about: SearchedTower) -> tuple[str, ...]:
    spent = seconds(sum(point.seconds for point in result.points))
    where = f"Times are from {about.here}." if about.here else "No time was measured."
    return (f"{len(result.points)} configs were made and judged in {spent}. {where}",)


def _summary(result: SearchResult) -> Summary:
    chosen, fp32 = result.chosen, result.points[0]
    if chosen.key == fp32.key:
        return Summary(f"Only fp32 is to be shipped: {result.why}.", "", _alarms(result), ())
    cards = [Card("Size", megabytes(chosen.bytes), f"fp32 {megabytes(fp32.bytes)}", chosen.name)]
    if chosen.latency is not None:
        ratio, latency = chosen.latency.ratio, chosen.latency
        note = f"{digits(latency.ms.value)} ms, fp32 {digits(latency.reference_ms.value)} ms"
        cards.insert(0, _card("Time, fp32 is 1", ratio, 3, note))
    last = result.judged[-1].records
    for gate, title, places in (
        (MEAN_COSINE, "Mean cosine with fp32", 5),
        (R1_LOSS, "R@1 lost, points", 2),
    ):
        value = measured(last, gate)
        if value is not None:
            cards.append(_card(title, value, places, "on the test pairs"))
    verdict = f"{chosen.name}: {result.why}. On the test pairs it is inside them too."
    return Summary(verdict, "pass", _alarms(result), tuple(cards))


def _card(name: str, value: Interval, places: int, note: str) -> Card:
    span = f"{value.low:.{places}f} to {value.high:.{places}f}"
    return Card(name, f"{value.value:.{places}f}", span, note)


def _alarms(result: SearchResult) -> tuple[Alarm, ...]:
    alarms = []
    if not result.complete:
        alarms.append(Alarm("Time was up before all was tried: run it again to go on.", "miss"))
    disturbed = [point for point in result.points if point.latency and point.latency.contended]
    if disturbed:
        alarms.append(
            Alarm(
                f"{len(disturbed)} of {len(result.points)} configs were timed while other programs "
                "took the processor: their intervals are wide.",
                "miss",
            )
        )
    if len(result.judged) > 1:
        words = f"{len(result.judged)} configs were held against the test pairs, each once."
        alarms.append(Alarm(words, ""))
    return tuple(alarms)
