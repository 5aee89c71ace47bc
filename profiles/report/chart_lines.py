"""Small charts of throughput against latency: a line for each number of threads, over batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.profiles.report.chart_parts import (
    bounds,
    fit,
    held,
    marker,
    named_ticks,
    room_axis,
    spread_out,
)
from edgeclip.profiles.report.report_charts import Axis, axes, line, path, svg, text, tick_name
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.intervals import Interval

_WIDTH, _HEIGHT = 340, 232
_NAME_GAP = 15.0
_COLOURS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPoint:
    """One batch size: items a second, and milliseconds for the whole batch."""

    batch: int
    rate: Interval
    ms: Interval


@dataclass(frozen=True, slots=True)
class Series:
    """A named line over batch sizes, ascending."""

    name: str
    points: tuple[BatchPoint, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Least and largest milliseconds and rates of all charts that share their axes."""

    ms: tuple[float, float]
    rate: tuple[float, float]


def shared_limits(series: Sequence[Series]) -> Limits:
    """Limits for the charts of all these lines."""
    points = [point for one in series for point in one.points]
    return Limits(bounds(p.ms for p in points), bounds(p.rate for p in points))


def batch_chart(title: str, series: Sequence[Series], limits: Limits) -> str:
    """Draw items a second over the time of a batch; empty if no line has two points.

    Args:
        title: of the chart.
        series: one line each, at most six.
        limits: of all charts that share the axes.
    """
    if all(len(one.points) < 2 for one in series):
        return ""
    x = room_axis(*limits.ms, start=56, end=_WIDTH - 92, log=True)
    y = room_axis(*limits.rate, start=_HEIGHT - 44, end=48, log=None)
    parts = [
        text(2, 14, fit(title, _WIDTH - 4), css="strong"),
        text(2, 32, f"items a second{' (log)' if y.log else ''}"),
        *axes(
            x,
            y,
            x_ticks=named_ticks(x, 4, _WIDTH - 92),
            y_ticks=[(t, tick_name(t)) for t in y.ticks(4)],
        ),
        text(x.end, _HEIGHT - 6, "ms a batch (log)", anchor="end"),
        *(_line(one, at, x, y) for at, one in enumerate(series)),
        _batches(series[-1], x, y),
        *_names(series, x, y),
    ]
    spoken = "; ".join(f"{one.name}: {_spoken(one)}" for one in series)
    return svg(_WIDTH, _HEIGHT, parts, label=f"{title}, items a second by batch: {spoken}")


def _line(series: Series, number: int, x: Axis, y: Axis) -> str:
    places = [(x.at(point.ms.value), y.at(point.rate.value)) for point in series.points]
    marks = []
    for (across, up), point in zip(places, series.points, strict=True):
        marks.append(
            line(across, held(y, point.rate.low), across, held(y, point.rate.high), "whisker")
        )
        marks.append(line(held(x, point.ms.low), up, held(x, point.ms.high), up, "whisker"))
        words = f"{series.name}, batch {point.batch}: {digits(point.rate.value)} a second"
        marks.append(marker(number, across, up, size=3.5, title=words))
    return f'<g class="s{number % _COLOURS}">{path(places, "trace")}{"".join(marks)}</g>'


def _batches(series: Series, x: Axis, y: Axis) -> str:
    """The batch sizes above the points of one line, as many as have room."""
    parts, free = [], 0.0
    for point in series.points:
        at, half = x.at(point.ms.value), 4.0 * len(str(point.batch))
        if at - half >= free:
            height = held(y, point.rate.high) - 9
            parts.append(text(at, height, str(point.batch), css="batch", anchor="middle"))
            free = at + half + 3
    return f"<g>{''.join(parts)}</g>"


def _names(series: Sequence[Series], x: Axis, y: Axis) -> list[str]:
    """The name of each line at the height of its end, with its shape."""
    ends = [y.at(one.points[-1].rate.value) for one in series]
    heights = spread_out(ends, _NAME_GAP, y.end - 4, y.start)
    parts = []
    for at, (one, height) in enumerate(zip(series, heights, strict=True)):
        mark = marker(at, x.end + 14, height, size=3.5)
        words = text(x.end + 23, height + 4, one.name, css="name")
        parts.append(f'<g class="s{at % _COLOURS}">{mark}{words}</g>')
    return parts


def _spoken(series: Series) -> str:
    return ", ".join(
        f"{digits(point.rate.value)} at {point.batch}, {digits(point.ms.value)} ms"
        for point in series.points
    )
