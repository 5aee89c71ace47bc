"""Costs on a device where only a few probes were measured, from another that has them all.

For each kind of work and precision the cost there is a power of the cost here: a straight line
through the logarithms of the pieces that were measured on both. Its slope is pulled towards 1
(both devices slow down alike), the more so the fewer there are, and a line of few pieces towards
that of all pieces. How good that is, the few tell: each is predicted from the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.predicting.measured_device import Carried, MeasuredDevice, PieceCost
from edgeclip.runtime.predicting.tower_pieces import Kind, Piece
from edgeclip.runtime.spec import Precision

FEWEST_SHARED = 3
_SLOPE_PULL = 1.0  # squared logarithms of cost, as if so much of slope 1 had been seen
_LEVEL_PULL = 0.5  # pieces, as if so many had been seen on the line of all pieces
_LEAST_MS = 1e-4
_LIKE: dict[Kind, str] = {
    "image-stem": "stem",
    "conv-stem": "stem",
    "image-block": "block",
    "text-block": "block",
    "image-last": "last",
    "text-last": "last",
    "conv-block": "conv",
    "conv-down": "conv",
    "conv-head": "last",
}

Key = tuple[Piece, Precision]
Pair = tuple[str, float, float]  # what it is like; logarithms of both costs


@dataclass(frozen=True, slots=True)
class _Line:
    """log cost there = level + slope x (log cost here - centre)."""

    centre: float
    level: float
    slope: float

    def __call__(self, here: float) -> float:
        return self.level + self.slope * (here - self.centre)


def carry_over(source: MeasuredDevice, few: MeasuredDevice) -> MeasuredDevice:
    """The device of `few` with a cost for every piece of `source`.

    What `few` measured stays as it is. A precision of which it measured nothing is not carried
    over: it may compute it another way, or not at all.

    Raises:
        InputError: the two share fewer than `FEWEST_SHARED` pieces.
    """
    there = {(cost.piece, cost.precision): cost for cost in few.costs}
    here = {(cost.piece, cost.precision): cost for cost in source.costs}
    shared = [key for key in there if key in here]
    pairs = [_pair(here[key], there[key]) for key in shared]
    if len(pairs) < FEWEST_SHARED:
        raise InputError(
            f"{few.name!r} shares {len(pairs)} pieces with {source.name!r}, at least "
            f"{FEWEST_SHARED} are needed: measure the same probes on both"
        )
    lines = _lines(pairs)
    errors = [abs(math.expm1(_left_out(pairs, at))) for at in range(len(pairs))]
    carried = [
        _moved(cost, lines)
        for key, cost in here.items()
        if key not in there and cost.precision in few.precisions
    ]
    return replace(
        few,
        costs=(*few.costs, *carried),
        carried=Carried(
            source=source.name,
            probes=len(pairs),
            error=float(np.median(errors)),
            worst=max(errors),
        ),
    )


def _pair(here: PieceCost, there: PieceCost) -> Pair:
    return _like(here), _log(here), _log(there)


def _like(cost: PieceCost) -> str:
    return f"{_LIKE[cost.piece.kind]} {cost.precision}"


def _log(cost: PieceCost) -> float:
    return math.log(max(cost.ms.value, _LEAST_MS))


def _lines(pairs: Sequence[Pair]) -> dict[str, _Line]:
    """A line for each likeness, and one of all under the empty name."""
    everything = _line([(x, y) for _, x, y in pairs], None)
    names = {name for name, _, _ in pairs}
    return {"": everything} | {
        name: _line([(x, y) for other, x, y in pairs if other == name], everything)
        for name in names
    }


def _line(points: Sequence[tuple[float, float]], general: _Line | None) -> _Line:
    x, y = np.array(points).T
    centre = float(x.mean())
    slope_wanted = 1.0 if general is None else general.slope
    spread, common = float(((x - centre) ** 2).sum()), float(((x - centre) * (y - y.mean())).sum())
    slope = (common + _SLOPE_PULL * slope_wanted) / (spread + _SLOPE_PULL)
    level = float(y.mean())
    if general is not None:
        level = (level * len(x) + _LEVEL_PULL * general(centre)) / (len(x) + _LEVEL_PULL)
    return _Line(centre, level, max(0.0, slope))


def _left_out(pairs: Sequence[Pair], at: int) -> float:
    """Logarithmic error of one pair from the lines of the others."""
    name, here, there = pairs[at]
    lines = _lines([pair for other, pair in enumerate(pairs) if other != at])
    return lines.get(name, lines[""])(here) - there


def _moved(cost: PieceCost, lines: dict[str, _Line]) -> PieceCost:
    ms = math.exp(lines.get(_like(cost), lines[""])(_log(cost)))
    return replace(cost, ms=Interval(ms, ms, ms), samples_ms=(), few=False)
