"""Draw charts as SVG by matplotlib: colours, text, axes, and where labels have room.

A chart draws itself in the colours of the light theme; `svg` turns them into the variables of
the page's style sheet, so that one drawing serves light, dark and paper. Text stays text. All
sizes are pixels. matplotlib is imported when the first chart is drawn, not before.
"""

import io
import itertools
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from html import escape
from typing import TYPE_CHECKING, Literal, Protocol

from edgeclip.runtime.errors import MissingExtraError
from edgeclip.runtime.stats.interval import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

Colour = Literal[
    "paper", "ink", "muted", "rule", "bar", "blue", "orange", "green", "purple", "olive", "grey"
]
Box = tuple[float, float, float, float]  # left, foot, right, top; pixels upwards
Anchor = Literal["left", "center", "right"]

# The light theme of report.css; its dark theme gives the same names other values.
COLOURS: dict[Colour, str] = {
    "paper": "#ffffff",
    "ink": "#1a1d21",
    "muted": "#59616d",
    "rule": "#d8dce2",
    "bar": "#d55e00",
    "blue": "#0072b2",
    "orange": "#b34a00",
    "green": "#00735a",
    "purple": "#a0287a",
    "olive": "#6b5b00",
    "grey": "#4b535f",
}
SERIES: tuple[Colour, ...] = ("blue", "orange", "green", "purple", "olive", "grey")
# Shapes tell series apart where colours do not: in print, and for the colour-blind.
SHAPES = ("o", "D", "s", "^", "P")
FONT = 13.0
WIDE, NARROW, SMALL = 760, 358, 340
_INSIDE = "inside"  # a name for text on a coloured area, which needs no halo
_REACH = 4.0  # times the values: how far their intervals are shown
_LOG_ABOVE = 10.0  # largest over smallest value from which a linear axis hides the start


class Chart(Protocol):
    """What a figure shows, as plain data that can draw itself.

    Attributes:
        title: one line for a screen reader.
        description: all its values in words.
        small: drawn once at 340 pixels, for a grid; others once for a desk and once for a phone.
    """

    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def small(self) -> bool: ...
    def draw(self, *, narrow: bool) -> "Figure | None":
        """The picture, or None where there is nothing that can be drawn."""
        ...


def svg(chart: Chart, *, narrow: bool = False, alone: bool = False) -> str:
    """The chart as an SVG element, or "" where there is nothing to draw.

    Args:
        chart: what to draw.
        narrow: 358 instead of 760 pixels wide.
        alone: whether it is a file of its own: title, fixed size, light colours, a white ground.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError(
            "a chart needs matplotlib: pip install 'edgeclip[report]'"
        ) from error
    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts have more
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "edgeclip",
                "text.parse_math": False,
                "font.size": FONT,
            }
        )
        figure = chart.draw(narrow=narrow)
        if figure is None:
            return ""
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(72 * side) for side in figure.get_size_inches())
    css = "small" if chart.small else "narrow" if narrow else "wide"
    return _element(buffer.getvalue(), chart, width, height, css, alone)


def _element(raw: str, chart: Chart, width: int, height: int, css: str, alone: bool) -> str:
    """matplotlib's document as one element of the page's own style."""
    body = raw[raw.index(">", raw.index("<svg")) + 1 : raw.rindex("</svg>")]
    body = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(rf'<g id="{_INSIDE}">', f'<g class="{_INSIDE}">', body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    # The page's font, whose name is not repeated with every word.
    body = re.sub(
        r"font: (?:(\d+) )?([\d.]+px) [^;\"]*",
        lambda m: f"font-size: {m[2]}" + (f"; font-weight: {m[1]}" if m[1] else ""),
        body,
    )
    body = re.sub(
        r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), body
    )
    body = re.sub(r"\n\s*", "\n", body)
    title = escape(_plain(chart.title))
    words = f"<title>{title}</title><desc>{escape(_plain(chart.description))}</desc>"
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{title}"'
    if alone:  # with its title above it
        box = box.replace(f'{width} {height}"', f'{width} {height + 32}"', 1)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height + 32}" {box} font-family="system-ui, sans-serif">'
            f'{words}<rect width="100%" height="100%" fill="#ffffff"/>'
            f'<text x="8" y="21" font-size="16px" font-weight="700">{title}</text>'
            f'<g transform="translate(0 32)">{body}</g></svg>\n'
        )
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = body.replace("xlink:href", "href")
    return f'<svg class="chart {css}" {box}>{words}{body}</svg>'


def _plain(content: str) -> str:
    """Text without line ends and without what XML cannot hold."""
    return "".join(
        c if c.isprintable() else "�" if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in " ".join(content.split())
    )


# Text -----------------------------------------------------------------------------------------


@cache
def _renderer() -> "RendererAgg":
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(8, 8, 72)


@cache
def _font(bold: bool) -> "FontProperties":
    from matplotlib.font_manager import FontProperties

    return FontProperties(family="DejaVu Sans", size=FONT, weight="bold" if bold else "normal")


@lru_cache(4096)
def text_width(content: str, *, bold: bool = False) -> float:
    """Pixels that a text takes in DejaVu Sans, which is wider than most fonts of readers."""
    plain = _plain(content)
    width, _, _ = _renderer().get_text_width_height_descent(plain, _font(bold), False)
    missing = sum(unicodedata.east_asian_width(c) in "WF" for c in plain)
    return float(width) + 0.45 * FONT * missing


def fit(content: str, width: float, *, bold: bool = False) -> str:
    """`content`, cut with an ellipsis in its middle where it is wider than `width` pixels."""
    content = _plain(content)[:1000]
    if text_width(content, bold=bold) <= width:
        return content

    def cut(keep: int) -> str:
        head = keep // 3  # ends differ more than beginnings do
        return f"{content[:head]}…{content[len(content) - keep + head :]}"

    fits, least = 0, len(content)  # bisect: the longest that fits
    while least - fits > 1:
        middle = (fits + least) // 2
        if text_width(cut(middle), bold=bold) <= width:
            fits = middle
        else:
            least = middle
    return cut(fits)


def write(
    figure: "Figure",
    x: float,
    y: float,
    content: str,
    *,
    colour: Colour = "muted",
    bold: bool = False,
    anchor: Anchor = "left",
    inside: bool = False,
    turn: float = 0.0,
) -> None:
    """Write a text with its baseline at (x, y), in pixels from the left top of the picture."""
    width, height = 72 * figure.get_size_inches()
    figure.text(
        x / width,
        1 - y / height,
        _plain(content),
        color=COLOURS[colour],
        fontsize=FONT,
        fontweight=700 if bold else 400,
        ha=anchor,
        va="baseline",
        rotation=turn,
        rotation_mode="anchor",
        gid=_INSIDE if inside else None,
    )


# Axes -----------------------------------------------------------------------------------------


def canvas(
    width: int, height: float, *, left: float, right: float, top: float, foot: float
) -> "tuple[Figure, Axes]":
    """A picture and axes from `left` to `right` and from `top` to `foot`, counted downwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = round(height)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (left / width, 1 - foot / height, (right - left) / width, (foot - top) / height)
    )
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["muted"])
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.tick_params(color=COLOURS["muted"], labelcolor=COLOURS["muted"], labelsize=FONT, pad=5)
    axes.tick_params(axis="y", length=0, pad=7)
    return figure, axes


