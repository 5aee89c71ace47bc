"""What the charts of a profile share: text that fits, marks of different shapes, axes with room."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from edgeclip.profiles.report.report_charts import (
    Axis,
    line,
    linear_ticks,
    text_width,
    tick_name,
)
from edgeclip.runtime.quality.intervals import Interval

FONT = 13.0
BOLD = 1.15  # how much wider bold text is
WIDE, NARROW = 760, 358
# Shapes tell series apart where colours do not: in print, and for the colour-blind.
SHAPES = ("circle", "diamond", "square", "triangle", "cross")
_LOG_ABOVE = 10.0  # largest over smallest value
_REACH = 4.0  # times the values: how far their intervals are shown


def both_widths(draw: Callable[[bool], str]) -> str:
    """The wide and the narrow drawing; the page's style shows one of them."""
    return draw(False) + draw(True)


def fit(content: str, width: float, size: float = FONT) -> str:
    """`content`, cut with an ellipsis in its middle where it is wider than `width` pixels."""
    if text_width(content, size) <= width:
        return content
    keep = len(content)
    while keep > 2 and text_width(_cut(content, keep), size) > width:
        keep -= 1
    return _cut(content, keep)


def _cut(content: str, keep: int) -> str:
    """Ends differ more than beginnings do, so most of what stays is the end."""
    head = keep // 3
    return f"{content[:head]}…{content[len(content) - (keep - head) :]}"


def marker(shape: int, x: float, y: float, *, size: float = 4.5, title: str = "") -> str:
    """A filled mark around (x, y); shapes repeat after five."""
    words = f"<title>{escape(title)}</title>" if title else ""
    return f'<path d="{_outline(shape % len(SHAPES), x, y, size)}" class="dot">{words}</path>'


def _outline(shape: int, x: float, y: float, size: float) -> str:
    name = SHAPES[shape]
    if name == "circle":
        turn = f"a{size:.1f},{size:.1f} 0 1 0"
        return f"M{x - size:.1f},{y:.1f} {turn} {2 * size:.1f},0 {turn} {-2 * size:.1f},0 Z"
    corners = {
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "square": ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
        "triangle": ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
        "cross": (
            *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
            *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
        ),
    }[name]
    points = " L".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners)
    return f"M{points} Z"


def bounds(values: Iterable[Interval]) -> tuple[float, float]:
    """The least and the largest number of some intervals, as far as a picture has to show them.

    Two processes can give intervals that span decades; beyond some times the values themselves
    nothing more is seen of them.
    """
    intervals = list(values)
    middle = [interval.value for interval in intervals]
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    if min(middle) > 0:
        low, high = max(low, min(middle) / _REACH), min(high, _REACH * max(middle))
    return min(low, *middle), max(high, *middle)


def room_axis(low: float, high: float, *, start: float, end: float, log: bool | None) -> Axis:
    """An axis over [low, high] with some room; `log=None` lets the data decide."""
    if log is None:
        log = low > 0 and high / low > _LOG_ABOVE
    if log:
        low = max(low, 1e-12)
        room = max((high / low) ** 0.06, 1.06)
        return Axis(low=low / room, high=high * room, start=start, end=end, log=True)
    room = max((high - low) * 0.06, 1e-9, abs(high) * 0.01)
    foot = max(0.0, low - room) if low >= 0 else low - room
    return Axis(low=foot, high=high + room, start=start, end=end)


def named_ticks(x: Axis, count: int, width: float) -> list[tuple[float, str]]:
    """About `count` ticks of a horizontal axis whose names fit a picture of that width."""
    found: list[tuple[float, str]] = []
    free = 0.0
    for tick in x.ticks(count):
        name, at = tick_name(tick), x.at(tick)
        half = text_width(name, FONT) / 2
        if at - half >= free and at + half <= width:
            found.append((tick, name))
            free = at + half + 4
    return found


def held(axis: Axis, value: float) -> float:
    """The pixel of `value`, or the end of the axis that it lies beyond."""
    return axis.at(min(max(value, axis.low), axis.high))


def whisker(x: Axis, y: float, value: Interval) -> str:
    """A horizontal interval with small ends; an end beyond the axis is not drawn."""
    parts = [line(held(x, value.low), y, held(x, value.high), y, "whisker")]
    for end in (value.low, value.high):
        if x.low <= end <= x.high:
            parts.append(line(x.at(end), y - 3, x.at(end), y + 3, "whisker"))
    return "".join(parts)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until `gap` lies between each two, inside [low, high] where they fit."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = list(places)
    for before, at in zip([None, *order], order, strict=False):
        least = low if before is None else moved[before] + gap
        moved[at] = max(moved[at], least)
    for after, at in zip([None, *reversed(order)], reversed(order), strict=False):
        most = high if after is None else moved[after] - gap
        moved[at] = min(moved[at], most)
    return moved


def even_names(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Linear ticks with as many decimals as their step needs: 0.9990, 0.9995, 1.0000."""
    ticks = linear_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    places = next((p for p in range(12) if abs(round(step, p) - step) < step * 1e-6), 12)
    return [(tick, f"{tick:.{places}f}") for tick in ticks]


def finite(value: float) -> bool:
    """Whether a number can be drawn on a logarithmic axis."""
    return math.isfinite(value) and value > 0
