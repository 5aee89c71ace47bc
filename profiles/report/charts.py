"""The kinds of charts that reports show: plain data, which `drawing.svg` turns into a picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.profiles.report.drawing import (
    COLOURS,
    NARROW,
    SERIES,
    SHAPES,
    SMALL,
    WIDE,
    Anchor,
    Box,
    Colour,
    bounds,
    canvas,
    finite,
    fit,
    inside,
    is_known,
    nearest,
    place_labels,
    set_axis,
    spread_out,
    text_width,
    tick_name,
    with_room,
    write,
)
from edgeclip.runtime.console import digits, percent, percent_interval
from edgeclip.runtime.stats.interval import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_LINE = 16.0  # pixels from one line of a label to the next
_CAP = 3.0  # half the length of a whisker's end


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterPoint:
    """A point of a scatter chart.

    Attributes:
        name: the first line of its label; "" for no label.
        short: its label on a phone; None for the name itself.
        facts: the other lines' parts, the less important first; a phone shows the last two.
        x, y: where it lies, with intervals drawn as whiskers.
        radius: radius of its circle, as a share of the largest; 0 for a mark alone.
        colour, shape: colour and shape of its mark; shapes count in `SHAPES`.
        chosen: drawn with emphasis.
    """

    name: str
    x: Interval
    y: Interval
    short: str | None = None
    facts: tuple[str, ...] = ()
    radius: float = 0.0
    colour: Colour = "blue"
    shape: int = 0
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterChart:
    """Points over two axes, labelled where there is room.

    Attributes:
        title: title for screen readers.
        points: what is shown, the most important first.
        x_name, y_name: names of the axes.
        x_limits, y_limits: limits of the axes; None to follow the points.
        x_log, y_log: whether an axis is logarithmic.
        y_percent: the y axis is a share, written in percent.
        front: points, by their place, that a thin line joins.
        bar: a value of y to reach, and its name.
        reference: a value of x to compare with, and its name.
        roofs: horizontal roofs over the points, with names, beside the slope of `slope`.
        slope: y over x of a rising line, and its name.
        note: a warning above the picture.
        largest: pixels of the largest radius, on a desk and on a phone.
    """

    small = False
    title: str
    points: tuple[ScatterPoint, ...]
    x_name: str
    y_name: str
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None
    x_log: bool = True
    y_log: bool = False
    y_percent: bool = False
    front: tuple[int, ...] = ()
    bar: tuple[float, str] | None = None
    reference: tuple[float, str] | None = None
    roofs: tuple[tuple[Interval, str], ...] = ()
    slope: tuple[float, str] | None = None
    note: str = ""
    largest: tuple[float, float] = (32.0, 22.0)

    @property
    def description(self) -> str:
        """Every point in words."""
        told = (
            f"{point.name or point.short}: "
            + (", ".join(point.facts) or f"{digits(point.x.value)}, {digits(point.y.value)}")
            for point in self.points
        )
        return f"{self.y_name} against {self.x_name}. {'; '.join(told)}"

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw marks, lines and labels; None without points."""
        if not self.points:
            return None
        width, height = (NARROW, 380) if narrow else (WIDE, 420)
        figure, axes = canvas(width, height, left=66, right=width - 12, top=34, foot=height - 46)
        x_limits = self.x_limits or bounds(point.x for point in self.points)
        y_limits = self.y_limits or bounds(point.y for point in self.points)
        set_axis(axes, "y", *y_limits, log=self.y_log, count=5, grid=True, percent=self.y_percent)
        set_axis(axes, "x", *x_limits, log=self.x_log, count=4 if narrow else 8)
        room = width - 4 - (text_width(self.note) + 12 if self.note else 0)
        write(figure, 2, 16, fit(self.y_name, room))
        if self.note:
            write(figure, width - 12, 16, self.note, colour="orange", anchor="right")
        write(figure, width - 12, height - 6, fit(self.x_name, width - 16), anchor="right")
        taken = [*self._lines(figure, axes, height), *self._roofs(figure, axes, height)]
        radii = [point.radius * self.largest[narrow] for point in self.points]
        places = [_pixels(axes, point.x.value, point.y.value) for point in self.points]
        if len(self.front) > 1:
            joined = [places[at] for at in self.front]
            axes.plot(
                [min(max(self.points[at].x.value, x_limits[0]), x_limits[1]) for at in self.front],
                [min(max(self.points[at].y.value, y_limits[0]), y_limits[1]) for at in self.front],
                color=COLOURS["muted"],
                linewidth=1,
                alpha=0.6,
            )
            taken += [box for one, two in itertools.pairwise(joined) for box in _along(one, two)]
        for point, radius in zip(self.points, radii, strict=True):
            _mark(axes, point, radius)
            taken += _whiskers(axes, point)
        self._labels(figure, axes, places, radii, taken, narrow)
        return figure

    def _lines(self, figure: "Figure", axes: "Axes", high: float) -> list[Box]:
        """The bar and the reference with their names, and what both cover."""
        left, foot, right, top = axes.bbox.extents
        covered: list[Box] = []
        if self.bar is not None:
            value, name = self.bar
            axes.axhline(value, color=COLOURS["bar"], linewidth=1.5, dashes=(3.3, 2.7))
            at = _pixels(axes, self.points[0].x.value, value)[1]
            below = at - foot > 24
            write(figure, right, high - at + (15 if below else -6), name, colour="orange",
                  anchor="right")  # fmt: skip
            wide = text_width(name)
            covered += [(left, at - 1, right, at + 1)]
            covered += [(right - wide, at - 19 if below else at, right, at if below else at + 19)]
        if self.reference is not None:
            value, name = self.reference
            axes.axvline(value, color=COLOURS["rule"], linewidth=1)
            at = _pixels(axes, value, self.points[0].y.value)[0]
            write(figure, at - 5, high - top - 1, name, anchor="right")
            covered.append((at - 5 - text_width(name), top - 14, at, top))
        return covered

    def _roofs(self, figure: "Figure", axes: "Axes", high: float) -> list[Box]:
        """The roofs, the slope below them, their names, and what all of them cover."""
        if not self.roofs or self.slope is None:
            return []
        left, _, right, _ = axes.bbox.extents
        (low_x, high_x), (low_y, _), covered = axes.get_xlim(), axes.get_ylim(), []
        steep, words = self.slope
        bar = COLOURS["bar"]
        for peak, name in self.roofs:
            ridge = min(max(peak.value / steep, low_x), high_x)
            foot, top = inside(peak, axes.get_ylim())
            axes.fill_between(
                [ridge, high_x], foot, top, color=COLOURS["bar"], alpha=0.2, linewidth=0
            )
            axes.plot([ridge, high_x], [peak.value] * 2, color=bar, linewidth=1.75)
            begin, at = _pixels(axes, ridge, peak.value)
            write(figure, right, high - at - 6, name, colour="orange", anchor="right")
            covered += [
                (right - text_width(name) - 6, at, right, at + 20),
                (begin, at - 1, right, at + 2),
            ]
        begin_x = max(low_x, low_y / steep)
        end_x = min(max(peak.value for peak, _ in self.roofs) / steep, high_x)
        axes.plot([begin_x, end_x], [steep * begin_x, steep * end_x], color=bar, linewidth=1.75)
        one, two = _pixels(axes, begin_x, steep * begin_x), _pixels(axes, end_x, steep * end_x)
        covered += list(_along(one, two, above=8))
        turn = math.atan2(two[1] - one[1], two[0] - one[0])
        wide = text_width(words)
        if math.dist(one, two) > wide + 12:  # along the slope
            x, y = (one[0] + two[0]) / 2, (one[1] + two[1]) / 2
            x, y = x - 7 * math.sin(turn), y + 7 * math.cos(turn)
            write(figure, x, high - y, words, colour="orange", anchor="center",
                  turn=math.degrees(turn))  # fmt: skip
            half = wide / 2 * math.cos(turn), wide / 2 * math.sin(turn)
            ends = (x - half[0], y - half[1]), (x + half[0], y + half[1])
            covered += list(_along(*ends, above=16))
        else:
            x = max(two[0], left + wide)
            write(figure, x, high - two[1] - 24, words, colour="orange", anchor="right")
            covered.append((x - wide, two[1] + 20, x, two[1] + 40))
        return covered

    def _labels(
        self,
        figure: "Figure",
        axes: "Axes",
        places: Sequence[tuple[float, float]],
        radii: Sequence[float],
        taken: Sequence[Box],
        narrow: bool,
    ) -> None:
        longest = 160 if narrow else 320
        texts = []
        for point in self.points:
            name = point.short if narrow and point.short is not None else point.name
            facts = " · ".join(point.facts[-2:] if narrow else point.facts)
            lines = [fit(name, longest, bold=True), fit(facts, longest)]
            texts.append([line for line in lines if line] if name else [])
        wanted = [at for at, lines in enumerate(texts) if lines]
        sizes = [
            (
                max(text_width(line, bold=not row) for row, line in enumerate(texts[at])),
                _LINE * len(texts[at]),
            )
            for at in wanted
        ]
        marks = [(*places[at], max(4.5, radii[at], 11.0 * self.points[at].chosen)) for at in wanted]
        others = [
            (x - r, y - r, x + r, y + r)
            for at, ((x, y), r) in enumerate(zip(places, radii, strict=True))
            if not texts[at]
        ]
        left, foot, right, top = axes.bbox.extents
        area = (left + 2, foot + 2, right, top + 8)
        boxes = place_labels(marks, sizes, [*taken, *others], area)
        high = 72 * float(figure.get_size_inches()[1])
        for at, (x, y, radius), box in zip(wanted, marks, boxes, strict=True):
            if box is None:
                continue
            near = nearest(box, x, y)
            away = math.dist(near, (x, y))
            if away > radius + 14:
                share = radius / away
                edge = x + share * (near[0] - x), y + share * (near[1] - y)
                _pixel_line(figure, edge, near)
            # Centred where the box sits above or below, else towards the mark.
            spot: tuple[float, Anchor] = ((box[0] + box[2]) / 2, "center")
            if box[2] < x:
                spot = box[2], "right"
            elif box[0] > x:
                spot = box[0], "left"
            for row, line in enumerate(texts[at]):
                write(
                    figure,
                    spot[0],
                    high - box[3] + 12 + _LINE * row,
                    line,
                    colour="muted" if row else self.points[at].colour,
                    bold=not row,
                    anchor=spot[1],
                )


