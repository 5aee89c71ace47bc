"""Stacked bars: the steps of an answer, of a cold start, or the operators of a graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgeclip.profiles.report.chart_parts import NARROW, WIDE, fit, named_ticks
from edgeclip.profiles.report.report_charts import Axis, line, svg, text, text_width
from edgeclip.runtime.console import digits

_LABEL, _FIGURE = 244, 150
_BAR = 20.0


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts of one whole from left to right, as (name, value), and what is printed beside them."""

    label: str
    parts: tuple[tuple[str, float], ...]
    figure: str


def stack_chart(
    bars: Sequence[Bar], *, axis_name: str, label: str, narrow: bool, names: Sequence[str] = ()
) -> str:
    """Draw the bars over one axis that begins at 0; empty if there is nothing above 0.

    A part is named inside itself where it has room, else by its number, else by its order;
    neighbours differ in shade and are parted by a line. Numbers count in `names`, or else in
    the order in which names come up.
    """
    most = max((sum(value for _, value in bar.parts) for bar in bars), default=0.0)
    if most <= 0:
        return ""
    width = NARROW if narrow else WIDE
    step = 48.0 if narrow else 32.0
    start, end = (10, width - 10) if narrow else (_LABEL, width - _FIGURE)
    x = Axis(low=0.0, high=most, start=start, end=end)
    foot = 4 + step * len(bars)
    parts = [line(x.start, foot, x.end, foot, "axis")]
    for tick, name in named_ticks(x, 4 if narrow else 6, width):
        parts.append(line(x.at(tick), 4, x.at(tick), foot, "grid"))
        parts.append(text(x.at(tick), foot + 17, name, anchor="middle"))
    numbers = _numbers(bars, names)
    for at, bar in enumerate(bars):
        parts += _bar(bar, x, 4 + step * at, narrow, numbers)
    parts.append(text(x.end, foot + 36, axis_name, anchor="end"))
    spoken = "; ".join(f"{bar.label}: {_spoken(bar)}" for bar in bars)
    return svg(
        width,
        round(foot + 42),
        parts,
        label=f"{label}: {spoken}",
        css="narrow" if narrow else "wide",
    )


def _numbers(bars: Sequence[Bar], names: Sequence[str]) -> dict[str, int]:
    """A number for each name, from 1."""
    every = dict.fromkeys([*names, *(name for bar in bars for name, _ in bar.parts)])
    return {name: at for at, name in enumerate(every, 1)}


def _bar(bar: Bar, x: Axis, top: float, narrow: bool, numbers: dict[str, int]) -> list[str]:
    if narrow:
        room = x.end - x.start - text_width(bar.figure, 13) - 8
        words = [
            text(x.start, top + 14, fit(bar.label, room), css="strong"),
            text(x.end, top + 14, bar.figure, anchor="end"),
        ]
        top += 20
    else:
        top += 6
        name = fit(bar.label, _LABEL - 14)
        words = [
            text(x.start - 12, top + 15, name, css="strong", anchor="end"),
            text(x.end + 12, top + 15, fit(bar.figure, _FIGURE - 12)),
        ]
    pieces, done = [], 0.0
    for name, value in bar.parts:
        left, right = x.at(done), x.at(done + value)
        pieces.append(_piece(name, value, left, right, top, numbers[name], len(bar.parts) > 1))
        done += value
    return [*words, *pieces]


def _piece(
    name: str, value: float, left: float, right: float, top: float, number: int, named: bool
) -> str:
    width = max(0.5, right - left)
    place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_BAR:.1f}"'
    inside = ""
    if named:
        choices = (f"{number} {name}", str(number))
        inside = next((c for c in choices if text_width(c, 13) + 4 <= width), "")
    words = (
        text(left + width / 2, top + 14, inside, css="inside", anchor="middle") if inside else ""
    )
    tone = (number - 1) % 6 if named else 0
    title = f"<title>{escape(name)} {digits(value)}</title>"
    return f'<g class="s{tone}"><rect {place} class="part">{title}</rect></g>{words}'


def _spoken(bar: Bar) -> str:
    return ", ".join(f"{name} {digits(value)}" for name, value in bar.parts)
