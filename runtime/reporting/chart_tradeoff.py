"""Quality in any unit against latency: file size as area, every point labelled."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from edgeclip.runtime.reporting.chart_parts import (
    BOLD,
    NARROW,
    WIDE,
    bounds,
    even_names,
    fit,
    held,
    named_ticks,
)
from edgeclip.runtime.reporting.profile_data import QualityUnit
from edgeclip.runtime.reporting.report_charts import (
    Axis,
    axes,
    line,
    path,
    svg,
    text,
    text_width,
)
from edgeclip.runtime.reporting.report_data import ParetoPoint
from edgeclip.runtime.reporting.report_labels import Anchor, Box, place_labels
from edgeclip.runtime.reporting.report_pareto import frontier

_MOST = {"share": 1.0, "cosine": 1.0, "points": math.inf}
_LEAST_RANGE = {"share": 0.02, "cosine": 1e-6, "points": 0.2}


@dataclass(frozen=True, slots=True)
class TradePoint:
    """A point and the facts that are printed below its name, the less important first."""

    point: ParetoPoint
    facts: tuple[str, ...]


def trade_chart(
    points: Sequence[TradePoint],
    *,
    quality_name: str,
    unit: QualityUnit,
    latency_name: str,
    narrow: bool,
) -> str:
    """Draw the points at 358 pixels (`narrow`) or 760 pixels wide; empty without points.

    A circle's area is proportional to the bytes on disk; whiskers are 95% intervals. A thin
    line joins the points that no other beats in both.
    """
    if not points:
        return ""
    width, height, largest = (NARROW, 380, 22.0) if narrow else (WIDE, 400, 32.0)
    these = [entry.point for entry in points]
    names = _value_names(these, unit)
    x = _latency_axis(these, start=74, end=width - 12)
    y = _quality_axis(these, unit, start=height - 46, end=36)
    parts = [
        text(2, 16, fit(f"{quality_name}, higher is better", width - 4)),
        *axes(
            x,
            y,
            x_ticks=named_ticks(x, 4 if narrow else 7, width),
            y_ticks=names(y),
        ),
        text(x.end, height - 6, f"{latency_name}, ms (log), lower is better", anchor="end"),
        path([(x.at(p.latency_ms.value), y.at(p.quality.value)) for p in frontier(these)], "front"),
    ]
    biggest = max(1, *(p.bytes for p in these))
    radii = [largest * math.sqrt(p.bytes / biggest) for p in these]
    parts += [_mark(p, r, x, y) for p, r in zip(these, radii, strict=True)]
    parts += _labels(points, radii, x, y, narrow)
    spoken = "; ".join(f"{entry.point.name}: {', '.join(entry.facts)}" for entry in points)
    label = f"{quality_name} against {latency_name}: {spoken}"
    return svg(width, height, parts, label=label, css="narrow" if narrow else "wide")


def _value_names(
    points: Sequence[ParetoPoint], unit: QualityUnit
) -> Callable[[Axis], list[tuple[float, str]]]:
    scale, ending = (100.0, "%") if unit == "share" else (1.0, "")

    def names(axis: Axis) -> list[tuple[float, str]]:
        ticks = even_names(scale * axis.low, scale * axis.high, 5)
        return [(value / scale, name + ending) for value, name in ticks]

    return names


def _latency_axis(points: Sequence[ParetoPoint], *, start: float, end: float) -> Axis:
    low, high = bounds(p.latency_ms for p in points)
    room = max((high / low) ** 0.12, 1.15)  # so that the circles stay inside
    return Axis(low=low / room, high=high * room, start=start, end=end, log=True)


def _quality_axis(
    points: Sequence[ParetoPoint], unit: QualityUnit, *, start: float, end: float
) -> Axis:
    low, high = bounds(p.quality for p in points)
    least = _LEAST_RANGE[unit]
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    room = (high - low) * 0.15
    high = min(high + room, max(high, _MOST[unit]) + room / 2)
    return Axis(low=low - room, high=high, start=start, end=end)


def _mark(point: ParetoPoint, radius: float, x: Axis, y: Axis) -> str:
    across, up = x.at(point.latency_ms.value), y.at(point.quality.value)
    left, right = held(x, point.latency_ms.low), held(x, point.latency_ms.high)
    foot, top = held(y, point.quality.low), held(y, point.quality.high)
    place = f'cx="{across:.1f}" cy="{up:.1f}"'
    return (
        f'<g class="{_style(point)}"><title>{escape(point.name)}</title>'
        f'<circle {place} r="{radius:.1f}" class="area"/>'
        f"{line(left, up, right, up, 'whisker')}{line(across, foot, across, top, 'whisker')}"
        f'<circle {place} r="3" class="dot"/></g>'
    )


def _style(point: ParetoPoint) -> str:
    return point.role + (" chosen" if point.chosen else "")


def _labels(
    points: Sequence[TradePoint], radii: Sequence[float], x: Axis, y: Axis, narrow: bool
) -> list[str]:
    longest = 150 if narrow else 320
    texts = [
        (
            fit(entry.point.name, longest),
            fit(" · ".join(entry.facts[-2:] if narrow else entry.facts), longest),
        )
        for entry in points
    ]
    anchors = [
        Anchor(
            x=x.at(entry.point.latency_ms.value),
            y=y.at(entry.point.quality.value),
            radius=max(3.0, radius),
            width=max(BOLD * text_width(lines[0], 13), text_width(lines[1], 13)),
            height=32,
        )
        for entry, radius, lines in zip(points, radii, texts, strict=True)
    ]
    area = Box(x.start + 2, y.end - 8, x.end - x.start - 2, y.start - y.end + 6)
    these = [entry.point for entry in points]
    boxes = place_labels(anchors, [*_whiskers(these, x, y), *_front(these, x, y)], area)
    return [
        _label(_style(entry.point), anchor, box, lines)
        for entry, anchor, box, lines in zip(points, anchors, boxes, texts, strict=True)
        if box is not None
    ]


def _whiskers(points: Sequence[ParetoPoint], x: Axis, y: Axis) -> list[Box]:
    boxes = []
    for p in points:
        across, up = x.at(p.latency_ms.value), y.at(p.quality.value)
        left, right = held(x, p.latency_ms.low), held(x, p.latency_ms.high)
        top, foot = held(y, p.quality.high), held(y, p.quality.low)
        boxes += [Box(left, up - 1, right - left, 2), Box(across - 1, top, 2, foot - top)]
    return boxes


def _front(points: Sequence[ParetoPoint], x: Axis, y: Axis) -> list[Box]:
    """Small boxes along the thin line."""
    ends = [(x.at(p.latency_ms.value), y.at(p.quality.value)) for p in frontier(points)]
    boxes = []
    for (left, foot), (right, top) in itertools.pairwise(ends):
        steps = max(1, int(math.dist((left, foot), (right, top)) // 6))
        for share in (step / steps for step in range(steps + 1)):
            boxes.append(Box(left + share * (right - left), foot + share * (top - foot), 1, 1))
    return boxes


def _label(css: str, anchor: Anchor, box: Box, lines: tuple[str, str]) -> str:
    near = box.nearest(anchor.x, anchor.y)
    away = math.dist(near, (anchor.x, anchor.y))
    leader = line(anchor.x, anchor.y, *near, "leader") if away > anchor.radius + 14 else ""
    # Centred where the box sits above or below, else towards the circle.
    if box.x + box.width < anchor.x:
        at, side = box.x + box.width, "end"
    elif box.x > anchor.x:
        at, side = box.x, "start"
    else:
        at, side = box.x + box.width / 2, "middle"
    name = text(at, box.y + 12, lines[0], css="name", anchor=side)
    return f'<g class="{css}">{leader}{name}{text(at, box.y + 28, lines[1], anchor=side)}</g>'
