"""Quality in any unit against latency: file size as area, every point labelled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgeclip.profiles.report.chart_parts import (
    NARROW,
    WIDE,
    bounds,
    even_names,
    fit,
    named_ticks,
)
from edgeclip.profiles.report.chart_scatter import Spot, spot_at, spot_labels, thin_line
from edgeclip.profiles.report.profile_data import QualityUnit
from edgeclip.profiles.report.report_charts import Axis, axes, line, svg, text
from edgeclip.profiles.report.report_data import ParetoPoint
from edgeclip.profiles.report.report_labels import Box
from edgeclip.runtime.console import percent
from edgeclip.runtime.quality.intervals import Interval

_ENDS = {"share": (0.0, 1.0), "cosine": (-1.0, 1.0), "points": (-math.inf, math.inf)}
_LEAST_RANGE = {"share": 0.02, "cosine": 1e-6, "points": 0.2}
_DOT = 3.0  # pixels: the radius of what marks a centre


@dataclass(frozen=True, slots=True)
class TradePoint:
    """A point and the facts that are printed below its name, the less important first."""

    point: ParetoPoint
    facts: tuple[str, ...]

    @property
    def spoken(self) -> str:
        """What a pointer or a screen reader is told."""
        return f"{self.point.name}: {', '.join(self.facts)}"


def trade_chart(
    points: Sequence[TradePoint],
    *,
    quality_name: str,
    unit: QualityUnit,
    latency_name: str,
    narrow: bool,
    bar: float | None = None,
) -> str:
    """Draw the points at 358 pixels (`narrow`) or 760 pixels wide; empty without points.

    A circle's area is proportional to the bytes on disk; whiskers are 95% intervals. A thin
    line joins the points that no other beats in both. `bar` is a share to reach.
    """
    if not points:
        return ""
    width, height = (NARROW, 380) if narrow else (WIDE, 400)
    these = [entry.point for entry in points]
    x = _latency_axis(these, start=74, end=width - 12)
    y = _quality_axis(these, unit, bar, start=height - 46, end=36)
    radii = _radii(these, 22.0 if narrow else 32.0)
    spots = [_spot(entry, r, x, y, narrow) for entry, r in zip(points, radii, strict=True)]
    front = [spots[these.index(point)] for point in frontier(these)]
    dashed, covered = _bar(bar, x, y)
    parts = [
        text(2, 16, fit(f"{quality_name}, higher is better", width - 4)),
        *axes(
            x, y, x_ticks=named_ticks(x, 4 if narrow else 7, width), y_ticks=_value_names(y, unit)
        ),
        text(x.end, height - 6, f"{latency_name}, ms (log), lower is better", anchor="end"),
        dashed,
        thin_line(front),
        *(_mark(e, s, r) for e, s, r in zip(points, spots, radii, strict=True)),
        *spot_labels(spots, front, covered, x, y),
    ]
    label = f"{quality_name} against {latency_name}: {'; '.join(e.spoken for e in points)}"
    return svg(width, height, parts, label=label, css="narrow" if narrow else "wide")


def frontier(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """The points that no other point beats in quality and latency, fastest first."""
    best: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.latency_ms.value, -p.quality.value)):
        if not best or point.quality.value > best[-1].quality.value:
            best.append(point)
    return best


def _value_names(axis: Axis, unit: QualityUnit) -> list[tuple[float, str]]:
    scale, ending = (100.0, "%") if unit == "share" else (1.0, "")
    ticks = even_names(scale * axis.low, scale * axis.high, 5)
    return [(value / scale, name + ending) for value, name in ticks]


def _latency_axis(points: Sequence[ParetoPoint], *, start: float, end: float) -> Axis:
    low, high = bounds(p.latency_ms for p in points)
    room = max((high / low) ** 0.12, 1.15)  # so that the circles stay inside
    return Axis(low=low / room, high=high * room, start=start, end=end, log=True)


def _quality_axis(
    points: Sequence[ParetoPoint],
    unit: QualityUnit,
    bar: float | None,
    *,
    start: float,
    end: float,
) -> Axis:
    seen = [p.quality for p in points]
    seen += [] if bar is None else [Interval(bar, bar, bar)]
    low, high = bounds(seen)
    least = _LEAST_RANGE[unit]
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    room = (high - low) * 0.15
    worst, best = _ENDS[unit]
    return Axis(
        low=max(low - room, min(low, worst) - room / 2),
        high=min(high + room, max(high, best) + room / 2),
        start=start,
        end=end,
    )


def _radii(points: Sequence[ParetoPoint], largest: float) -> list[float]:
    biggest = max(1, *(p.bytes for p in points))
    return [largest * math.sqrt(p.bytes / biggest) for p in points]


def _spot(entry: TradePoint, radius: float, x: Axis, y: Axis, narrow: bool) -> Spot:
    point, longest = entry.point, 160 if narrow else 320
    facts = entry.facts[-2:] if narrow else entry.facts
    return spot_at(
        x,
        y,
        point.latency_ms,
        point.quality,
        radius=max(_DOT, radius),
        css=point.role + (" chosen" if point.chosen else ""),
        lines=(fit(point.name, longest), fit(" · ".join(facts), longest)),
    )


def _mark(entry: TradePoint, spot: Spot, radius: float) -> str:
    place = f'cx="{spot.x:.1f}" cy="{spot.y:.1f}"'
    return (
        f'<g class="{spot.css}"><title>{escape(entry.spoken)}</title>'
        f'<circle {place} r="{radius:.1f}" class="area"/>{spot.whiskers}'
        f'<circle {place} r="{_DOT:g}" class="dot"/></g>'
    )


def _bar(bar: float | None, x: Axis, y: Axis) -> tuple[str, list[Box]]:
    """The share to reach as a dashed line with its name below, and what both cover."""
    if bar is None:
        return "", []
    at = y.at(bar)
    dashed = line(x.start, at, x.end, at, "bar")
    name = text(x.end, at + 14, f"bar {percent(bar)}", css="barname", anchor="end")
    return dashed + name, [Box(x.start, at - 1, x.end - x.start, 2), Box(x.end - 76, at, 76, 18)]
