"""Transfer block costs from one measured device to another where only a few were measured.

In logarithms the costs of two devices lie near a line for each family and precision. Families of
which few blocks were measured on both lean on the line of all blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeclip.profiles.predict.measured_device import BlockCost, MeasuredDevice, TransferAccuracy
from edgeclip.profiles.predict.predict_latency import FAMILIES
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval

FEWEST_SHARED = 3
_SLOPE_PULL = 1.0  # squared logarithms of cost, as if so much of the general slope had been seen
_LEVEL_PULL = 0.5  # blocks, as if so many had been seen on the line of all blocks
_LEAST_MS = 1e-4


@dataclass(frozen=True, slots=True)
class _Pair:
    """Logarithms of what one block costs on both devices."""

    group: str
    source: float
    target: float


@dataclass(frozen=True, slots=True)
class _Line:
    """log target = level + slope x (log source - centre)."""

    centre: float
    level: float
    slope: float

    def __call__(self, source: float) -> float:
        return self.level + self.slope * (source - self.centre)


def transfer_costs(source: MeasuredDevice, few: MeasuredDevice) -> MeasuredDevice:
    """Return the device of `few` with a cost for every block of `source`.

    What `few` measured stays as it is. A precision of which it measured nothing is left out: the
    device may compute it another way, or not at all.

    Raises:
        InputError: the two share fewer than `FEWEST_SHARED` blocks.
    """
    targets = {(cost.piece, cost.precision): cost for cost in few.costs}
    sources = {(cost.piece, cost.precision): cost for cost in source.costs}
    pairs = [
        _Pair(_group(cost), _log_ms(sources[key]), _log_ms(cost))
        for key, cost in targets.items()
        if key in sources
    ]
    if len(pairs) < FEWEST_SHARED:
        raise InputError(
            f"{few.name!r} shares {len(pairs)} blocks with {source.name!r}, at least "
            f"{FEWEST_SHARED} are needed: measure the same probes on both"
        )
    errors = []
    for at, pair in enumerate(pairs):
        line = _line_of(pair.group, [*pairs[:at], *pairs[at + 1 :]])
        errors.append(abs(math.expm1(line(pair.source) - pair.target)))
    transferred = []
    for key, cost in sources.items():
        if key not in targets and cost.precision in few.precisions:
            ms = math.exp(_line_of(_group(cost), pairs)(_log_ms(cost)))
            moved = replace(cost, ms=Interval(ms, ms, ms), samples_ms=(), few=False)
            transferred.append(moved)
    return replace(
        few,
        costs=(*few.costs, *transferred),
        carried=TransferAccuracy(
            source=source.name,
            probes=len(pairs),
            error=float(np.median(errors)),
            error_p90=float(np.quantile(errors, 0.9)),
            worst=max(errors),
        ),
    )


def _group(cost: BlockCost) -> str:
    return f"{FAMILIES[cost.piece.kind]} {cost.precision}"


def _log_ms(cost: BlockCost) -> float:
    return math.log(max(cost.ms.value, _LEAST_MS))


def _line_of(group: str, pairs: Sequence[_Pair]) -> _Line:
    """Fit the line of a group, which leans on that of all pairs; that alone without pairs."""
    general = _fit(pairs, None)
    own = [pair for pair in pairs if pair.group == group]
    return _fit(own, general) if own else general


def _fit(pairs: Sequence[_Pair], general: _Line | None) -> _Line:
    x, y = np.array([(pair.source, pair.target) for pair in pairs]).T
    centre, level = float(x.mean()), float(y.mean())
    spread, common = float(((x - centre) ** 2).sum()), float(((x - centre) * (y - level)).sum())
    pull = 1.0 if general is None else general.slope
    slope = (common + _SLOPE_PULL * pull) / (spread + _SLOPE_PULL)
    if general is not None:
        level = (level * len(x) + _LEVEL_PULL * general(centre)) / (len(x) + _LEVEL_PULL)
    return _Line(centre, level, max(0.0, slope))