def frontier(points: Sequence[ScatterPoint]) -> tuple[int, ...]:
    """The points, by their place, that no other beats in a small x and a large y, fastest first."""
    best: list[int] = []
    for at in sorted(range(len(points)), key=lambda i: (points[i].x.value, -points[i].y.value)):
        if not best or points[at].y.value > points[best[-1]].y.value:
            best.append(at)
    return tuple(best)


def _pixels(axes: "Axes", x: float, y: float) -> tuple[float, float]:
    """Convert a value to pixels from the left foot, clamped to the axes."""
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    held = min(max(x, low_x), high_x), min(max(y, low_y), high_y)
    across, up = axes.transData.transform(held)
    return float(across), float(up)


def _pixel_line(figure: "Figure", one: tuple[float, float], two: tuple[float, float]) -> None:
    """A leader from a mark to its label, in pixels upwards."""
    from matplotlib.lines import Line2D

    width, height = 72 * figure.get_size_inches()
    ends = [one[0] / width, two[0] / width], [one[1] / height, two[1] / height]
    figure.add_artist(Line2D(*ends, color=COLOURS["muted"], linewidth=0.75))


def _along(one: tuple[float, float], two: tuple[float, float], *, above: float = 1.0) -> list[Box]:
    """Small boxes along a line."""
    steps = max(1, int(math.dist(one, two) // 6))
    shares = (step / steps for step in range(steps + 1))
    middles = ((one[0] + s * (two[0] - one[0]), one[1] + s * (two[1] - one[1])) for s in shares)
    return [(x - above / 2, y - 1, x + above / 2, y + above) for x, y in middles]


def _mark(axes: "Axes", point: ScatterPoint, radius: float) -> None:
    """The mark of a point, held inside the axes."""
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    x, y = min(max(point.x.value, low_x), high_x), min(max(point.y.value, low_y), high_y)
    colour = COLOURS[point.colour]
    size = min(3.0, max(1.5, radius / 4)) if point.radius else 4.5
    ring = radius if point.radius else 11.0 * point.chosen
    if ring:
        alpha = (0.32, 1.0) if point.chosen else (0.13, 0.55)
        axes.plot(x, y, "o", markersize=2 * ring, color=colour, alpha=alpha[0], markeredgewidth=0,
                  clip_on=False)  # fmt: skip
        axes.plot(x, y, "o", markersize=2 * ring, fillstyle="none", color=colour, alpha=alpha[1],
                  markeredgewidth=1.5 if point.chosen else 1, clip_on=False)  # fmt: skip
    axes.plot(x, y, SHAPES[point.shape], markersize=2 * size, color=colour, markeredgewidth=0,
              clip_on=False)  # fmt: skip


def _whiskers(axes: "Axes", point: ScatterPoint) -> list[Box]:
    """Draw the intervals of a point, and say what they cover."""
    across, up = inside(point.x, axes.get_xlim()), inside(point.y, axes.get_ylim())
    (left, y), (right, _) = (_pixels(axes, end, point.y.value) for end in across)
    (x, foot), (_, top) = (_pixels(axes, point.x.value, end) for end in up)
    colour = COLOURS[point.colour]
    if right > left:
        axes.plot(across, [point.y.value] * 2, color=colour, linewidth=1.5)
    if top > foot:
        axes.plot([point.x.value] * 2, up, color=colour, linewidth=1.5)
    return [(left, y - 1, right, y + 1), (x - 1, foot, x + 1, top)]


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; `shape` counts in `SHAPES`."""

    value: Interval
    shape: int = 0


@dataclass(frozen=True, slots=True)
class DotRow:
    """Dots of one subject, and the figure that is printed beside them."""

    label: str
    dots: tuple[Dot, ...]
    figure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChart:
    """Rows of dots with intervals over one axis: percentiles, ratios, medians of processes.

    Attributes:
        rows: from top to bottom; each has a dot at least.
        axis_name: what the axis shows, with its unit.
        title: title for screen readers.
        legend: (shape, its meaning).
        reference: a value to compare with, and its name.
        log: whether the axis is logarithmic; None where the data decide.
        apart: whether the dots of a row lie below each other, so that intervals stay apart.
    """

    small = False
    rows: tuple[DotRow, ...]
    axis_name: str
    title: str
    legend: tuple[tuple[int, str], ...] = ()
    reference: tuple[float, str] | None = None
    log: bool | None = None
    apart: bool = True

    @property
    def description(self) -> str:
        """The figure of each row."""
        return "; ".join(f"{row.label} {row.figure}" for row in self.rows)

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw the rows with their names and figures; None without rows."""
        if not self.rows:
            return None
        width, (name_room, figure_room) = (NARROW, (10, 10)) if narrow else (WIDE, (244, 190))
        apart = 7.0 if self.apart else 0.0
        depth = apart * (max(len(row.dots) for row in self.rows) - 1)
        step = (46 if narrow else 24) + depth
        legend, head = _legend_places(self.legend, width)
        top = head + (22 if self.reference else 6)
        foot = top + step * len(self.rows)
        figure, axes = canvas(
            width, foot + 42, left=name_room, right=width - figure_room, top=top, foot=foot
        )
        low, high = bounds(dot.value for row in self.rows for dot in row.dots)
        if self.reference is not None:
            low, high = min(low, self.reference[0]), max(high, self.reference[0])
        low, high, log = with_room(low, high, log=self.log)
        axes.set_ylim(foot, top)
        axes.set_yticks([])
        set_axis(axes, "x", low, high, log=log, count=4 if narrow else 6, grid=True)
        for (shape, name), (x, y) in zip(self.legend, legend, strict=True):
            _pixel_mark(figure, x, y - 4, SHAPES[shape], "blue")
            write(figure, x + 10, y, name)
        self._dots(axes, top, step, narrow)
        for at, row in enumerate(self.rows):
            y = top + step * at + (15 if narrow else step / 2 + 4)
            _row_words(figure, row.label, row.figure, y, narrow, 190)
        if self.reference is not None:
            value, name = self.reference
            axes.axvline(value, color=COLOURS["bar"], linewidth=1.5, dashes=(3.3, 2.7))
            half, at_x = text_width(name) / 2, _pixels(axes, value, top)[0]
            at_x = min(max(at_x, 4 + half), width - 4 - half)
            write(figure, at_x, top - 7, name, colour="orange", anchor="center")
        axis_name = f"{self.axis_name} (log)" if log else self.axis_name
        write(figure, width - figure_room, foot + 37, fit(axis_name, width - figure_room),
              anchor="right")  # fmt: skip
        return figure

    def _dots(self, axes: "Axes", top: float, step: float, narrow: bool) -> None:
        """All whiskers with their ends, and above them the dots of each shape."""
        apart = 7.0 if self.apart else 0.0
        places: list[tuple[float, Dot]] = []
        for at, row in enumerate(self.rows):
            middle = top + step * at + (22 + (step - 22) / 2 if narrow else step / 2)
            first = middle - apart * (len(row.dots) - 1) / 2
            places += [(first + apart * number, dot) for number, dot in enumerate(row.dots)]
        known = [(y, dot.value) for y, dot in places if is_known(dot.value)]
        wide = [(y, value) for y, value in known if value.low < value.high]
        blue = COLOURS["blue"]
        if wide:
            low, high = sorted(axes.get_xlim())
            lows, highs = zip(*(inside(value, (low, high)) for _, value in wide), strict=True)
            axes.hlines([y for y, _ in wide], lows, highs, colors=blue, linewidth=1.5)
            ends = [(end, y) for y, value in wide for end in (value.low, value.high)]
            seen = [(end, y) for end, y in ends if low <= end <= high]
            axes.plot([end for end, _ in seen], [y for _, y in seen], "|", color=blue,
                      markersize=2 * _CAP, markeredgewidth=1.5)  # fmt: skip
        for shape in sorted({dot.shape for _, dot in places}):
            those = [(dot.value.value, y) for y, dot in places if dot.shape == shape]
            across, up = zip(*those, strict=True)
            axes.plot(across, up, SHAPES[shape], markersize=7.6, color=blue,
                      markeredgewidth=0, clip_on=False)  # fmt: skip


def _row_words(
    figure: "Figure", label: str, value: str, y: float, narrow: bool, room: float
) -> None:
    """The name of a row and its figure: above it on a phone, at both sides on a desk."""
    if narrow:
        left = NARROW - 28 - text_width(value)
        write(figure, 10, y, fit(label, left, bold=True), colour="ink", bold=True)
        write(figure, NARROW - 10, y, value, anchor="right")
    else:
        write(figure, 232, y, fit(label, 230, bold=True), colour="ink", bold=True, anchor="right")
        write(figure, WIDE - room + 12, y, fit(value, room - 12))


def _legend_places(
    entries: Sequence[tuple[int, str]], width: float
) -> tuple[list[tuple[float, float]], float]:
    """Where entries stand, in as many lines as they need, and the height of all."""
    places, across, down = [], 8.0, 16.0
    for _, name in entries:
        needed = 30 + text_width(name)
        if across + needed > width and across > 8:
            across, down = 8.0, down + 20
        places.append((across, down))
        across += needed
    return places, (down + 10 if entries else 0.0)


def _pixel_mark(
    figure: "Figure", x: float, y: float, shape: str, colour: Colour, size: float = 9.0
) -> None:
    """A mark beside the axes, at pixels from the left top."""
    from matplotlib.lines import Line2D

    width, height = 72 * figure.get_size_inches()
    figure.add_artist(
        Line2D(
            [x / width],
            [1 - y / height],
            marker=shape,
            markersize=size,
            linestyle="none",
            color=COLOURS[colour],
            markeredgewidth=2.0 if shape == "|" else 0.0,
        )
    )


@dataclass(frozen=True, slots=True)
class StackBar:
    """Parts of one whole from left to right, as (name, value), and what is printed beside them.

    Attributes:
        label: label of the bar.
        parts: names and values.
        figure: printed beside it.
        mark: a value beyond the sum, such as a 95th percentile; None for none.
        chosen: drawn with emphasis.
    """

    label: str
    parts: tuple[tuple[str, float], ...]
    figure: str
    mark: float | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StackChart:
    """Stacked bars over one axis from 0: steps of an answer, of a start, operators of a graph.

    A part is named inside itself where it has room, else by its number, else by its order.

    Attributes:
        bars: from top to bottom.
        axis_name: with its unit.
        title: title for screen readers.
        names: names of all parts in the order of their numbers; () for the order in which they
            come.
        colours: colours of parts by their names, with how strong they are; by number where it is
            empty.
        legend: whether names stand above the picture, not inside parts.
        mark_name: what the marks of bars are.
        limit: a value to keep, and its name.
    """

    small = False
    bars: tuple[StackBar, ...]
    axis_name: str
    title: str
    names: tuple[str, ...] = ()
    colours: Mapping[str, tuple[Colour, float]] = field(default_factory=dict)
    legend: bool = False
    mark_name: str = ""
    limit: tuple[float, str] | None = None

    @property
    def description(self) -> str:
        """The parts of each bar."""
        return "; ".join(
            f"{bar.label}: {', '.join(f'{name} {digits(value)}' for name, value in bar.parts)}"
            + (f", {self.mark_name} {digits(bar.mark)}" if bar.mark is not None else "")
            for bar in self.bars
        )

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw bars, names and figures; None if nothing is above 0."""
        most = max(
            (max(math.fsum(v for _, v in bar.parts), bar.mark or 0.0) for bar in self.bars),
            default=0.0,
        )
        if most <= 0:
            return None
        width, (name_room, figure_room) = (NARROW, (10, 10)) if narrow else (WIDE, (244, 150))
        step = 48.0 if narrow else 32.0
        every = tuple(dict.fromkeys([*self.names, *(n for b in self.bars for n, _ in b.parts)]))
        shown = [
            n for n in every if any(n == name and v > 0 for b in self.bars for name, v in b.parts)
        ]
        entries = [(0, name) for name in shown] if self.legend else []
        if self.legend and self.mark_name:
            entries.append((0, self.mark_name))
        places, head = _legend_places(entries, width)
        kept = self.limit if self.limit is not None and self.limit[0] <= most else None
        top = head + (22 if kept else 4)
        foot = top + step * len(self.bars)
        figure, axes = canvas(
            width, foot + 42, left=name_room, right=width - figure_room, top=top, foot=foot
        )
        axes.set_ylim(foot, top)
        axes.set_yticks([])
        set_axis(axes, "x", 0.0, most * (1.02 if self.mark_name else 1.0), count=4 if narrow else 6,
                 grid=True)  # fmt: skip
        for (_, name), (x, y) in zip(entries, places, strict=True):
            if name == self.mark_name:
                _pixel_mark(figure, x, y - 4, "|", "ink", 14.0)
            else:
                self._legend_box(figure, x, y, *self._colour(name, every))
            write(figure, x + 12, y, name)
        for at, bar in enumerate(self.bars):
            self._bar(figure, axes, bar, top + step * at, every, narrow)
        if kept is not None:
            axes.axvline(kept[0], color=COLOURS["bar"], linewidth=1.5, dashes=(3.3, 2.7))
            at_x = _pixels(axes, kept[0], top)[0]
            half = text_width(kept[1]) / 2
            write(figure, min(max(at_x, half + 4), width - half - 4), top - 7, kept[1],
                  colour="orange", anchor="center")  # fmt: skip
        write(figure, width - figure_room, foot + 37, self.axis_name, anchor="right")
        return figure

    def _colour(self, name: str, every: Sequence[str]) -> tuple[Colour, float]:
        if name in self.colours:
            return self.colours[name]
        alone = len(every) == 1 or all(len(bar.parts) == 1 for bar in self.bars)
        return ("blue" if alone else SERIES[every.index(name) % len(SERIES)]), 0.3

    @staticmethod
    def _legend_box(figure: "Figure", x: float, y: float, colour: Colour, strong: float) -> None:
        from matplotlib.patches import Rectangle

        width, height = 72 * figure.get_size_inches()
        figure.add_artist(
            Rectangle(
                ((x - 5) / width, 1 - (y + 1) / height),
                12 / width,
                12 / height,
                color=COLOURS[colour],
                alpha=strong,
                linewidth=0,
            )
        )

    def _bar(
        self,
        figure: "Figure",
        axes: "Axes",
        bar: StackBar,
        top: float,
        every: Sequence[str],
        narrow: bool,
    ) -> None:
        middle = top + (32 if narrow else 16)
        label = f"▸ {bar.label}" if bar.chosen else bar.label
        y = top + 14 if narrow else middle + 5
        _row_words(figure, label, bar.figure, y, narrow, 150)
        done = 0.0
        for name, value in bar.parts:
            colour, strong = self._colour(name, every)
            axes.barh(middle, value, 20, left=done, color=COLOURS[colour], alpha=strong,
                      linewidth=0)  # fmt: skip
            if not self.colours:
                axes.barh(middle, value, 20, left=done, facecolor="none",
                          edgecolor=COLOURS[colour], linewidth=1)  # fmt: skip
            left, right = (_pixels(axes, x, middle)[0] for x in (done, done + value))
            number = every.index(name) + 1
            if len(bar.parts) > 1 and not self.legend:
                for words in (f"{number} {name}", str(number)):
                    if text_width(words) + 4 <= right - left:
                        write(figure, (left + right) / 2, middle + 4, words, colour="ink",
                              anchor="center", inside=True)  # fmt: skip
                        break
            done += value
        if bar.mark is not None:
            axes.plot(
                [min(done, bar.mark), bar.mark], [middle] * 2, color=COLOURS["ink"], linewidth=1
            )
            axes.plot([bar.mark] * 2, [middle - 11, middle + 11], color=COLOURS["ink"], linewidth=2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HistogramChart:
    """How often each time was seen, with the median and a high percentile marked.

    The axis ends a little beyond the 99th percentile, or one slow run would hide the shape of
    all others; runs beyond it are counted in words.

    Attributes:
        title: the subject.
        samples: milliseconds; what is not finite and above 0 is left out.
        median: with its interval.
        tail: name and value of a high percentile, such as "p99".
    """

    small = True
    title: str
    samples: tuple[float, ...]
    median: Interval
    tail: tuple[str, Interval] | None

    @property
    def description(self) -> str:
        """The number of runs and both percentiles."""
        words = f"{len(self.samples):,} runs, median {digits(self.median.value)} ms"
        return words + (f", {self.tail[0]} {digits(self.tail[1].value)} ms" if self.tail else "")

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw it; None without runs."""
        samples = np.array([ms for ms in self.samples if finite(ms)], dtype=np.float64)
        if not len(samples):
            return None
        low, most = float(samples.min()), float(samples.max())
        body = float(np.percentile(samples, 99))
        low, high, log = with_room(low, min(most, body + 0.3 * (body - low)), log=None)
        edges = np.geomspace(low, high, 57) if log else np.linspace(low, high, 57)
        counts, _ = np.histogram(samples, edges)
        figure, axes = canvas(SMALL, 176, left=14, right=326, top=56, foot=138)
        axes.set_ylim(0, max(1, int(counts.max())))
        axes.set_yticks([])
        set_axis(axes, "x", low, high, log=log, count=5)
        seen = np.maximum(counts, (counts > 0) * 2 / 82 * counts.max())  # one run must be seen
        axes.stairs(seen, edges, fill=True, color=COLOURS["blue"], alpha=0.7, linewidth=0)
        runs, slower = f"{len(samples):,} runs", int((samples > edges[-1]).sum())
        name = fit(self.title, SMALL - 20 - text_width(runs), bold=True)
        write(figure, 2, 14, name, colour="ink", bold=True)
        write(figure, SMALL - 2, 14, runs, anchor="right")
        write(figure, 14, 174, f"ms{' (log)' if log else ''}")
        if slower:
            write(figure, 326, 174, f"{slower:,} slower, up to {digits(most)} →", anchor="right")
        marks = [("p50", self.median.value, 34, (3.3, 2.7))]
        marks += [] if self.tail is None else [(self.tail[0], self.tail[1].value, 49, (1.3, 2.0))]
        for name, value, y, dashes in marks:
            at = _pixels(axes, value, 0)[0]
            up = (134 - y) / 82 * max(1, counts.max())
            axes.plot([min(max(value, low), high)] * 2, [0, up],
                      color=COLOURS["bar"], linewidth=1.5, dashes=dashes,
                      clip_on=False)  # fmt: skip
            words = f"{name} {digits(value)}"
            half = text_width(words) / 2
            write(figure, min(max(at, 14 + half), 326 - half), y, words, colour="orange",
                  anchor="center")  # fmt: skip
        return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionChart:
    """A small chart of how often each value was seen, of as many values as there are.

    The axis ends a little beyond the 0.5th and the 99.5th percentile, and values beyond it are
    counted in words. `distribution` counts the values.

    Attributes:
        title: what the values are of.
        unit: what the axis shows.
        counts: of equal steps between `low` and `high`, of their logarithms if `log` is set.
        total, median: of all values.
        beyond: how many lie below `low`, and above `high`.
        other: counts of other values to compare with, and their name; drawn as a line.
        marks: names and values of lines, at most two.
    """

    small = True
    title: str
    unit: str
    counts: tuple[int, ...]
    low: float
    high: float
    log: bool
    total: int
    median: float
    beyond: tuple[int, int] = (0, 0)
    other: tuple[tuple[int, ...], str] | None = None
    marks: tuple[tuple[str, float], ...] = ()

    @property
    def description(self) -> str:
        """The number of values, the median and the marks."""
        words = f"{self.total:,} of {self.unit}, median {digits(self.median)}"
        return "; ".join([words, *(f"{name} {_number(value)}" for name, value in self.marks)])

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw it; None without values."""
        if not self.total:
            return None
        most = max(1, *self.counts)
        figure, axes = canvas(SMALL, 176, left=14, right=326, top=56, foot=138)
        axes.set_ylim(0, most)
        axes.set_yticks([])
        set_axis(axes, "x", self.low, self.high, log=self.log, count=5)
        space = np.geomspace if self.log else np.linspace
        edges = space(self.low, self.high, len(self.counts) + 1)
        counts = np.array(self.counts)
        seen = np.maximum(counts, (counts > 0) * 2 / 82 * most)  # a single one must be seen
        axes.stairs(seen, edges, fill=True, color=COLOURS["blue"], alpha=0.7, linewidth=0)
        name = fit(self.title, SMALL - 110, bold=True)
        write(figure, 2, 14, name, colour="ink", bold=True)
        write(figure, SMALL - 2, 14, f"median {digits(self.median)}", anchor="right")
        if self.other is not None:
            others, words = self.other
            line = np.array(others) * most / max(1, *others)
            axes.stairs(line, edges, color=COLOURS["muted"], linewidth=1.25)
            write(figure, 14, 34, f"line: {words}")
        write(figure, 14, 174, f"{self.unit}{' (log)' if self.log else ''}")
        below, above = self.beyond
        if below or above:
            words = " · ".join(
                [*([f"← {below:,}"] if below else []), *([f"{above:,} →"] if above else [])]
            )
            write(figure, 326, 174, words, anchor="right")
        for number, (words, value) in enumerate(self.marks):
            y = 49 - 15 * (number if self.other is None else 0)
            held = min(max(value, self.low), self.high)
            at, up = _pixels(axes, held, 0)[0], (134 - y) / 82 * most
            axes.plot([held] * 2, [0, up], color=COLOURS["bar"], linewidth=1.5,
                      dashes=(3.3, 2.7), clip_on=False)  # fmt: skip
            label = f"{words} {_number(value)}"
            half = text_width(label) / 2
            write(figure, min(max(at, 14 + half), 326 - half), y, label, colour="orange",
                  anchor="center")  # fmt: skip
        return figure


_STEPS = 52  # of a distribution
_FAR = 1.0  # of the width of the middle 99%: no mark beyond is shown


def distribution(
    title: str,
    values: "NDArray[Any]",
    unit: str,
    *,
    other: "tuple[NDArray[Any], str] | None" = None,
    marks: tuple[tuple[str, float], ...] = (),
    whole: bool = False,
    log: bool | None = None,
) -> DistributionChart | None:
    """Count values, of which those that are not finite are left out; None without any.

    Args:
        title, unit, marks: see `DistributionChart`.
        values: one dimension.
        other: values to compare with, and their name.
        whole: the values are whole numbers, so no step is smaller than 1.
        log: whether the axis is logarithmic; None where the values decide.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = (float(end) for end in np.percentile(values, (0.5, 99.5)))
    width = high - low
    low = max(float(values.min()), low - 0.15 * width)
    high = min(float(values.max()), high + 0.15 * width)
    shown = [value for _, value in marks if low - _FAR * width <= value <= high + _FAR * width]
    others = np.empty(0) if other is None else other[0][np.isfinite(other[0])]
    shown += np.percentile(others, (0.5, 99.5)).tolist() if len(others) else []
    low, high, log = with_room(min([low, *shown]), max([high, *shown]), log=log)
    steps = _STEPS
    if whole and not log:  # as many whole numbers in each step
        in_step = max(1, math.ceil((high - low) / _STEPS))
        low = math.floor(low) - 0.5
        steps = math.ceil((high - low) / in_step)
        high = low + steps * in_step
    edges = np.geomspace(low, high, steps + 1) if log else np.linspace(low, high, steps + 1)
    return DistributionChart(
        title=title,
        unit=unit,
        counts=_counts(values, edges),
        low=low,
        high=high,
        log=log,
        total=len(values),
        median=float(np.median(values)),
        beyond=(int((values < low).sum()), int((values > high).sum())),
        other=None if other is None else (_counts(others, edges), other[1]),
        marks=marks,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else digits(value)


def _counts(values: "NDArray[Any]", edges: "NDArray[Any]") -> tuple[int, ...]:
    counts, _ = np.histogram(values, edges)
    return tuple(counts.tolist())


@dataclass(frozen=True, slots=True)
class Series:
    """A named line: points (x, y) with intervals, and a name for each where there is one."""

    name: str
    x: tuple[Interval, ...]
    y: tuple[Interval, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepChart:
    """A small chart of throughput against latency: a line for each number of threads.

    Attributes:
        title: the subject.
        series: one line each, at most six; the points of the last are named.
        x_limits, y_limits: limits of all charts that share their axes.
    """

    small = True
    title: str
    series: tuple[Series, ...]
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]

    @property
    def description(self) -> str:
        """Every point in words."""
        lines = (
            f"{one.name}: "
            + ", ".join(
                f"{digits(y.value)} at batch {name}, {digits(x.value)} ms"
                for x, y, name in zip(one.x, one.y, one.names, strict=True)
            )
            for one in self.series
        )
        return f"items a second by batch. {'; '.join(lines)}"

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw the lines; None if none has two points."""
        if all(len(one.x) < 2 for one in self.series):
            return None
        right, foot = SMALL - 92, 188
        figure, axes = canvas(SMALL, 232, left=56, right=right, top=48, foot=foot)
        low, high, log = with_room(*self.y_limits, log=None)
        set_axis(axes, "y", low, high, log=log, count=4, grid=True)
        low, high, _ = with_room(*self.x_limits, log=True)
        set_axis(axes, "x", low, high, log=True, count=4)
        write(figure, 2, 14, fit(self.title, SMALL - 4, bold=True), colour="ink", bold=True)
        write(figure, 2, 32, f"items a second{' (log)' if log else ''}")
        write(figure, right, 226, "ms a batch (log)", anchor="right")
        ends = []
        for at, one in enumerate(self.series):
            colour = SERIES[at % len(SERIES)]
            across, up = [x.value for x in one.x], [y.value for y in one.y]
            foots, tops = zip(*(inside(y, axes.get_ylim()) for y in one.y), strict=True)
            lefts, rights = zip(*(inside(x, axes.get_xlim()) for x in one.x), strict=True)
            axes.vlines(across, foots, tops, colors=COLOURS[colour], linewidth=1.5)
            axes.hlines(up, lefts, rights, colors=COLOURS[colour], linewidth=1.5)
            axes.plot(across, up, SHAPES[at % len(SHAPES)] + "-", color=COLOURS[colour],
                      linewidth=1.75, markersize=7, markeredgewidth=0)  # fmt: skip
            ends.append(232 - _pixels(axes, across[-1], up[-1])[1])
        self._batches(figure, axes)
        for at, y in enumerate(spread_out(ends, 15.0, 44, foot)):
            colour = SERIES[at % len(SERIES)]
            _pixel_mark(figure, right + 14, y, SHAPES[at % len(SHAPES)], colour, 7.0)
            write(figure, right + 23, y + 4, self.series[at].name, colour=colour, bold=True)
        return figure

    def _batches(self, figure: "Figure", axes: "Axes") -> None:
        """The batch sizes above the points of the last line, as many as have room."""
        last, free = self.series[-1], 0.0
        for x, y, name in zip(last.x, last.y, last.names, strict=True):
            at, up = _pixels(axes, x.value, inside(y, axes.get_ylim())[1])
            half = text_width(name) / 2
            if at - half >= free:
                write(figure, at, 232 - up - 9, name, anchor="center")
                free = at + half + 3


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """A small chart of a series of a training log: equally long `steps` and `values`.

    At most 200 points are drawn, each the mean of a few steps; values that are not finite are
    left out. A series with a reference, such as the teacher's value and its name, is one of shares
    or cosines and is drawn from 0 to 1.
    """

    small = True
    title: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    reference: tuple[float, str] | None = None

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"curve {self.title!r}: {len(self.steps)} steps but {len(self.values)} values"
            )

    def _means(self) -> tuple[list[float], list[float]]:
        steps, values = np.asarray(self.steps, float), np.asarray(self.values, float)
        keep = np.isfinite(steps) & np.isfinite(values)
        steps, values = steps[keep], values[keep]
        if not len(values):
            return [], []
        groups = np.array_split(np.arange(len(values)), min(len(values), 200))
        return [float(steps[g].mean()) for g in groups], [float(values[g].mean()) for g in groups]

    @property
    def description(self) -> str:
        """Where it begins and ends."""
        _, values = self._means()
        words = f"over {len(self.values)} logged steps"
        return f"{words}: from {digits(values[0])} to {digits(values[-1])}" if values else words

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw it; None if nothing is finite."""
        steps, values = self._means()
        if not values:
            return None
        figure, axes = canvas(SMALL, 196, left=48, right=312, top=28, foot=170)
        log = min(values) > 0 and max(values) / min(values) > 30
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.1, high * 1.1
        elif 0 < low < 0.6 * high:
            low = 0.0  # a loss is read against zero where that does not flatten it
        if self.reference is not None:
            log, low, high = False, min(low, 0.0), max(high, 1.0)
        first = 0.0 if 0 <= min(steps) < 0.1 * max(steps) else min(steps)
        set_axis(axes, "y", low, _above(low, high), log=log, count=4, grid=True)
        set_axis(axes, "x", first, _above(first, max(steps)), count=4)
        end = f"{digits(values[-1])} at the end"
        title = fit(self.title, SMALL - 12 - text_width(end), bold=True)
        write(figure, 2, 14, title, colour="ink", bold=True)
        write(figure, SMALL - 2, 14, end, colour="blue", anchor="right")
        if self.reference is not None:
            level, name = self.reference
            axes.axhline(level, color=COLOURS["orange"], linewidth=1.25, linestyle=(0, (4, 2)))
            # At the foot, where a series that rises to the reference is not.
            write(figure, 310, 160, fit(f"- - {name}", 240), colour="orange", anchor="right")
        axes.plot(steps, values, color=COLOURS["blue"], linewidth=1.75, clip_on=False)
        axes.plot(steps[-1:], values[-1:], "o", color=COLOURS["blue"], markersize=6, clip_on=False)
        return figure


def _above(low: float, high: float) -> float:
    """`high`, or something above `low` where all values are alike."""
    return high if high > low else low + max(1e-6, abs(low) * 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BandChart:
    """A line of shares over shares with a band of intervals, and a bar to reach.

    Attributes:
        title: title for screen readers.
        x: shares, ascending or descending.
        y: shares with their intervals.
        x_name, y_name: names of the axes.
        below: a second line of names below the ticks, for a share.
        bar: a share to reach, and its name.
        marked: the place of a point with a name, if there is one.
    """

    small = False
    title: str
    x: tuple[float, ...]
    y: tuple[Interval, ...]
    x_name: str
    y_name: str
    below: Mapping[float, str]
    bar: tuple[float, str]
    marked: tuple[int, str] | None = None

    @property
    def description(self) -> str:
        """Every point in words."""
        told = (f"{percent(y.value)} at {percent(x)}" for x, y in zip(self.x, self.y, strict=True))
        return f"{self.y_name} over {self.x_name}: {', '.join(told)}"

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw it; None with fewer than two points."""
        if len(self.x) < 2:
            return None
        width, height = (NARROW, 338) if narrow else (WIDE, 378)
        foot = height - 64
        figure, axes = canvas(width, height, left=56, right=width - 18, top=34, foot=foot)
        seen = [end for y in self.y for end in (y.low, y.high)] + [self.bar[0]]
        room = 0.08 * max(0.01, max(seen) - min(seen))
        set_axis(axes, "y", min(seen) - room, max(seen) + room, count=5, grid=True, percent=True)
        set_axis(axes, "x", 0.0, 1.0, count=5 if narrow else 10, percent=True)
        high = max(self.y, key=lambda y: y.high).high
        for share, name in self.below.items():
            if not narrow or round(share * 10) % 2 == 0:
                at = _pixels(axes, share, high)[0]
                write(figure, at, foot + 35, name, anchor="center")
        write(figure, 2, 16, fit(self.y_name, width - 4))
        write(figure, width - 18, height - 5, fit(self.x_name, width - 20), anchor="right")
        axes.fill_between(self.x, [y.low for y in self.y], [y.high for y in self.y],
                          color=COLOURS["blue"], alpha=0.13, linewidth=0)  # fmt: skip
        axes.plot(self.x, [y.value for y in self.y], color=COLOURS["blue"], linewidth=1.75)
        value, name = self.bar
        axes.axhline(value, color=COLOURS["bar"], linewidth=1.5, dashes=(3.3, 2.7))
        down = height - _pixels(axes, 0.5, value)[1]
        write(figure, width - 18, down + 16, name, colour="orange", anchor="right")
        if self.marked is not None:
            at, name = self.marked
            x, y = self.x[at], self.y[at].value
            axes.plot(x, y, "o", color=COLOURS["blue"], markersize=10, clip_on=False)
            across, up = _pixels(axes, x, y)
            side: Anchor = "right" if x > 0.5 else "left"
            write(figure, across + (-10 if x > 0.5 else 10), height - up + 22, name,
                  colour="blue", bold=True, anchor=side)  # fmt: skip
        return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundChart:
    """A share and its interval on a line, with the bound that it is held against.

    Attributes:
        title: what it is.
        value: the share.
        bound: the bound, at least where `at_least` is set, else at most.
    """

    small = True
    title: str
    value: Interval
    bound: float
    at_least: bool

    @property
    def _bound_words(self) -> str:
        return f"bar {'≥' if self.at_least else '≤'} {percent(self.bound)}"

    @property
    def description(self) -> str:
        """The value, its interval and the bound."""
        words = f"{percent(self.value.value)}, interval {percent_interval(self.value)}"
        return f"{words}, {self._bound_words}"

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw it, 300 by 44 pixels."""
        value, bound = self.value, self.bound
        known = (value.low, value.high, value.value, bound)
        seen = [end for end in known if math.isfinite(end)]  # others go on beyond the picture
        room = max(0.01, 0.35 * (max(seen) - min(seen)))
        low, high = min(seen) - room, max(seen) + room
        figure, axes = canvas(300, 44, left=6, right=294, top=2, foot=26)
        axes.set_axis_off()
        axes.set_xlim(low, high)
        axes.set_ylim(-12, 12)
        axes.plot([low, high], [0, 0], color=COLOURS["muted"], linewidth=1)
        good = (bound, high) if self.at_least else (low, bound)
        axes.plot(good, [0, 0], color=COLOURS["green"], linewidth=3, solid_capstyle="butt")
        ends = [max(low, value.low), min(high, value.high)]
        axes.plot(ends, [0, 0], color=COLOURS["blue"], linewidth=8, alpha=0.4,
                  solid_capstyle="round")  # fmt: skip
        axes.plot([bound, bound], [-10, 10], color=COLOURS["bar"], linewidth=1.5, dashes=(3.3, 2.7))
        axes.plot(value.value, 0, "o", color=COLOURS["blue"], markersize=10, markeredgewidth=0)
        at = _pixels(axes, bound, 0)[0]
        write(figure, min(max(at, 50), 250), 40, self._bound_words, anchor="center")
        return figure


def gate_name(bound: float) -> str:
    """What a gate's line is called."""
    return f"gate {tick_name(bound)}"
