"""The picture of a search: what each point loses against what it takes, with its gate as a line."""

from dataclasses import dataclass
from html import escape

from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.reporting.chart_parts import NARROW, WIDE, fit, marker, named_ticks
from edgeclip.runtime.reporting.chart_scatter import Spot, spot_at, spot_labels, thin_line
from edgeclip.runtime.reporting.report_charts import Axis, axes, line, svg, text, tick_name
from edgeclip.runtime.reporting.report_labels import Box

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
