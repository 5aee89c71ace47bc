"""The Pareto picture: quality against latency, file size as area, every point labelled."""

import itertools
import math
from collections.abc import Sequence
from html import escape

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
from edgeclip.runtime.reporting.report_data import ParetoPoint
from edgeclip.runtime.reporting.report_format import digits, megabytes, percent, percent_interval
from edgeclip.runtime.reporting.report_labels import Anchor, Box, place_labels

_FONT = 13.0
_LINE = 16.0
_LONGEST_NAME = 30


def pareto_chart(
    points: Sequence[ParetoPoint],
    *,
    quality_name: str,
    latency_name: str,
    quality_bar: float | None,
    narrow: bool,
) -> str:
    """Draw the points at 358 pixels (`narrow`) or 760 pixels wide; empty without points.

    A circle's area is proportional to the file's bytes, its centre is marked; whiskers
    are the 95% intervals. A thin line joins the points that no other beats in both.
    """
    if not points:
        return ""
    width, height, largest = (358, 400, 24.0) if narrow else (760, 430, 34.0)
    x = _latency_axis(points, start=52, end=width - 12)
    y = _quality_axis(points, quality_bar, start=height - 46, end=34)
    count = 4 if narrow else 7
    biggest = max(point.bytes for point in points)
    radii = [largest * math.sqrt(point.bytes / max(1, biggest)) for point in points]
    parts = [
        text(2, 16, f"{quality_name}, higher is better"),
        *axes(
            x,
            y,
            x_ticks=[(t, tick_name(t)) for t in x.ticks(count)],
            y_ticks=[(t, f"{100 * t:g}%") for t in y.ticks(5)],
        ),
        text(x.end, height - 6, f"{latency_name}, ms (log), lower is better", anchor="end"),
        *_bar(quality_bar, x, y),
        path(
            [(x.at(p.latency_ms.value), y.at(p.quality.value)) for p in frontier(points)], "front"
        ),
    ]
    for point, radius in zip(points, radii, strict=True):
        parts.append(_mark(point, radius, x, y))
    obstacles = [
        *_whiskers(points, x, y),
        *_bar_boxes(quality_bar, x, y),
        *_front_boxes(points, x, y),
    ]
    parts += _labels(points, radii, x, y, narrow, obstacles)
    label = f"{quality_name} against {latency_name}: " + "; ".join(_sentence(p) for p in points)
    return svg(width, height, parts, label=label, css="narrow" if narrow else "wide")


def frontier(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """The points that no other point beats in quality and latency, fastest first."""
    best: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.latency_ms.value, -p.quality.value)):
        if not best or point.quality.value > best[-1].quality.value:
            best.append(point)
    return best


def _latency_axis(points: Sequence[ParetoPoint], *, start: float, end: float) -> Axis:
    low = min(min(p.latency_ms.low, p.latency_ms.value) for p in points)
    high = max(max(p.latency_ms.high, p.latency_ms.value) for p in points)
    room = max((high / low) ** 0.12, 1.15)  # so that the circles stay inside
    return Axis(low=low / room, high=high * room, start=start, end=end, log=True)


def _quality_axis(
    points: Sequence[ParetoPoint], bar: float | None, *, start: float, end: float
) -> Axis:
    seen = [v for p in points for v in (p.quality.low, p.quality.high, p.quality.value)]
    seen += [] if bar is None else [bar]
    low, high = min(seen), max(seen)
    room = max(0.01, (high - low) * 0.12)
    return Axis(low=max(0.0, low - room), high=high + room, start=start, end=end)


def _bar(bar: float | None, x: Axis, y: Axis) -> list[str]:
    if bar is None:
        return []
    at = y.at(bar)
    return [
        line(x.start, at, x.end, at, "bar"),
        text(x.end, at + 14, f"bar {percent(bar)}", css="barname", anchor="end"),
    ]


def _bar_boxes(bar: float | None, x: Axis, y: Axis) -> list[Box]:
    """What `_bar` covers: its line and its name."""
    if bar is None:
        return []
    at = y.at(bar)
    return [Box(x.start, at - 1, x.end - x.start, 2), Box(x.end - 76, at, 76, 18)]


