"""Which of the points of a search to ship: the fastest that is surely faster than fp32."""

from collections.abc import Sequence

from edgeclip.export.quantizing.config import Float32
from edgeclip.export.quantizing.point import Point

# Two engines with the same graph can differ by this much, by where their memory lies.
_SAME = 1.01


def ranked(points: Sequence[Point], fp32: Point) -> tuple[list[Point], str]:
    """Points that may be shipped, the best first, and why it is the best.

    Those whose times cannot be told apart follow each other by their mean cosine. Where no
    time was measured, what is inside its gates is ranked by its bytes, because the device
    itself will choose between it and other precisions.
    """
    inside = [point for point in points if point.passed and not isinstance(point.config, Float32)]
    if not inside:
        return [], "nothing else is inside its gates"
    if fp32.latency is None:
        smallest = sorted(inside, key=lambda point: point.bytes)
        return smallest, "smallest inside its gates; no time was measured, this is not the device"
    faster = [point for point in inside if (point.sure_ratio or 1.0) < 1]
    if not faster:
        return [], "nothing inside its gates is surely faster than fp32"
    return _by_time(faster), "fastest inside its gates"


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that no other beats in both time and mean cosine, the fastest first.

    Bytes stand in for time where none was measured. What gives no usable embedding is left
    out.
    """
    usable = [point for point in points if point.cosine is not None]
    front: list[Point] = []
    for point in sorted(usable, key=lambda item: (_cost(item), -_cosine(item))):
        if not front or _cosine(point) > _cosine(front[-1]):
            front.append(point)
    return tuple(front)


def _by_time(points: Sequence[Point]) -> list[Point]:
    left = sorted(points, key=_cost)
    ordered: list[Point] = []
    while left:
        alike = [point for point in left if _cost(point) <= _SAME * _cost(left[0])]
        best = max(alike, key=_cosine)
        ordered.append(best)
        left.remove(best)
    return ordered


def _cost(point: Point) -> float:
    return float(point.bytes) if point.ratio is None else point.ratio


def _cosine(point: Point) -> float:
    return -1.0 if point.cosine is None else point.cosine.value
