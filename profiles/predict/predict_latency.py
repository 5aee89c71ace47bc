"""Predict the latency of a tower that was never run, from block costs of a measured device.

The cost of a block is taken to be linear in four amounts: operations, weights, activations and
one call. The coefficients are non-negative least squares over the measured blocks of a family
(stems, transformer blocks, last layers, convolution blocks, the same with a response norm,
convolution heads), for each precision of the device with its threads. A tower takes the sum of its
blocks.

How far a prediction may be off is told by the errors of whole towers alone, which were measured
beside the probes and take no part in the fit: split conformal prediction (Vovk, Gammerman and
Shafer, "Algorithmic Learning in a Random World", 2005; Lei et al., "Distribution-free predictive
inference for regression", JASA 113, 2018). If the tower is like those (exchangeable), the bound
of n of them holds with probability at least ceil((n + 1) level) / (n + 1), so that n towers give
no level above n / (n + 1).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.profiles.predict.measured_device import BlockCost, MeasuredDevice
from edgeclip.profiles.predict.tower_shapes import AnyTower, BlockCount, BlockKind, TowerBlock
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.console import percent
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.percentiles import conformal_bound, conformal_level

FARTHEST = 3.0  # times the largest measured size, or part of the smallest: beyond, nothing is said
LEVEL = 0.9  # of the bounds, where enough whole towers were measured
FAMILIES: dict[BlockKind, str] = {
    "image-stem": "stem",
    "conv-stem": "stem",
    "conv-down": "stem",
    "image-block": "transformer",
    "text-block": "transformer",
    "image-last": "last",
    "text-last": "last",
    "conv-block": "convolution",
    "grn-block": "convolution with response norm",
    "conv-head": "head",
}
_GELU = 4  # activations that the erf of an exact GELU costs as much as
_GRN = 40  # activations, in widths of a block, that its norm over the map reads and writes
_NOISE = 0.01  # of a measured cost, as a relative error, beside what its interval tells
_NOISY = 0.1  # noise from which on a cost counts less
_LEAST_MS = 1e-4  # differences of tiny blocks can come out as nothing, or less
_OUTSIDE = 0.2  # a size twice the largest measured one adds 14% to the error: a rule of thumb


def work(block: TowerBlock) -> Values:
    """Amounts that a block's time is linear in: 10^6 operations, weights, activations; 1 call.

    A multiply-add counts 2 operations. Bytes are these numbers times those of one value, which
    is the same for all blocks of one fit.
    """
    width, at, given, hidden = block.width, block.positions, block.given, block.hidden
    pixels = 3 * block.patch**2
    layer = 4 * width**2 + 2 * width * hidden
    weights: float
    match block.kind:
        case "image-stem" | "conv-stem":
            weights, activations = pixels * width, at * (pixels + 3 * width)
            operations = 2 * at * weights
        case "conv-down":
            weights, activations = 4 * given * width, at * (8 * given + width)
            operations = 2 * at * weights
        case "image-block" | "text-block":
            weights = layer
            activations = at * (8 * width + 2 * hidden) + 2 * block.heads * at**2
            activations += _GELU * at * hidden * block.gelu
            operations = 2 * at * weights + 4 * at**2 * width
        case "image-last" | "text-last":  # keys and values for all tokens, the rest for one
            weights, activations = layer + width * given, 4 * at * width
            activations += _GELU * hidden * block.gelu
            rest = 2 * width**2 + 2 * width * hidden + width * given
            operations = 2 * (2 * at * width**2 + rest) + 4 * at * width
        case "conv-block" | "grn-block":
            weights, activations = 8 * width**2 + 49 * width, 14 * at * width
            activations += _GRN * at * width * (block.kind == "grn-block")
            operations = 2 * at * weights
        case "conv-head":
            weights, activations = width * given, 2 * at * width
            operations = 2 * weights
    return np.array([operations / 1e6, weights / 1e6, activations / 1e6, 1.0])


def non_negative_fit(matrix: Values, target: Values) -> Values:
    """Coefficients [K] of at least 0 with which `matrix` [N, K] comes closest to `target` [N].

    The best is a plain least-squares fit of some columns: all subsets are tried, so K is small.
    """
    count = matrix.shape[1]
    best, least = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for columns in map(list, itertools.combinations(range(count), size)):
            found = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            error = float(np.sum((matrix[:, columns] @ found - target) ** 2))
            if found.min() >= 0 and error < least:
                best, least = np.zeros(count), error
                best[columns] = found
    return best


def fit_costs(costs: Sequence[BlockCost]) -> Values:
    """Fit milliseconds of each amount of `work` [4], so that relative errors are small.

    A cost that its own interval shows to be noisy counts less.
    """
    ms = np.array([_ms(cost) for cost in costs])
    noise = np.hypot(_NOISE, [_error_ms(cost) for cost in costs] / ms)
    sure = 1 / np.hypot(1, noise / _NOISY)
    works = np.array([work(cost.piece) for cost in costs])
    return non_negative_fit(works * (sure / ms)[:, None], sure)


def _error_ms(cost: BlockCost) -> float:
    """About the standard error; where too few runs know no interval, from their range."""
    ends = (cost.ms.low, cost.ms.high)
    if not all(map(math.isfinite, ends)):
        ends = (min(cost.samples_ms), max(cost.samples_ms))
    return (ends[1] - ends[0]) / 4


def _ms(cost: BlockCost) -> float:
    return max(cost.ms.value, _LEAST_MS)


def sizes_of(block: TowerBlock) -> dict[str, float]:
    """Return the sizes that tell a block from others of its kind, by their names."""
    sizes: dict[str, float] = {"width": block.width, "positions": block.positions}
    if block.kind == "image-stem":
        sizes["patch"] = block.patch
    if block.heads:  # the same in nearly every CLIP
        sizes["width of a head"] = block.width / block.heads
        sizes["hidden / width"] = block.hidden / block.width
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The time of one run at batch 1, in milliseconds.

    Attributes:
        ms: predicted median.
        low, high: bounds; 0 and infinity where no whole tower was measured in this precision.
        level: probability with which a tower like the measured ones lies between both bounds.
            None where nothing is known of it: without whole towers, or with a size outside the
            measured ones, for which the bounds are widened by a rule of thumb.
        method: how it was found, and what to beware of, for a person.
    """

    ms: float
    low: float
    high: float
    level: float | None
    method: str

    @property
    def bounds(self) -> str:
        """The bounds and what they are worth, for a table."""
        if math.isinf(self.high):
            return "no bound"
        worth = "rule of thumb" if self.level is None else percent(self.level)
        return f"[{self.low:.2f}, {self.high:.2f}]  {worth}"