def set_axis(
    axes: "Axes",
    which: Literal["x", "y"],
    low: float,
    high: float,
    *,
    log: bool = False,
    count: int = 6,
    grid: bool = False,
    percent: bool = False,
) -> None:
    """Scale an axis from `low` to `high` with about `count` ticks whose names have room."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log" if log else "linear")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axes.minorticks_off()
    scale = 100.0 if percent else 1.0
    places = ticks(scale * low, scale * high, count, log=log)
    names = tick_names(places, log=log)
    if which == "x":
        # Names that would touch the one before, or leave the picture, are left out.
        figure = axes.get_figure(root=True)
        assert figure is not None
        width = 72 * float(figure.get_size_inches()[0])
        free = 0.0
        for at, place in enumerate(places):
            x = float(axes.transData.transform((place / scale, axes.get_ylim()[0]))[0])
            half = text_width(names[at]) / 2
            if x - half >= free and x + half <= width:
                free = x + half + 4
            else:
                names[at] = ""
    kept = [
        (p / scale, n + ("%" if percent and n else "")) for p, n in zip(places, names, strict=True)
    ]
    axis.set_ticks([p for p, n in kept if n], labels=[n for _, n in kept if n])
    if grid:
        axis.grid(True, color=COLOURS["rule"], linewidth=1)


def ticks(low: float, high: float, count: int, *, log: bool) -> list[float]:
    """About `count` round values in [low, high], at least two."""
    from matplotlib.ticker import MaxNLocator

    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found: list[float] = []
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(range(1, 10))):
            values = [round(f * 10.0**d, 12) for d in decades for f in factors]
            inside = [value for value in values if low <= value <= high]
            if found and len(inside) > count:
                break
            found = inside
        if len(found) >= 2:
            return found
    locator = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2)
    room = 1e-9 * (high - low)
    return [float(v) for v in locator.tick_values(low, high) if low - room <= v <= high + room]


def tick_names(places: Sequence[float], *, log: bool = False) -> list[str]:
    """Short names that differ; with equally many decimals where steps are equal: 0.9990, 1.0000."""
    steps = {round(b - a, 12) for a, b in itertools.pairwise(places)}
    if not log and len(steps) == 1 and 0.01 <= max(map(abs, places)) < 1e6:
        step = steps.pop()
        decimals = next((d for d in range(9) if abs(round(step, d) - step) < step * 1e-6), 9)
        return [f"{place:,.{decimals}f}" for place in places]
    for decimals in range(1, 9):
        names = [tick_name(place, decimals) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def tick_name(value: float, decimals: int = 1) -> str:
    """A short name for a value: 2,000, 0.5, 7.5e-4."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,g}"
    mantissa, _, power = f"{value:.{decimals}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def bounds(values: Iterable[Interval]) -> tuple[float, float]:
    """The least and the largest number of some intervals, as far as a picture has to show them.

    Two processes can give intervals that span decades; beyond some times the values themselves
    nothing more is seen of them. An end that is not known takes no room.
    """
    intervals = list(values)
    middle = [interval.value for interval in intervals]
    ends = [end for each in intervals if is_known(each) for end in (each.low, each.high)]
    known = [end for end in ends if math.isfinite(end)]
    low, high = min(known, default=math.inf), max(known, default=-math.inf)
    if min(middle) > 0:
        low, high = max(low, min(middle) / _REACH), min(high, _REACH * max(middle))
    return min(low, *middle), max(high, *middle)


