"""Hand-written SVG for the report: drawing helpers, axes and the loss curves.

Colours come from the page's CSS variables through classes, so one drawing serves light,
dark and paper. A chart is drawn at about the size at which it is shown: text stays readable.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from edgeclip.profiles.report.report_data import Headline, LossCurve
from edgeclip.runtime.console import digits, percent, percent_interval

_MAX_POINTS = 200
_LOG_ABOVE = 30.0  # largest over smallest value from which a linear axis hides the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps data in [low, high] to pixels in [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        low, high, value = ((math.log(v) if self.log else v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the axis."""
        return (
            log_ticks(self.low, self.high, count)
            if self.log
            else linear_ticks(self.low, self.high, count)
        )


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` (at least 2) multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks if len(ticks) > 1 else linear_ticks(low, high, count + 1)


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Values 1, 2, 5 times powers of ten in [low, high]; fewer or finer ones to reach `count`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(range(1, 10))):
        values = [round(f * 10.0**d, 12) for d in decades for f in factors]
        inside = [v for v in values if low <= v <= high]
        if found and len(inside) > count:
            break
        found = inside
    return found if len(found) >= 2 else linear_ticks(low, high, count)


def tick_name(value: float) -> str:
    """A short name for a tick: 2,000, 0.5, 7.5e-4."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")


def text_width(text: str, size: float) -> float:
    """A generous guess of a text's width in a system font of `size` pixels."""
    return size * sum(1.05 if unicodedata.east_asian_width(c) in "WF" else 0.58 for c in text)


def text(x: float, y: float, content: str, *, css: str = "", anchor: str = "start") -> str:
    """An SVG text element; `content` is escaped."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{css}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """An SVG line element."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def path(points: Iterable[tuple[float, float]], css: str) -> str:
    """An SVG path through `points`."""
    return f'<path d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{css}"/>'


def svg(width: int, height: int, parts: Iterable[str], *, label: str, css: str = "") -> str:
    """An SVG picture that scales with the page and tells screen readers what it shows."""
    return (
        f'<svg class="chart {css}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
    )


def axes(
    x: Axis, y: Axis, *, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]
) -> list[str]:
    """Grid lines with their numbers; the x axis is drawn at the foot."""
    parts = []
    for value, name in y_ticks:
        at = y.at(value)
        parts += [
            line(x.start, at, x.end, at, "grid"),
            text(x.start - 7, at + 4, name, anchor="end"),
        ]
    for value, name in x_ticks:
        at = x.at(value)
        parts += [
            line(at, y.start, at, y.start + 4, "axis"),
            text(at, y.start + 18, name, anchor="middle"),
        ]
    return [*parts, line(x.start, y.start, x.end, y.start, "axis")]


def loss_chart(curve: LossCurve) -> str:
    """One training curve as a small chart; at most 200 points, each the mean of a few steps.

    Values that are not finite are left out. Returns an empty string if nothing is left.
    """
    steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
    keep = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if not len(values):
        return ""
    groups = np.array_split(np.arange(len(values)), min(len(values), _MAX_POINTS))
    xs = [float(steps[group].mean()) for group in groups]
    ys = [float(values[group].mean()) for group in groups]
    log = min(ys) > 0 and max(ys) / min(ys) > _LOG_ABOVE
    first = 0.0 if 0 <= min(xs) < 0.1 * max(xs) else min(xs)
    x = Axis(low=first, high=_above(first, max(xs)), start=48, end=312)
    y = _value_axis(ys, log)
    last = f"{digits(ys[-1])} at the end"
    return svg(
        340,
        196,
        [
            text(2, 14, curve.name, css="strong"),
            text(338, 14, last, css="student", anchor="end"),
            *axes(
                x,
                y,
                x_ticks=[(t, tick_name(t)) for t in x.ticks(4)],
                y_ticks=[(t, tick_name(t)) for t in y.ticks(4)],
            ),
            path([(x.at(a), y.at(b)) for a, b in zip(xs, ys, strict=True)], "curve student"),
            f'<circle cx="{x.at(xs[-1]):.1f}" cy="{y.at(ys[-1]):.1f}" r="3" class="dot student"/>',
        ],
        label=f"{curve.name} over {len(values)} logged steps"
        + (", logarithmic" if log else "")
        + f": from {digits(ys[0])} to {digits(ys[-1])}",
    )


def _value_axis(values: Sequence[float], log: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        return Axis(low=low / 1.1, high=high * 1.1, start=170, end=28, log=True)
    if 0 < low < 0.6 * high:
        low = 0.0  # a loss is read against zero where that does not flatten it
    return Axis(low=low, high=_above(low, high), start=170, end=28)


def _above(low: float, high: float) -> float:
    """`high`, or something above `low` where all values are alike."""
    return high if high > low else low + max(1e-6, abs(low) * 0.1)


def headline_chart(headline: Headline) -> str:
    """A headline's value and interval on a line, with the bar it is held against."""
    value, bar = headline.value, headline.bar
    seen = (value.low, value.high, value.value, bar)
    room = max(0.01, 0.35 * (max(seen) - min(seen)))
    x = Axis(low=min(seen) - room, high=max(seen) + room, start=6, end=294)
    good = (x.at(bar), x.end) if headline.direction == ">=" else (x.start, x.at(bar))
    low, high, at = x.at(value.low), x.at(value.high), x.at(value.value)
    near = min(max(x.at(bar), 50), 250)  # where the bar's name fits
    sign = "≥" if headline.direction == ">=" else "≤"
    return svg(
        300,
        44,
        [
            line(x.start, 14, x.end, 14, "axis"),
            line(good[0], 14, good[1], 14, "good"),
            f'<rect x="{low:.1f}" y="10" width="{max(1.0, high - low):.1f}" height="8" '
            f'rx="2" class="range"/>',
            line(x.at(bar), 4, x.at(bar), 24, "bar"),
            f'<circle cx="{at:.1f}" cy="14" r="5" class="dot student"/>',
            text(near, 39, f"bar {sign} {percent(bar)}", anchor="middle"),
        ],
        label=f"{headline.name}: {percent(value.value)}, interval {percent_interval(value)}, "
        f"bar {sign} {percent(bar)}",
        css="headline",
    )
