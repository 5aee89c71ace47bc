"""The roofline of a machine with the layers of a graph below it (Williams et al., 2009)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgeclip.profiles.record.measurement import Roofline
from edgeclip.profiles.report.chart_parts import BOLD, NARROW, WIDE, fit, held, named_ticks
from edgeclip.profiles.report.report_charts import (
    Axis,
    axes,
    line,
    svg,
    text,
    text_width,
    tick_name,
)
from edgeclip.profiles.report.report_labels import Anchor, Box, place_labels
from edgeclip.runtime.console import digits, percent
from edgeclip.runtime.quality.intervals import Interval

_NAME_HEIGHT = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoofPoint:
    """A layer: `intensity` in operations a byte, `gflops` in 10^9 operations a second."""

    number: int
    name: str
    intensity: float
    gflops: float
    share: float


def roofline_chart(
    points: Sequence[RoofPoint], roof: Roofline, *, title: str, named: int, narrow: bool
) -> str:
    """Draw the roofs and the layers, both axes logarithmic; empty without points.

    Args:
        points: the layers, the slowest first; all numbers above 0.
        roof: peaks of the machine.
        title: what the picture is of, for a screen reader.
        named: how many of the points get their names (wide) or numbers (narrow).
        narrow: 358 instead of 760 pixels wide.
    """
    if not points or not roof.peak_gflops:
        return ""
    width, height = (NARROW, 360) if narrow else (WIDE, 430)
    x, y = _axes_of(points, roof, width, height)
    parts = [
        text(2, 16, "10⁹ operations a second (log)"),
        *axes(
            x,
            y,
            x_ticks=named_ticks(x, 4 if narrow else 7, width),
            y_ticks=[(t, tick_name(t)) for t in y.ticks(6)],
        ),
        text(x.end, height - 6, "operations a byte (log)", anchor="end"),
    ]
    disturbed = roof.interference is not None and roof.interference.disturbed
    if disturbed:
        words = "disturbed" if narrow else "disturbed: roofs may be too low"
        parts.append(text(x.end, 16, words, css="barname", anchor="end"))
    roofs, boxes = _roofs(roof, x, y)
    parts += roofs
    parts += [_mark(point, x, y, narrow) for point in points]
    taken = max(text_width(_roof_name(*roof), 13) for roof in roof.peak_gflops)
    parts += _names(points[:named], x, y, boxes, taken, narrow)
    spoken = "; ".join(
        f"{p.name}: {digits(p.gflops)} at {digits(p.intensity)} operations a byte, "
        f"{percent(p.share)} of the time"
        for p in points[:named]
    )
    label = f"Roofline of {title}{', disturbed' if disturbed else ''}. {spoken}"
    return svg(width, height, parts, label=label, css="narrow" if narrow else "wide")


def _axes_of(
    points: Sequence[RoofPoint], roof: Roofline, width: int, height: int
) -> tuple[Axis, Axis]:
    """Axes with the points and the ridges (where both roofs meet) inside."""
    peaks = [peak.value for _, peak in roof.peak_gflops]
    ridges = [peak / roof.bandwidth_gb_s.value for peak in peaks]
    left = min(*(p.intensity for p in points), *ridges) / 2
    right = max(*(p.intensity for p in points), *ridges) * 3
    foot = min(*(p.gflops for p in points), *peaks) / 2
    top = max(*(p.gflops for p in points), *peaks) * 2
    return (
        Axis(low=left, high=right, start=58, end=width - 12, log=True),
        Axis(low=foot, high=top, start=height - 46, end=30, log=True),
    )


def _roofs(roof: Roofline, x: Axis, y: Axis) -> tuple[list[str], list[Box]]:
    """The roof of each precision, the slope of the memory, and what their names cover."""
    parts, boxes = [], []
    wide = roof.bandwidth_gb_s
    for precision, peak in roof.peak_gflops:
        ridge = min(max(peak.value / wide.value, x.low), x.high)
        at = y.at(peak.value)
        parts += [_band(x.at(ridge), x.end, y, peak), line(x.at(ridge), at, x.end, at, "roof")]
        words = _roof_name(precision, peak)
        parts.append(text(x.end, at - 6, words, css="barname", anchor="end"))
        length = text_width(words, 13)
        boxes += [Box(x.end - length, at - 19, length, 19), Box(x.at(ridge), at - 1, x.end, 2)]
    top = max(peak.value for _, peak in roof.peak_gflops)
    # The slope: from where it leaves the frame below or on the left, up to the highest roof.
    begin = max(x.low, y.low / wide.value)
    end = min(top / wide.value, x.high)
    (x1, y1), (x2, y2) = ((x.at(v), y.at(v * wide.value)) for v in (begin, end))
    parts.append(line(x1, y1, x2, y2, "roof"))
    words = f"memory {digits(wide.value)} GB/s"
    parts.append(_along(x1, y1, x2, y2, words))
    steps = max(1, int(math.dist((x1, y1), (x2, y2)) // 6))
    half = text_width(words, 13) / 2 / max(1.0, math.dist((x1, y1), (x2, y2)))
    for step in range(steps + 1):
        share = step / steps
        high = 26 if abs(share - 0.5) <= half else 8  # the name stands above the middle
        boxes.append(Box(x1 + share * (x2 - x1) - 8, y1 + share * (y2 - y1) - high, 12, high + 2))
    return parts, boxes


def _roof_name(precision: str, peak: Interval) -> str:
    return f"{precision} {digits(peak.value)}"


def _band(left: float, right: float, y: Axis, peak: Interval) -> str:
    high, low = held(y, peak.high), held(y, peak.low)
    size = f'width="{max(0.0, right - left):.1f}" height="{max(0.5, low - high):.1f}"'
    return f'<rect x="{left:.1f}" y="{high:.1f}" {size} class="roofband"/>'


def _along(x1: float, y1: float, x2: float, y2: float, words: str) -> str:
    """Text above a slope and turned with it; level above its end where the slope is short."""
    length = math.dist((x1, y1), (x2, y2))
    turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
    if length < text_width(words, 13) + 12:
        return text(max(x2, text_width(words, 13)), y2 - 24, words, css="barname", anchor="end")
    across, down = (x1 + x2) / 2, (y1 + y2) / 2
    place = f'transform="translate({across:.1f} {down:.1f}) rotate({turn:.1f})"'
    return f"<g {place}>{text(0, -7, words, css='barname', anchor='middle')}</g>"


def _radius(share: float, narrow: bool) -> float:
    return max(2.5, (14.0 if narrow else 20.0) * math.sqrt(min(1.0, share)))


def _mark(point: RoofPoint, x: Axis, y: Axis, narrow: bool) -> str:
    place = f'cx="{x.at(point.intensity):.1f}" cy="{y.at(point.gflops):.1f}"'
    words = f"{point.name}: {digits(point.gflops)} GFLOP/s, {percent(point.share)} of the time"
    return (
        f'<g class="student"><circle {place} r="{_radius(point.share, narrow):.1f}" class="area">'
        f'<title>{escape(words)}</title></circle><circle {place} r="1.5" class="dot"/></g>'
    )


def _names(
    points: Sequence[RoofPoint],
    x: Axis,
    y: Axis,
    boxes: Sequence[Box],
    taken: float,
    narrow: bool,
) -> list[str]:
    texts = [
        str(point.number) if narrow else f"{point.number} {fit(point.name, 130)}"
        for point in points
    ]
    anchors = [
        Anchor(
            x=x.at(point.intensity),
            y=y.at(point.gflops),
            radius=_radius(point.share, narrow),
            width=BOLD * text_width(words, 13),
            height=_NAME_HEIGHT,
        )
        for point, words in zip(points, texts, strict=True)
    ]
    # The names of the roofs stand at the right end, and are not to be covered.
    area = Box(x.start + 2, y.end - 4, x.end - x.start - taken - 8, y.start - y.end)
    parts = []
    for anchor, box, words in zip(anchors, place_labels(anchors, boxes, area), texts, strict=True):
        if box is None:
            continue
        near = box.nearest(anchor.x, anchor.y)
        far = math.dist(near, (anchor.x, anchor.y)) > anchor.radius + 12
        leader = line(anchor.x, anchor.y, *near, "leader") if far else ""
        words = text(box.x, box.y + 12, words, css="name")
        parts.append(f'<g class="student">{leader}{words}</g>')
    return parts
