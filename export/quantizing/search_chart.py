"""The picture of a search: what each point loses against what it takes, with its gate as a line."""

import itertools
import math
from dataclasses import dataclass
from html import escape

from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.reporting.chart_parts import NARROW, WIDE, fit, held, marker, named_ticks
from edgeclip.runtime.reporting.report_charts import (
    Axis,
    axes,
    line,
    path,
    svg,
    text,
    text_width,
    tick_name,
)
from edgeclip.runtime.reporting.report_labels import Anchor, Box, place_labels

_FONT = 13.0
_CIRCLE, _TRIANGLE, _CROSS = 0, 3, 4  # in SHAPES
_SIZE = 4.5
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
        front: no other beats it.
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
    are 95% intervals; a thin line joins the points that no other beats in both.
    """
    if not chart.points:
        return ""
    width, height = (NARROW, 400) if narrow else (WIDE, 420)
    x = _cost_axis(chart, start=58, end=width - 12)
    y = _loss_axis(chart, start=height - 46, end=38)
    spoken = "; ".join(point.spoken for point in chart.points)
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
        *_front(chart, x, y),
        *(_mark(point, x, y) for point in chart.points),
        *_labels(chart, x, y, narrow),
    ]
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


def _front(chart: FrontChart, x: Axis, y: Axis) -> list[str]:
    on_front = sorted((p for p in chart.points if p.front), key=lambda point: point.cost.value)
    places = [(x.at(point.cost.value), held(y, point.loss.value)) for point in on_front]
    return [path(places, "front")] if len(places) > 1 else []


def _mark(point: ChartPoint, x: Axis, y: Axis) -> str:
    across, up = x.at(point.cost.value), held(y, point.loss.value)
    flat = line(held(x, point.cost.low), up, held(x, point.cost.high), up, "whisker")
    tall = line(across, held(y, point.loss.low), across, held(y, point.loss.high), "whisker")
    ring = ""
    if point.chosen:
        ring = f'<circle cx="{across:.1f}" cy="{up:.1f}" r="11" class="area"/>'
    outline = _CIRCLE if point.passed else _CROSS
    if point.loss.value > y.high:
        outline, tall = _TRIANGLE, ""
    shape = marker(outline, across, up, size=_SIZE)
    title = f"<title>{escape(point.spoken)}</title>"
    return f'<g class="{_style(point)}">{title}{ring}{flat}{tall}{shape}</g>'


def _style(point: ChartPoint) -> str:
    return ("s2" if point.passed else "s1") + (" chosen" if point.chosen else "")


def _labels(chart: FrontChart, x: Axis, y: Axis, narrow: bool) -> list[str]:
    longest = 120 if narrow else 300
    words = [_words(point, longest, narrow) for point in chart.points]
    anchors = [
        Anchor(
            x=x.at(point.cost.value),
            y=held(y, point.loss.value),
            radius=11.0 if point.chosen else _SIZE,
            width=text_width(content, _FONT),
            height=16,
        )
        for point, content in zip(chart.points, words, strict=True)
    ]
    area = Box(x.start + 2, y.end - 8, x.end - x.start - 2, y.start - y.end + 6)
    boxes = place_labels(anchors, [*_obstacles(chart, x, y)], area)
    return [
        _label(point, anchor, box, content)
        for point, anchor, box, content in zip(chart.points, anchors, boxes, words, strict=True)
        if box is not None
    ]


def _words(point: ChartPoint, longest: float, narrow: bool) -> str:
    if not point.name or narrow:
        return f"{point.number} chosen" if point.chosen else str(point.number)
    return fit(f"{point.number}: {point.name}{', chosen' if point.chosen else ''}", longest)


def _obstacles(chart: FrontChart, x: Axis, y: Axis) -> list[Box]:
    """The gate with its name, whiskers, and small boxes along the thin line."""
    at = y.at(chart.gate)
    boxes = [Box(x.start, at - 1, x.end - x.start, 2), Box(x.end - 96, at - 18, 96, 18)]
    for point in chart.points:
        across, up = x.at(point.cost.value), held(y, point.loss.value)
        left, right = held(x, point.cost.low), held(x, point.cost.high)
        top, foot = held(y, point.loss.high), held(y, point.loss.low)
        boxes += [Box(left, up - 1, right - left, 2), Box(across - 1, top, 2, foot - top)]
    on_front = sorted((p for p in chart.points if p.front), key=lambda point: point.cost.value)
    ends = [(x.at(point.cost.value), held(y, point.loss.value)) for point in on_front]
    for (left, foot), (right, top) in itertools.pairwise(ends):
        steps = max(1, int(math.dist((left, foot), (right, top)) // 6))
        for share in (step / steps for step in range(steps + 1)):
            boxes.append(Box(left + share * (right - left), foot + share * (top - foot), 1, 1))
    return boxes


def _label(point: ChartPoint, anchor: Anchor, box: Box, content: str) -> str:
    near = box.nearest(anchor.x, anchor.y)
    away = math.dist(near, (anchor.x, anchor.y))
    leader = line(anchor.x, anchor.y, *near, "leader") if away > anchor.radius + 14 else ""
    if box.x + box.width < anchor.x:
        at, side = box.x + box.width, "end"
    elif box.x > anchor.x:
        at, side = box.x, "start"
    else:
        at, side = box.x + box.width / 2, "middle"
    words = text(at, box.y + 12, content, css="name", anchor=side)
    return f'<g class="{_style(point)}">{leader}{words}</g>'
