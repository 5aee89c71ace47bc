"""Predict the latency of a tower that was never run, from block costs of a measured device."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.predict.measured_device import MeasuredDevice, PieceCost
from edgeclip.profiles.predict.tower_shapes import AnyTower, Kind, Part, Piece
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision

FARTHEST = 3.0  # times the largest measured size, or part of the smallest: beyond, nothing is said
_REACH = 1.0  # of the Gaussian process, in natural logarithms of a size
_NOISE = 0.01  # of a measured cost, as a relative error, beside what its interval tells
_NOISY = 0.1  # noise from which on a cost counts less when work is weighed
_LEAST_SPREAD = 0.03
_LEAST_MS = 1e-4  # differences of tiny pieces can come out as nothing, or less
_FEWEST = 2  # pieces of a kind, to say how well one tells the others


def work(piece: Piece) -> Values:
    """What a piece does, by the kind of doing: 10^6 of each, and 1 for the nodes."""
    width, at, given = piece.width, piece.positions, piece.given
    gelu = at * piece.hidden * piece.gelu
    counts: dict[Kind, tuple[float, ...]] = {
        "image-stem": (at * 3 * piece.patch**2 * width, at * 3 * piece.patch**2, at * width),
        "conv-stem": (at * 3 * piece.patch**2 * width, at * 3 * piece.patch**2, at * width),
        "image-block": _block(piece, gelu),
        "text-block": _block(piece, gelu),
        "image-last": _last(piece),
        "text-last": _last(piece),
        "conv-block": (8 * at * width**2, 49 * at * width, at * width, 8 * width**2),
        "conv-down": (4 * at * given * width, 4 * at * given, 4 * given * width),
        "conv-head": (at * width, width * given),
    }
    return np.array([1.0, *(value / 1e6 for value in counts[piece.kind])])


def _block(piece: Piece, gelu: float) -> tuple[float, ...]:
    width, at = piece.width, piece.positions
    weights = 4 * width**2 + 2 * width * piece.hidden
    elements = at * (4 * width + piece.hidden)
    return (at * weights, 2 * at**2 * width, piece.heads * at**2, elements, weights, gelu)


def _last(piece: Piece) -> tuple[float, ...]:
    """Keys and values for all tokens; the rest for one reads each weight for one product."""
    width, at = piece.width, piece.positions
    weights = 4 * width**2 + 2 * width * piece.hidden + width * piece.given
    return (2 * at * width**2, at * width, weights)


def sizes_of(piece: Piece) -> dict[str, float]:
    """The sizes that tell a piece from others of its kind, by their names."""
    sizes: dict[str, float] = {"width": piece.width, "positions": piece.positions}
    if piece.kind == "image-stem":
        sizes["patch"] = piece.patch
    if piece.heads:  # the same in nearly every CLIP
        sizes["width of a head"] = piece.width / piece.heads
        sizes["hidden / width"] = piece.hidden / piece.width
    return sizes


def place(piece: Piece) -> Values:
    """Where a piece lies among those of its kind: logarithms of its sizes."""
    return np.log(np.array(list(sizes_of(piece).values()), dtype=np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class KindCost:
    """Costs of one kind of piece in one precision.

    Attributes:
        pieces: that were measured.
        places: theirs [N, sizes].
        weights: of the work, in milliseconds.
        spread: standard deviation of what the work leaves over, as a logarithm.
        pulls: of the measured pieces on what is left over [N].
    """

    pieces: tuple[Piece, ...]
    places: Values
    weights: Values
    spread: float
    pulls: Values

    @classmethod
    def fit(cls, costs: Sequence[PieceCost]) -> "KindCost":
        """Weigh the work of pieces of one kind so that their relative errors are small."""
        pieces = tuple(cost.piece for cost in costs)
        ms = np.array([_ms(cost) for cost in costs])
        noise = np.hypot(_NOISE, [(cost.ms.high - cost.ms.low) / 4 for cost in costs] / ms)
        works, sure = np.array([work(piece) for piece in pieces]), 1 / np.hypot(1, noise / _NOISY)
        weights = non_negative_fit(works * (sure / ms)[:, None], sure)
        over = np.log(ms / np.maximum(works @ weights, _LEAST_MS))
        places = np.array([place(piece) for piece in pieces])
        spread = max(_LEAST_SPREAD, float(np.sqrt(np.mean(over**2))))
        among = spread**2 * _likeness(places, places) + np.diag(noise**2)
        pulls = np.asarray(np.linalg.solve(among, over), dtype=np.float64)
        return cls(pieces, places, weights, spread, pulls)

    def ms(self, piece: Piece) -> float:
        """Milliseconds that a piece adds to a tower."""
        plain = max(float(work(piece) @ self.weights), _LEAST_MS)
        alike = self.spread**2 * _likeness(place(piece)[None], self.places)[0]
        return plain * math.exp(float(alike @ self.pulls))

    def outside(self, piece: Piece) -> float:
        """By what factor a size lies outside those measured; 1 inside."""
        at = place(piece)
        beyond = np.maximum(self.places.min(axis=0) - at, at - self.places.max(axis=0))
        return float(np.exp(max(0.0, beyond.max())))


class BlockCosts:
    """Costs of all kinds of pieces on one device.

    Args:
        measured: the device.
    """

    def __init__(self, measured: MeasuredDevice) -> None:
        self._groups: dict[tuple[Kind, Precision], list[PieceCost]] = defaultdict(list)
        for cost in measured.costs:
            self._groups[cost.piece.kind, cost.precision].append(cost)
        self._fits = {key: KindCost.fit(costs) for key, costs in self._groups.items()}
        self._errors: dict[tuple[Kind, Precision], Values] = {}
        self._name = measured.name
        self.precisions = measured.precisions

    def ms(self, piece: Piece, precision: Precision) -> float:
        """Milliseconds that a piece adds to a tower.

        Raises:
            InputError: no such piece was measured, or none of nearly its size.
        """
        self.outside(piece, precision)
        return self._fits[self._key(piece, precision)].ms(piece)

    def outside(self, piece: Piece, precision: Precision) -> float:
        """By what factor a piece's size lies outside those measured; 1 inside.

        Raises:
            InputError: by more than `FARTHEST`, or no such piece was measured.
        """
        key = self._key(piece, precision)
        factor = self._fits[key].outside(piece)
        if factor > FARTHEST * (1 + 1e-9):
            raise InputError(self._too_far(piece, self._fits[key].pieces))
        return factor

    def _too_far(self, piece: Piece, measured: Sequence[Piece]) -> str:
        known = [sizes_of(item) for item in measured]
        sizes = ", ".join(
            f"{name} {size:g} (measured: {min(item[name] for item in known):g} to "
            f"{max(item[name] for item in known):g})"
            for name, size in sizes_of(piece).items()
        )
        return (
            f"{piece.kind} is too far from what was measured on {self._name!r}: {sizes}: choose "
            "sizes nearer to those, or measure the tower itself"
        )

    def errors(self, piece: Piece, precision: Precision) -> Values:
        """Logarithmic errors with which the other pieces of its kind tell each one [N].

        Empty where too few were measured.
        """
        key = self._key(piece, precision)
        if key not in self._errors:
            costs = self._groups[key]
            places = range(len(costs)) if len(costs) >= _FEWEST else ()
            self._errors[key] = np.array([_left_out(costs, at) for at in places])
        return self._errors[key]

    def _key(self, piece: Piece, precision: Precision) -> tuple[Kind, Precision]:
        """Pieces that stay float in int8 are measured in fp32 only."""
        likely: tuple[Precision, ...] = ("int8", "fp32") if precision == "int8" else (precision,)
        for known in likely:
            if (piece.kind, known) in self._fits and precision in self.precisions:
                return piece.kind, known
        raise InputError(
            f"{self._name!r} has no times of {piece.kind} in {precision}: measure it with probes "
            f"that have it (there are {', '.join(self.precisions)})"
        )


def non_negative_fit(matrix: Values, target: Values) -> Values:
    """Weights [K] of at least 0 with which `matrix` [N, K] comes closest to `target` [N].

    Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23.
    """
    scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-12)
    scaled = matrix / scale
    count = matrix.shape[1]
    free, weights = np.zeros(count, dtype=bool), np.zeros(count)
    for _ in range(3 * count):
        pull = np.where(free, -np.inf, scaled.T @ (target - scaled @ weights))
        if free.all() or pull.max() <= 1e-9:
            break
        free[int(pull.argmax())] = True
        weights = _descend(scaled, target, free, weights)
    return np.asarray(weights / scale, dtype=np.float64)


def _descend(matrix: Values, target: Values, free: NDArray[np.bool_], weights: Values) -> Values:
    """Solve for the free weights, holding at 0 each that would fall below."""
    while True:
        solved = np.zeros_like(weights)
        solved[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        if not free.any() or solved[free].min() > 0:
            return solved
        falling = free & (solved <= 0)
        steps = weights[falling] / np.maximum(weights[falling] - solved[falling], 1e-300)
        weights = weights + min(1.0, float(steps.min())) * (solved - weights)
        free &= weights > 1e-12
        weights = np.where(free, weights, 0.0)


def _left_out(costs: Sequence[PieceCost], at: int) -> float:
    """Logarithmic error of the prediction of one piece from the others."""
    rest = [cost for other, cost in enumerate(costs) if other != at]
    predicted = KindCost.fit(rest).ms(costs[at].piece)
    return math.log(predicted / _ms(costs[at]))


def _ms(cost: PieceCost) -> float:
    return max(cost.ms.value, _LEAST_MS)


def _likeness(ours: Values, theirs: Values) -> Values:
    """How much two places [N, D], [M, D] have in common: [N, M], 1 for the same."""
    squares = ((ours[:, None] - theirs[None]) ** 2).sum(axis=-1)
    return np.asarray(np.exp(-squares / (2 * _REACH**2)), dtype=np.float64)


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
