"""Latency of a tower that was never run, from the costs of its pieces on a measured device.

It is the sum over the tower's pieces, for the graph as it is exported, before any rewrite that
`edgeclip export` keeps because it is faster still. The interval adds up two kinds of errors: those
with which the pieces of a kind tell each other, each left out once (their median, since what is
left out of a grid is farther from the rest than what lies inside), and those of whole towers that
were measured along with the probes (nine in ten are smaller). tests/benchmarks/prediction.py
counts how often it holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.predicting.block_costs import BlockCosts
from edgeclip.runtime.predicting.measured_device import MeasuredDevice
from edgeclip.runtime.predicting.tower_pieces import AnyTower, Part, Piece
from edgeclip.runtime.spec import Precision

LEVEL = 0.9  # of the errors of whole towers that the interval allows for
_UNTOLD = 0.5  # error of a kind of which too few pieces were measured to tell each other
_UNCHECKED = 0.10  # error of a sum where no whole tower was measured
_LEAST = 0.03  # of the interval's half, as a logarithm: two runs of one tower differ by as much
_OUTSIDE = 0.2  # a size twice the largest measured one adds 14% to the error


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTime:
    """What some pieces of one kind take together."""

    kind: str
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The time of one run at batch 1, in milliseconds.

    Attributes:
        ms: predicted median.
        low, high: about nine in ten towers are inside.
        method: how it was found, and what to beware of, for a person.
        parts: what the pieces take, by kind, the largest first.
    """

    ms: float
    low: float
    high: float
    method: str
    parts: tuple[PartTime, ...]


class Predictor:
    """Predicts towers on one measured device.

    Args:
        measured: the device.
    """

    def __init__(self, measured: MeasuredDevice) -> None:
        self._costs = BlockCosts(measured)
        self._measured = measured
        self._of_towers = self._sum_error()

    def predict(self, tower: AnyTower, precision: Precision) -> Prediction:
        """Predict a tower.

        Raises:
            InputError: a precision that was not measured, or sizes too far from those that were.
        """
        return self.predict_parts(tower.parts(), precision)

    def predict_parts(self, parts: Sequence[Part], precision: Precision) -> Prediction:
        """Predict the sum of some pieces; see `predict`."""
        times = [part.count * self._costs.ms(part.piece, precision) for part in parts]
        ms = sum(times)
        of_pieces = sum(
            time / ms * self._piece_error(part, precision)
            for part, time in zip(parts, times, strict=True)
        )
        factors = [self._costs.outside(part.piece, precision) for part in parts]
        error = max(_LEAST, math.hypot(of_pieces, self._of_towers))
        error += _OUTSIDE * math.log(max(factors))
        by_kind: dict[str, float] = {}
        for part, time in zip(parts, times, strict=True):
            by_kind[part.piece.kind] = by_kind.get(part.piece.kind, 0.0) + time
        ordered = sorted(by_kind.items(), key=lambda item: -item[1])
        return Prediction(
            ms=ms,
            low=ms * math.exp(-error),
            high=ms * math.exp(error),
            method=self._method(max(factors)),
            parts=tuple(PartTime(kind=kind, ms=time) for kind, time in ordered),
        )

    def piece_ms(self, piece: Piece, precision: Precision) -> float:
        """Milliseconds that one piece adds to a tower; see `predict`."""
        return self._costs.ms(piece, precision)

    def _piece_error(self, part: Part, precision: Precision) -> float:
        errors = np.abs(self._costs.errors(part.piece, precision))
        return float(np.median(errors)) if len(errors) else _UNTOLD

    def _sum_error(self) -> float:
        """Error of whole towers, and of what was carried over."""
        errors = [
            abs(math.log(found / ms))
            for precision in self._measured.precisions
            for found, ms in self.checks(precision)
        ]
        of_towers = float(np.quantile(errors, LEVEL)) if errors else _UNCHECKED
        carried = self._measured.carried
        return of_towers if carried is None else math.hypot(of_towers, carried.error)

    def checks(self, precision: Precision) -> list[tuple[float, float]]:
        """Predicted and measured milliseconds of the whole towers."""
        found = []
        for check in self._measured.checks:
            if check.precision != precision:
                continue
            try:
                costs = [part.count * self._costs.ms(part.piece, precision) for part in check.parts]
            except InputError:  # too few probes were measured for it
                continue
            found.append((sum(costs), check.ms.value))
        return found

    def _method(self, outside: float) -> str:
        words = [f"sum of pieces measured on {self._measured.name}"]
        carried = self._measured.carried
        if carried is not None:
            words.append(
                f"carried over from {carried.source} by {carried.probes} probes, which tell each "
                f"other within {carried.error:.0%} (median; worst {carried.worst:.0%})"
            )
        if outside > 1:
            words.append(f"a size lies outside the measured ones by a factor of {outside:.2f}")
        return "; ".join(words)


def predict_latency(
    measured: MeasuredDevice, tower: AnyTower, precision: Precision = "fp32"
) -> Prediction:
    """Predict one tower; for many, a `Predictor` fits the costs only once.

    Raises:
        InputError: see `Predictor.predict`.
    """
    return Predictor(measured).predict(tower, precision)