class Predictor:
    """Predicts towers on one measured device.

    Args:
        measured: the device.
    """

    def __init__(self, measured: MeasuredDevice) -> None:
        self._measured = measured
        self._by_kind: dict[tuple[BlockKind, Precision], list[BlockCost]] = defaultdict(list)
        self._by_family: dict[tuple[str, Precision], list[BlockCost]] = defaultdict(list)
        for cost in measured.costs:
            self._by_kind[cost.piece.kind, cost.precision].append(cost)
            self._by_family[FAMILIES[cost.piece.kind], cost.precision].append(cost)
        self._fits = {key: fit_costs(costs) for key, costs in self._by_family.items()}
        # Of each precision by itself: a tower's errors in two precisions are alike, so that both
        # together would count it twice.
        self._errors = {
            precision: np.array([abs(math.log(pred / ms)) for pred, ms in self.checks(precision)])
            for precision in measured.precisions
        }

    def measures(self, kind: BlockKind) -> bool:
        """Tell whether blocks of a kind were measured, in whatever precision."""
        return any(known == kind for known, _ in self._by_kind)

    def predict(self, tower: AnyTower, precision: Precision) -> Prediction:
        """Predict a tower.

        Raises:
            InputError: a precision that was not measured, or sizes too far from those that were.
        """
        return self.predict_blocks(tower.parts(), precision)

    def predict_blocks(self, parts: Sequence[BlockCount], precision: Precision) -> Prediction:
        """Predict the sum of some blocks; see `predict`."""
        ms = sum(part.count * self.block_ms(part.piece, precision) for part in parts)
        outside = max(self.outside(part.piece, precision) for part in parts)
        errors = self._errors[precision]
        level = min(LEVEL, conformal_level(len(errors)))
        error = conformal_bound(errors, level) + _OUTSIDE * math.log(outside)
        is_known = len(errors) > 0 and outside == 1
        return Prediction(
            ms=ms,
            low=ms * math.exp(-error),
            high=ms * math.exp(error),
            level=level if is_known else None,
            method="; ".join(self._method(precision, level, outside)),
        )

    def _method(self, precision: Precision, level: float, outside: float) -> Iterator[str]:
        yield f"sum of block costs fitted to what was measured on {self._measured.name}"
        carried = self._measured.carried
        if carried is not None:
            yield (
                f"most of them transferred from {carried.source} by {carried.probes} probes, which "
                f"predict each other within {carried.error:.0%} (median; {percent(carried.level)} "
                f"of them within {carried.bound:.0%})"
            )
        count = len(self._errors[precision])
        if count == 0:
            yield (
                f"no bound, since no whole tower was measured in {precision}: measure probes that "
                "have some"
            )
            return
        few = "" if level == LEVEL else f", no more than {percent(level)} for so few"
        towers = f"{count} whole tower{'s' * (count > 1)} measured in {precision}"
        yield f"the bounds are from the errors of {towers}{few}"
        if outside > 1:
            yield (
                f"a size lies outside the measured ones by a factor of {outside:.2f}, for which "
                "they are widened by a rule of thumb"
            )

    def block_ms(self, block: TowerBlock, precision: Precision) -> float:
        """Milliseconds that one block adds to a tower; see `predict`."""
        self.outside(block, precision)
        kind, known = self._key(block, precision)
        return max(float(work(block) @ self._fits[FAMILIES[kind], known]), _LEAST_MS)

    def outside(self, block: TowerBlock, precision: Precision) -> float:
        """By what factor a block's size lies outside those measured of its kind; 1 inside.

        Raises:
            InputError: by more than `FARTHEST`, or no such block was measured.
        """
        sizes = sizes_of(block)
        known = [sizes_of(cost.piece) for cost in self._by_kind[self._key(block, precision)]]
        ranges = {
            name: (min(item[name] for item in known), max(item[name] for item in known))
            for name in sizes
        }
        factor = max(
            factor
            for name, (low, high) in ranges.items()
            for factor in (low / sizes[name], sizes[name] / high)
        )
        if factor > FARTHEST * (1 + 1e-9):
            told = ", ".join(
                f"{name} {sizes[name]:g} (measured: {low:g} to {high:g})"
                for name, (low, high) in ranges.items()
            )
            raise InputError(
                f"{block.kind} is too far from what was measured on {self._measured.name!r}: "
                f"{told}: choose sizes nearer to those, or measure the tower itself"
            )
        return max(1.0, factor)

    def checks(self, precision: Precision) -> list[tuple[float, float]]:
        """Predicted and measured milliseconds of the whole towers that the device file has."""
        found = []
        for check in self._measured.checks:
            if check.precision != precision:
                continue
            try:
                costs = [part.count * self.block_ms(part.piece, precision) for part in check.parts]
            except InputError:  # too few probes were measured for it
                continue
            found.append((sum(costs), check.ms.value))
        return found

    def _key(self, block: TowerBlock, precision: Precision) -> tuple[BlockKind, Precision]:
        """Blocks that stay float in int8 are measured in fp32 only."""
        likely: tuple[Precision, ...] = ("int8", "fp32") if precision == "int8" else (precision,)
        for known in likely:
            if (block.kind, known) in self._by_kind and precision in self._measured.precisions:
                return block.kind, known
        raise InputError(
            f"{self._measured.name!r} has no times of {block.kind} in {precision}: measure it with "
            f"probes that have it (there are {', '.join(self._measured.precisions)})"
        )