def is_known(value: Interval) -> bool:
    """Whether an interval has an end that says anything; of times, 0 says nothing."""
    return math.isfinite(value.high) or value.low not in (0.0, -math.inf)


def inside(value: Interval, limits: tuple[float, float]) -> tuple[float, float]:
    """The part of an interval that a picture with these limits shows; of none, its value."""
    ends = (value.low, value.high) if is_known(value) else (value.value, value.value)
    low, high = sorted(limits)
    return min(max(ends[0], low), high), min(max(ends[1], low), high)


def with_room(low: float, high: float, *, log: bool | None) -> tuple[float, float, bool]:
    """Limits with some room, and whether they are logarithmic; `log=None` lets the data decide."""
    if log is None:
        log = low > 0 and high / low > _LOG_ABOVE
    if log:
        low = max(low, 1e-12)
        room = max((high / low) ** 0.06, 1.06)
        return low / room, high * room, True
    room = max((high - low) * 0.06, 1e-9, abs(high) * 0.01)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room, False


def finite(value: float) -> bool:
    """Whether a number can be drawn on a logarithmic axis."""
    return math.isfinite(value) and value > 0


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until `gap` lies between each two, inside [low, high] where they fit."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = list(places)
    for before, at in zip([None, *order], order, strict=False):
        moved[at] = max(moved[at], low if before is None else moved[before] + gap)
    for after, at in zip([None, *reversed(order)], reversed(order), strict=False):
        moved[at] = min(moved[at], high if after is None else moved[after] - gap)
    return moved


# Labels ---------------------------------------------------------------------------------------


def place_labels(
    marks: Sequence[tuple[float, float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    area: Box,
) -> list[Box | None]:
    """Choose a box for the label of each mark; None where the area has no room left.

    Boxes lie inside `area` and never overlap each other. Among what is left, a label prefers
    to be close, to the right, and clear of `obstacles` and of all marks.

    Args:
        marks: centre and radius of each.
        sizes: width and height of each label.
        obstacles: what should not be covered.
        area: where labels may be.
    """
    avoid = [*obstacles, *((x - r, y - r, x + r, y + r) for x, y, r in marks)]
    placed: dict[int, Box] = {}
    # Large marks leave their labels the least choice.
    for at in sorted(range(len(marks)), key=lambda i: -marks[i][2]):
        best: tuple[float, Box] | None = None
        for cost, box in _candidates(marks[at], sizes[at], area):
            if best is not None and cost >= best[0]:
                continue
            if not (
                area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]
            ):
                continue
            if any(_overlap(box, other, 2.0) for other in placed.values()):
                continue
            covered = sum(_overlap(box, other, 1.0) for other in avoid)
            cost += 60.0 * bool(covered) + covered / 4
            if best is None or cost < best[0]:
                best = cost, box
        if best is not None:
            placed[at] = best[1]
    return [placed.get(at) for at in range(len(marks))]


def _candidates(
    mark: tuple[float, float, float], size: tuple[float, float], area: Box
) -> Iterable[tuple[float, Box]]:
    """Boxes around the mark, then a grid over the area, each with its distance as its cost."""
    (x, y, radius), (width, height) = mark, size
    for distance in (5.0, 11.0, 20.0, 34.0, 52.0, 76.0, 106.0):
        for step in range(16):
            cos, sin = math.cos(math.pi * step / 8), math.sin(math.pi * step / 8)
            left = x + (radius + distance) * cos - width * (1 - cos) / 2
            foot = y + (radius + distance) * sin - height * (1 - sin) / 2
            yield distance + 2 * (1 - cos), (left, foot, left + width, foot + height)
    for row in range(int((area[3] - area[1]) // height)):
        for column in range(8):
            left = area[0] + column * max(0.0, area[2] - area[0] - width) / 7
            foot = area[1] + row * height
            box = (left, foot, left + width, foot + height)
            yield 40 + math.dist(nearest(box, x, y), (x, y)), box


def nearest(box: Box, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is closest to (x, y)."""
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _overlap(one: Box, other: Box, margin: float) -> float:
    """The area that two boxes share once the first is grown by `margin` on each side."""
    wide = min(one[2] + margin, other[2]) - max(one[0] - margin, other[0])
    high = min(one[3] + margin, other[3]) - max(one[1] - margin, other[1])
    return max(0.0, wide) * max(0.0, high)