def _front_boxes(points: Sequence[ParetoPoint], x: Axis, y: Axis) -> list[Box]:
    """Small boxes along the thin line."""
    ends = [(x.at(p.latency_ms.value), y.at(p.quality.value)) for p in frontier(points)]
    boxes = []
    for (left, foot), (right, top) in itertools.pairwise(ends):
        steps = max(1, int(math.dist((left, foot), (right, top)) // 6))
        for step in range(steps + 1):
            share = step / steps
            boxes.append(Box(left + share * (right - left), foot + share * (top - foot), 1, 1))
    return boxes


def _style(point: ParetoPoint) -> str:
    return point.role + (" chosen" if point.chosen else "")


def _mark(point: ParetoPoint, radius: float, x: Axis, y: Axis) -> str:
    across, up = x.at(point.latency_ms.value), y.at(point.quality.value)
    left, right = x.at(point.latency_ms.low), x.at(point.latency_ms.high)
    foot, top = y.at(point.quality.low), y.at(point.quality.high)
    place = f'cx="{across:.1f}" cy="{up:.1f}"'
    return (
        f'<g class="{_style(point)}"><title>{escape(_sentence(point))}</title>'
        f'<circle {place} r="{radius:.1f}" class="area"/>'
        f"{line(left, up, right, up, 'whisker')}{line(across, foot, across, top, 'whisker')}"
        f'<circle {place} r="3" class="dot"/></g>'
    )


def _labels(
    points: Sequence[ParetoPoint],
    radii: Sequence[float],
    x: Axis,
    y: Axis,
    narrow: bool,
    obstacles: Sequence[Box],
) -> list[str]:
    texts = [_label_lines(point, narrow) for point in points]
    anchors = [
        Anchor(
            x=x.at(point.latency_ms.value),
            y=y.at(point.quality.value),
            radius=max(3.0, radius),
            width=max(text_width(words, _FONT) for words in lines),
            height=_LINE * len(lines),
        )
        for point, radius, lines in zip(points, radii, texts, strict=True)
    ]
    area = Box(x.start + 2, y.end - 8, x.end - x.start - 2, y.start - y.end + 6)
    boxes = place_labels(anchors, obstacles, area)
    parts = []
    for point, anchor, box, lines in zip(points, anchors, boxes, texts, strict=True):
        if box is not None:
            parts.append(_label(_style(point), anchor, box, lines))
    return parts


def _label(css: str, anchor: Anchor, box: Box, lines: tuple[str, str]) -> str:
    near = box.nearest(anchor.x, anchor.y)
    away = math.dist(near, (anchor.x, anchor.y))
    leader = ""
    if away > anchor.radius + 14:
        share = anchor.radius / away
        start = (anchor.x + share * (near[0] - anchor.x), anchor.y + share * (near[1] - anchor.y))
        leader = line(*start, *near, "leader")
    # Centred where the box sits above or below, else towards the circle.
    if box.x + box.width < anchor.x:
        at, side = box.x + box.width, "end"
    elif box.x > anchor.x:
        at, side = box.x, "start"
    else:
        at, side = box.x + box.width / 2, "middle"
    name = text(at, box.y + 12, lines[0], css="name", anchor=side)
    return f'<g class="{css}">{leader}{name}{text(at, box.y + 28, lines[1], anchor=side)}</g>'


def _label_lines(point: ParetoPoint, narrow: bool) -> tuple[str, str]:
    name = point.name
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 1] + "…"
    size = megabytes(point.bytes)
    if narrow:
        return name, f"{size}, ships" if point.chosen else size
    if point.chosen:
        name += " (ships)"
    return name, f"{percent(point.quality.value)} · {digits(point.latency_ms.value)} ms · {size}"


def _whiskers(points: Sequence[ParetoPoint], x: Axis, y: Axis) -> list[Box]:
    boxes = []
    for p in points:
        across, up = x.at(p.latency_ms.value), y.at(p.quality.value)
        left, right = x.at(p.latency_ms.low), x.at(p.latency_ms.high)
        top, foot = y.at(p.quality.high), y.at(p.quality.low)
        boxes += [Box(left, up - 1, right - left, 2), Box(across - 1, top, 2, foot - top)]
    return boxes


def _sentence(point: ParetoPoint) -> str:
    return (
        f"{point.name} {percent(point.quality.value)} ({percent_interval(point.quality)}) "
        f"at {digits(point.latency_ms.value)} ms, {megabytes(point.bytes)}"
    )
