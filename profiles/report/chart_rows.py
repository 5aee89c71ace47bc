"""Rows of dots with intervals over one axis: percentiles, paired ratios, medians of processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.profiles.report.chart_parts import (
    NARROW,
    WIDE,
    both_widths,
    bounds,
    fit,
    marker,
    named_ticks,
    room_axis,
    whisker,
)
from edgeclip.profiles.report.report_charts import Axis, line, svg, text, text_width
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.intervals import Interval

_LABEL = 244  # pixels for the names of rows in the wide drawing
_FIGURE = 190  # and for their figures
_STEP = 7.0  # between the dots of one row, so that their intervals stay apart
_SIZE = 3.8


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; `shape` counts in `SHAPES`."""

    value: Interval
    shape: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Dots of one subject, and the figure that is printed beside them."""

    label: str
    dots: tuple[Dot, ...]
    figure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChart:
    """A chart of rows.

    Attributes:
        rows: from top to bottom; each has a dot at least.
        axis_name: what the axis shows, with its unit.
        label: what the picture shows, for a screen reader.
        legend: (shape, its meaning).
        reference: a value to compare with, and its name.
        log: whether the axis is logarithmic; None where the data decide.
        apart: whether the dots of a row lie below each other, so that intervals stay apart.
    """

    rows: tuple[Row, ...]
    axis_name: str
    label: str
    legend: tuple[tuple[int, str], ...] = ()
    reference: tuple[float, str] | None = None
    log: bool | None = None
    apart: bool = True


def row_picture(chart: RowChart) -> str:
    """The rows in both widths."""
    return both_widths(lambda narrow: row_chart(chart, narrow=narrow))


def row_chart(chart: RowChart, *, narrow: bool) -> str:
    """Draw the rows at 358 pixels (`narrow`) or 760 pixels wide; empty without rows."""
    if not chart.rows:
        return ""
    width = NARROW if narrow else WIDE
    step = _STEP if chart.apart else 0.0
    depth = step * (max(len(row.dots) for row in chart.rows) - 1)
    row_height = (46 if narrow else 24) + depth
    legend, head = _legend(chart.legend, width)
    top = head + (22 if chart.reference else 6)
    foot = top + row_height * len(chart.rows)
    x = _axis(chart, start=10 if narrow else _LABEL, end=width - (10 if narrow else _FIGURE))
    parts = [*legend, *_grid(chart, x, top, foot, width)]
    for at, row in enumerate(chart.rows):
        parts += _row(row, x, top + row_height * at, row_height, narrow, step)
    parts.append(text(x.end, foot + 36, fit(_axis_name(chart, x), x.end), anchor="end"))
    label = f"{chart.label}: " + "; ".join(f"{row.label} {row.figure}" for row in chart.rows)
    css = "narrow" if narrow else "wide"
    return svg(width, round(foot + 42), parts, label=label, css=css)


def _axis(chart: RowChart, *, start: float, end: float) -> Axis:
    low, high = bounds(dot.value for row in chart.rows for dot in row.dots)
    if chart.reference is not None:
        low, high = min(low, chart.reference[0]), max(high, chart.reference[0])
    return room_axis(low, high, start=start, end=end, log=chart.log)


def _axis_name(chart: RowChart, x: Axis) -> str:
    return f"{chart.axis_name}{' (log)' if x.log else ''}"


def _legend(entries: Sequence[tuple[int, str]], width: float) -> tuple[list[str], float]:
    """Shapes with their names, in as many lines as they need, and their height."""
    if not entries:
        return [], 0.0
    parts, across, down = [], 8.0, 12.0
    for shape, name in entries:
        needed = 22 + text_width(name, 13)
        if across + needed > width and across > 8:
            across, down = 8.0, down + 20
        mark = marker(shape, across, down)
        parts.append(f'<g class="student">{mark}</g>{text(across + 10, down + 4, name)}')
        across += needed + 8
    return parts, down + 14


def _grid(chart: RowChart, x: Axis, top: float, foot: float, width: int) -> list[str]:
    parts = [line(x.start, foot, x.end, foot, "axis")]
    count = 4 if width == NARROW else 6
    for tick, name in named_ticks(x, count, width):
        at = x.at(tick)
        parts.append(line(at, top, at, foot, "grid"))
        parts.append(text(at, foot + 17, name, anchor="middle"))
    if chart.reference is not None:
        value, name = chart.reference
        at = x.at(value)
        half = text_width(name, 13) / 2
        place = min(max(at, x.start + half), x.end - half) if 2 * half < x.end - x.start else at
        parts.append(line(at, top - 4, at, foot, "bar"))
        parts.append(text(place, top - 8, name, css="barname", anchor="middle"))
    return parts


def _row(row: Row, x: Axis, top: float, height: float, narrow: bool, step: float) -> list[str]:
    middle = top + (22 + (height - 22) / 2 if narrow else height / 2)
    if narrow:
        room = NARROW - 20 - text_width(row.figure, 13) - 8
        words = [
            text(10, top + 15, fit(row.label, room), css="strong"),
            text(NARROW - 10, top + 15, row.figure, anchor="end"),
        ]
    else:
        words = [
            text(_LABEL - 12, middle + 4, fit(row.label, _LABEL - 14), css="strong", anchor="end"),
            text(WIDE - _FIGURE + 12, middle + 4, fit(row.figure, _FIGURE - 12)),
        ]
    marks = []
    for at, dot in enumerate(row.dots):
        y = middle + step * (at - (len(row.dots) - 1) / 2)
        title = f"{dot.name} {digits(dot.value.value)}".strip()
        marks.append(whisker(x, y, dot.value))
        marks.append(marker(dot.shape, x.at(dot.value.value), y, size=_SIZE, title=title))
    return [f"<g>{''.join(words)}</g>", f'<g class="student">{"".join(marks)}</g>']
