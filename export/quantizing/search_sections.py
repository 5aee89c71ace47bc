"""The parts of a search's page: pictures, every config, the last judgement, how it was done."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.export.quantizing.point import (
    MEAN_COSINE,
    P1_COSINE,
    R1_LOSS,
    ZERO_SHOT_LOSS,
    Point,
    measured,
)
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.search_chart import ChartPoint, FrontChart, front_chart
from edgeclip.export.quantizing.search_names import key_points, short_name
from edgeclip.export.quantizing.search_table import ordered
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.reporting.chart_parts import both_widths
from edgeclip.runtime.reporting.profile_blocks import (
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
from edgeclip.runtime.reporting.report_format import digits

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
    rows = [_row(number, point, result, gates) for number, point in enumerate(ordered(result), 1)]
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


def _row(number: int, point: Point, result: SearchResult, gates: Sequence[str]) -> tuple[Cell, ...]:
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
