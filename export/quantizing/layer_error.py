"""What quantizing does to the products of one value, computed in numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.ranging import SIGNED, UNSIGNED, Histogram, Range

FloatArray = NDArray[np.float32]


class LayerError:
    """The squared error of what some products give, when channels and weights are rescaled.

    Args:
        rows: some of what the products read, [N, channels].
        low, high: extremes of each channel in all that they read, [channels].
        weights: of the products, [channels, outputs] each.
        config: how they are quantized.
    """

    def __init__(
        self,
        rows: FloatArray,
        low: NDArray[np.floating],
        high: NDArray[np.floating],
        weights: Sequence[NDArray[np.floating]],
        config: StaticInt8,
    ) -> None:
        self._rows, self._low, self._high = rows, low, high
        self._weights = weights
        self._config = config
        self._right = [rows @ weight.astype(np.float32) for weight in weights]

    def of(self, divisors: NDArray[np.floating]) -> float:
        """Return it for channels that are divided by `divisors` [channels], weights multiplied."""
        rows = quantized_rows(
            np.asarray(self._rows / divisors.astype(np.float32), np.float32),
            Range(float((self._low / divisors).min()), float((self._high / divisors).max())),
            self._config,
        )
        total = 0.0
        for weight, right in zip(self._weights, self._right, strict=True):
            found = rows @ quantized_weight(weight * divisors[:, None], self._config)
            total += float(np.sum((found - right) ** 2, dtype=np.float64))
        return total


def quantized_rows(rows: FloatArray, seen: Range, config: StaticInt8) -> FloatArray:
    """Round what products read; `seen` has the extremes, which `rows` may go beyond."""
    levels = SIGNED if config.symmetric else UNSIGNED
    kept = seen
    if config.ranging.method != "minmax":
        histogram = Histogram()
        histogram.add(rows)
        kept = config.ranging.cut(histogram, levels)
    return levels.round(rows, kept).astype(np.float32)


def quantized_weight(weight: NDArray[np.floating], config: StaticInt8) -> FloatArray:
    """Round a weight [channels, outputs], with a scale for each output or one for all."""
    largest = 64 if config.reduce_range else 127
    bound = np.abs(weight).max(axis=0 if config.per_channel else None)
    step = np.where(bound > 0, bound / largest, 1.0)
    return np.asarray(np.rint(weight / step) * step, np.float32)
