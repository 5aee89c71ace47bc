"""Histograms of run times as small charts, with the few slowest runs counted at the end."""

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.report.chart_parts import fit, named_ticks, room_axis
from edgeclip.profiles.report.profile_blocks import with_interval
from edgeclip.profiles.report.report_charts import Axis, line, svg, text, text_width
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.intervals import Interval

_WIDTH, _HEIGHT = 340, 176
_TOP, _FOOT = 56, 138
_LEFT, _RIGHT = 14, 326
_BINS = 56
_LEAST_PIXELS = 2.0  # a single run among thousands must be seen
_BODY = 99.0  # percent of the runs that the axis must hold
_BEYOND = 0.3  # how far it goes on, as a share of their range


def histogram(
    name: str,
    samples: NDArray[np.float64],
    *,
    median: Interval,
    tail: tuple[str, Interval] | None,
) -> str:
    """Draw how often each time was seen, with the median and a high percentile marked.

    The axis ends a little beyond the 99th percentile, or one slow run would hide the shape of
    all others; runs beyond it are counted in words. Empty without runs.

    Args:
        name: of the subject.
        samples: milliseconds [N].
        median: of the samples, with its interval.
        tail: name and value of a high percentile, such as "p99".
    """
    kept = samples[np.isfinite(samples) & (samples > 0)]
    if not len(kept):
        return ""
    axis = _axis(kept)
    edges = _edges(axis)
    counts, _ = np.histogram(kept, edges)
    biggest = max(1, int(counts.max()))
    bars = [
        _bar(axis, float(edges[at]), float(edges[at + 1]), int(number), biggest)
        for at, number in enumerate(counts)
        if number
    ]
    runs, slower = f"{len(kept):,} runs", kept[kept > edges[-1]]
    beyond = f"{len(slower):,} slower, up to {digits(float(kept.max()))} →" if len(slower) else ""
    label = f"{name}: histogram of {runs}, median {with_interval(median, 'ms')}"
    label += "" if tail is None else f", {tail[0]} {digits(tail[1].value)} ms"
    return svg(
        _WIDTH,
        _HEIGHT,
        [
            text(2, 14, fit(name, _WIDTH - 20 - text_width(runs, 13)), css="strong"),
            text(_WIDTH - 2, 14, runs, anchor="end"),
            *_ticks(axis),
            text(axis.end, _HEIGHT - 2, beyond, anchor="end"),
            f'<g class="student">{"".join(bars)}</g>',
            *_marks(axis, median, tail),
        ],
        label=f"{label} {beyond}".strip(),
    )


def _axis(samples: NDArray[np.float64]) -> Axis:
    low, most = float(samples.min()), float(samples.max())
    body = float(np.percentile(samples, _BODY))
    high = min(most, body + _BEYOND * (body - low))
    return room_axis(low, high, start=_LEFT, end=_RIGHT, log=None)


def _edges(axis: Axis) -> NDArray[np.float64]:
    if axis.log:
        return np.geomspace(axis.low, axis.high, _BINS + 1)
    return np.linspace(axis.low, axis.high, _BINS + 1)


def _bar(axis: Axis, low: float, high: float, number: int, biggest: int) -> str:
    left, right = axis.at(low), axis.at(high)
    height = max(_LEAST_PIXELS, (_FOOT - _TOP) * number / biggest)
    place = f'x="{left:.1f}" y="{_FOOT - height:.1f}"'
    size = f'width="{right - left:.2f}" height="{height:.1f}"'
    words = f"{digits(low)} to {digits(high)} ms: {number:,}"
    return f'<rect {place} {size} class="fill"><title>{words}</title></rect>'


def _ticks(axis: Axis) -> list[str]:
    parts = [line(axis.start, _FOOT, axis.end, _FOOT, "axis")]
    for tick, name in named_ticks(axis, 5, _WIDTH):
        at = axis.at(tick)
        parts.append(line(at, _FOOT, at, _FOOT + 4, "axis"))
        parts.append(text(at, _FOOT + 17, name, anchor="middle"))
    return [*parts, text(axis.start, _HEIGHT - 2, f"ms{' (log)' if axis.log else ''}")]


def _marks(axis: Axis, median: Interval, tail: tuple[str, Interval] | None) -> list[str]:
    """Lines at both percentiles, each named in a line of its own."""
    marks = [("p50", median.value, 34, "bar")]
    marks += [] if tail is None else [(tail[0], tail[1].value, 49, "bar second")]
    lines, names = [], []
    for name, value, height, css in marks:
        at = axis.at(min(max(value, axis.low), axis.high))
        words = f"{name} {digits(value)}"
        half = text_width(words, 13) / 2
        middle = min(max(at, axis.start + half), axis.end - half)
        lines.append(line(at, height + 4, at, _FOOT, css))
        names.append(text(middle, height, words, css="barname", anchor="middle"))
    return [*lines, f"<g>{''.join(names)}</g>"]
