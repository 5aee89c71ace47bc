"""What charts of a figure against its cost share: whiskers, the thin line of the best, labels."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.profiles.report.chart_parts import BOLD, FONT, held
from edgeclip.profiles.report.report_charts import Axis, line, path, text, text_width
from edgeclip.profiles.report.report_labels import Anchor, Box, place_labels
from edgeclip.runtime.quality.intervals import Interval

_LINE = 16.0  # pixels from one line of a label to the next
_LEADER = 14.0  # pixels from the mark from which a label needs a line to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A point of the picture, in pixels.

    Attributes:
        x, y: its centre.
        left, right, top, foot: where its intervals end.
        radius: of its mark, which labels keep clear of.
        css: the classes of its mark and label.
        lines: its label, the first line in bold.
    """

    x: float
    y: float
    left: float
    right: float
    top: float
    foot: float
    radius: float
    css: str
    lines: tuple[str, ...]

    @property
    def whiskers(self) -> str:
        """Its intervals as lines."""
        across = line(self.left, self.y, self.right, self.y, "whisker")
        return across + line(self.x, self.foot, self.x, self.top, "whisker")

    @property
    def boxes(self) -> tuple[Box, Box]:
        """What its whiskers cover."""
        return (
            Box(self.left, self.y - 1, self.right - self.left, 2),
            Box(self.x - 1, self.top, 2, self.foot - self.top),
        )


def spot_at(
    x: Axis,
    y: Axis,
    across: Interval,
    up: Interval,
    *,
    radius: float,
    css: str,
    lines: tuple[str, ...],
) -> Spot:
    """The point of two values; what lies beyond an axis is held at its end."""
    return Spot(
        x=held(x, across.value),
        y=held(y, up.value),
        left=held(x, across.low),
        right=held(x, across.high),
        top=held(y, up.high),
        foot=held(y, up.low),
        radius=radius,
        css=css,
        lines=lines,
    )


def thin_line(front: Sequence[Spot]) -> str:
    """The line through the points that no other beats, fastest first; empty for less than two."""
    return path([(spot.x, spot.y) for spot in front], "front") if len(front) > 1 else ""


def spot_labels(
    spots: Sequence[Spot], front: Sequence[Spot], bar: Sequence[Box], x: Axis, y: Axis
) -> list[str]:
    """The labels that have room, clear of each other, of marks and lines, and of `bar`."""
    anchors = [
        Anchor(
            x=spot.x,
            y=spot.y,
            radius=spot.radius,
            width=max(
                BOLD * text_width(spot.lines[0], FONT),
                *(text_width(words, FONT) for words in spot.lines),
            ),
            height=_LINE * len(spot.lines),
        )
        for spot in spots
    ]
    obstacles = [*bar, *(box for spot in spots for box in spot.boxes), *_along(front)]
    area = Box(x.start + 2, y.end - 8, x.end - x.start - 2, y.start - y.end + 6)
    boxes = place_labels(anchors, obstacles, area)
    return [_label(spot, box) for spot, box in zip(spots, boxes, strict=True) if box is not None]


def _along(front: Sequence[Spot]) -> list[Box]:
    """Small boxes along the thin line."""
    boxes = []
    for one, two in itertools.pairwise(front):
        steps = max(1, int(math.dist((one.x, one.y), (two.x, two.y)) // 6))
        for share in (step / steps for step in range(steps + 1)):
            place = one.x + share * (two.x - one.x), one.y + share * (two.y - one.y)
            boxes.append(Box(*place, 1, 1))
    return boxes


def _label(spot: Spot, box: Box) -> str:
    near = box.nearest(spot.x, spot.y)
    away = math.dist(near, (spot.x, spot.y))
    leader = ""
    if away > spot.radius + _LEADER:
        share = spot.radius / away
        edge = spot.x + share * (near[0] - spot.x), spot.y + share * (near[1] - spot.y)
        leader = line(*edge, *near, "leader")
    # Centred where the box sits above or below, else towards the mark.
    if box.x + box.width < spot.x:
        at, side = box.x + box.width, "end"
    elif box.x > spot.x:
        at, side = box.x, "start"
    else:
        at, side = box.x + box.width / 2, "middle"
    words = (
        text(at, box.y + 12 + _LINE * row, content, css="" if row else "name", anchor=side)
        for row, content in enumerate(spot.lines)
    )
    return f'<g class="{spot.css}">{leader}{"".join(words)}</g>'
