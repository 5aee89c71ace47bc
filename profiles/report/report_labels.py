"""Where to put the labels of a scatter chart so that they never cover each other."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DISTANCES = (5.0, 11.0, 20.0, 34.0, 52.0, 76.0, 106.0)
_DIRECTIONS = 16
_MARGIN = 2.0  # free space around a label


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: its left top corner, width and height; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: "Box", margin: float = 0.0) -> float:
        """The area that both share once this box is grown by `margin` on each side."""
        wide = min(self.x + self.width + margin, other.x + other.width)
        wide -= max(self.x - margin, other.x)
        high = min(self.y + self.height + margin, other.y + other.height)
        high -= max(self.y - margin, other.y)
        return max(0.0, wide) * max(0.0, high)

    def contains(self, other: "Box") -> bool:
        """Whether `other` lies inside this box."""
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of this box that is closest to (x, y)."""
        return (
            min(max(x, self.x), self.x + self.width),
            min(max(y, self.y), self.y + self.height),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A circle that wants a label of `width` x `height`."""

    x: float
    y: float
    radius: float
    width: float
    height: float

    @property
    def box(self) -> Box:
        """The square around the circle."""
        side = 2 * self.radius
        return Box(self.x - self.radius, self.y - self.radius, side, side)


def place_labels(
    anchors: Sequence[Anchor], obstacles: Sequence[Box], area: Box
) -> tuple[Box | None, ...]:
    """Choose a box for each anchor's label; None where the area has no room left.

    Boxes lie inside `area` and never overlap each other. Among what is left, a label
    prefers to be close, to the right, and clear of `obstacles` and of all circles.
    """
    avoid = [*obstacles, *(anchor.box for anchor in anchors)]
    placed: dict[int, Box] = {}
    # Large circles leave their labels the least choice.
    for at in sorted(range(len(anchors)), key=lambda i: -anchors[i].radius):
        free = [
            (cost + _clutter(box, avoid), number, box)
            for number, (cost, box) in enumerate(_candidates(anchors[at], area))
            if area.contains(box) and not any(box.overlap(b, _MARGIN) for b in placed.values())
        ]
        if free:
            placed[at] = min(free)[2]
    return tuple(placed.get(at) for at in range(len(anchors)))


def _clutter(box: Box, avoid: Sequence[Box]) -> float:
    """What covering other marks costs, in the same unit as distance (pixels)."""
    covered = sum(box.overlap(other, 1.0) for other in avoid)
    return 40.0 * bool(covered) + covered / 4


def _candidates(anchor: Anchor, area: Box) -> Iterator[tuple[float, Box]]:
    """Boxes around the anchor, then a grid over the whole area, each with its distance."""
    for distance in _DISTANCES:
        for step in range(_DIRECTIONS):
            angle = 2 * math.pi * step / _DIRECTIONS
            yield distance + 2 * (1 - math.cos(angle)), _beside(anchor, angle, distance)
    for row in range(int(area.height // anchor.height)):
        for column in range(8):
            x = area.x + column * max(0.0, area.width - anchor.width) / 7
            box = Box(x, area.y + row * anchor.height, anchor.width, anchor.height)
            near = box.nearest(anchor.x, anchor.y)
            yield 40 + math.dist(near, (anchor.x, anchor.y)), box


def _beside(anchor: Anchor, angle: float, distance: float) -> Box:
    """The label's box in direction `angle`, `distance` away from the circle's edge."""
    reach = anchor.radius + distance
    x = anchor.x + reach * math.cos(angle)
    y = anchor.y + reach * math.sin(angle)
    left = x - anchor.width * (1 - math.cos(angle)) / 2
    top = y - anchor.height * (1 - math.sin(angle)) / 2
    return Box(left, top, anchor.width, anchor.height)
