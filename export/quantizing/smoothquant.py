"""SmoothQuant on a graph: move outliers behind LayerNorms into the weights that read them.

A LayerNormalization's scale and bias are divided by s, and the weights behind it multiplied by s:
s = max|activation| ** alpha / max|weight| ** (1 - alpha), for each channel. Nothing changes in
float. Xiao et al., SmoothQuant, ICML 2023. Here alpha is searched for each norm.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.graph.graph_values import GraphEdit, attribute, input_axis
from edgeclip.export.quantizing.activation_ranges import (
    EXTREMES,
    SIGNED,
    UNSIGNED,
    Histogram,
    ValueRange,
    observe,
)
from edgeclip.export.quantizing.config import SmoothingAlphas, StaticInt8
from edgeclip.runtime.arrays import FloatArray, Values


class LayerError:
    """The squared output error of some quantized products, for given smoothing divisors.

    Args:
        rows: some inputs of the products, [N, channels].
        low, high: extremes of each channel over all inputs, [channels].
        weights: weights of the products, [channels, outputs] each.
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
        """Return the error for channels divided by `divisors` [channels]."""
        rows = np.asarray(self._rows / divisors.astype(np.float32), np.float32)
        levels = SIGNED if self._config.symmetric else UNSIGNED
        # All inputs have these extremes; `rows` may go beyond them.
        kept = ValueRange(float((self._low / divisors).min()), float((self._high / divisors).max()))
        if self._config.ranging != EXTREMES:
            histogram = Histogram()
            histogram.add(rows)
            kept = self._config.ranging.range_of(histogram, levels)
        rows = levels.round(rows, kept).astype(np.float32)
        total = 0.0
        for weight, right in zip(self._weights, self._right, strict=True):
            found = rows @ _round_weight(weight * divisors[:, None], self._config)
            total += float(np.sum((found - right) ** 2, dtype=np.float64))
        return total


def _round_weight(weight: NDArray[np.floating], config: StaticInt8) -> FloatArray:
    """Round a weight [channels, outputs], with a scale for each output or one for all."""
    largest = 64 if config.reduce_range else 127
    bound = np.abs(weight).max(axis=0 if config.per_channel else None)
    step = np.where(bound > 0, bound / largest, 1.0)
    return np.asarray(np.rint(weight / step) * step, np.float32)


_ALPHAS = tuple(step / 10 for step in range(11))

_WORTH = 0.95  # of the error without smoothing: a larger error is not worth a change
_SMALLEST = 1e-5  # of the largest channel: smaller ones count as this large
_ROWS = 512  # of a norm's output that alphas are compared on


@dataclass(frozen=True, slots=True)
class _Norm:
    """A LayerNormalization and the products with constant weights that read it."""

    node: onnx.NodeProto
    products: tuple[onnx.NodeProto, ...]

    @property
    def result(self) -> str:
        return str(self.node.output[0])


def smoothable(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the LayerNormalizations that only products with constant weights read.

    A norm with other readers cannot be scaled, such as one in the residual stream of a BERT.
    The fused SkipLayerNormalization is left alone.
    """
    return tuple(norm.node.name for norm in _norms(GraphEdit(model)))


def apply_smoothing(model: onnx.ModelProto, alphas: SmoothingAlphas, data: CalibrationData) -> None:
    """Smooth some LayerNormalizations of a graph in place, by their channel sizes on `data`.

    Raises:
        ExportError: one of them cannot be smoothed.
        EngineError: the graph cannot be run here.
    """
    edit = GraphEdit(model)
    norms = _chosen(edit, [name for name, _ in alphas])
    samples = _samples(model, norms.values(), data, rows=0)
    for name, alpha in alphas:
        norm = norms[name]
        weights = [_rows(edit, product) for product in norm.products]
        _fold(edit, norm, smoothing_divisors(samples[norm.result].largest, weights, alpha))
    edit.drop_unread()


def rescale(model: onnx.ModelProto, norm: str, divisors: NDArray[np.floating]) -> None:
    """Divide the channels of a LayerNormalization, and multiply the weights behind it, in place.

    `divisors` are [channels].

    Raises:
        ExportError: it cannot be smoothed.
    """
    edit = GraphEdit(model)
    _fold(edit, _chosen(edit, [norm])[norm], np.asarray(divisors, np.float64))
    edit.drop_unread()


def smoothing_divisors(sizes: Values, weights: Sequence[Values], alpha: float) -> Values:
    """Return s [channels] by the formula of this module.

    Args:
        sizes: largest absolute value of each channel, [channels].
        weights: weights of the products that read them, [channels, outputs] each.
        alpha: 0 to 1.
    """
    read = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    given, taken = (_not_tiny(item) for item in (sizes, read))
    return np.asarray(given**alpha / taken ** (1 - alpha))


def search_alphas(
    source: Path | onnx.ModelProto, data: CalibrationData, config: StaticInt8
) -> SmoothingAlphas:
    """Find the alpha of each LayerNormalization with the least quantization error behind it.

    The error is the squared output error of its products, quantized as `config` says, on some
    of its outputs. Norms that no alpha improves, and norms whose products all stay in float, are
    left out. Memory does not grow with the data.

    Raises:
        ExportError: the graph cannot be read.
    """
    model = load_graph(source) if isinstance(source, Path) else source
    edit = GraphEdit(model)
    norms = [norm for norm in _norms(edit) if _quantized(norm, config)]
    samples = _samples(model, norms, data)
    found = []
    for norm in norms:
        sample = samples[norm.result]
        weights = [_rows(edit, product) for product in norm.products]
        chosen = [_rows(edit, product) for product in _quantized(norm, config)]
        error = LayerError(sample.rows, sample.low, sample.high, chosen, config)
        errors = {
            alpha: error.of(smoothing_divisors(sample.largest, weights, alpha)) for alpha in _ALPHAS
        }
        alpha = min(errors, key=lambda item: errors[item])
        if errors[alpha] < _WORTH * error.of(np.ones_like(sample.largest)):
            found.append((norm.node.name, alpha))
    return tuple(found)


class _Sample:
    """The extremes of each channel of a norm's output, and some rows of the output.

    With `apart`, rows come from every second batch and extremes from the others, so that rows
    exceed the extremes as often as on unseen data.
    """

    def __init__(self, rows: int, *, apart: bool) -> None:
        self._most, self._apart = rows, apart
        self._batches = 0
        self._parts: list[FloatArray] = []
        self._low: list[NDArray[np.floating]] = []
        self._high: list[NDArray[np.floating]] = []

    def add(self, values: NDArray[Any]) -> None:
        """Add a batch [..., channels]; at most `rows` of its rows are kept."""
        rows = values.reshape(-1, values.shape[-1])
        if not self._apart or self._batches % 2 == 0:
            self._low = [np.min([*self._low, rows.min(axis=0)], axis=0)]
            self._high = [np.max([*self._high, rows.max(axis=0)], axis=0)]
        if self._most and (not self._apart or self._batches % 2):
            places = np.linspace(0, len(rows) - 1, min(self._most, len(rows))).astype(int)
            self._parts.append(rows[places].astype(np.float32))
        self._batches += 1

    @property
    def rows(self) -> FloatArray:
        """Some rows of the output, [N, channels]."""
        return np.concatenate(self._parts)

    @property
    def low(self) -> Values:
        """The smallest value of each channel."""
        return self._low[0].astype(np.float64)

    @property
    def high(self) -> Values:
        """The largest value of each channel."""
        return self._high[0].astype(np.float64)

    @property
    def largest(self) -> Values:
        """The largest absolute value of each channel."""
        return np.maximum(-self.low, self.high)


def _samples(
    model: onnx.ModelProto, norms: Iterable[_Norm], data: CalibrationData, rows: int = _ROWS
) -> dict[str, _Sample]:
    """Sample the outputs of norms, by the names of the values; keep about `rows` rows of each."""
    apart = rows > 0 and data.count > 1
    share = -(-rows // max(data.count // 2 if apart else data.count, 1))
    samples = {norm.result: _Sample(share, apart=apart) for norm in norms}
    observe(model, list(samples), data, lambda name, values: samples[name].add(values))
    return samples


def _norms(edit: GraphEdit) -> Iterator[_Norm]:
    for node in edit.graph.node:
        if node.op_type != "LayerNormalization" or node.domain:
            continue
        scale, result = edit.constant(node, 1), node.output[0]
        biased = len(node.input) > 2 and node.input[2] != ""
        if scale is None or scale.ndim != 1 or (biased and edit.constant(node, 2) is None):
            continue
        readers = edit.readers(result)
        fits = [_is_product(edit, reader, result, len(scale)) for reader in readers]
        if readers and all(fits) and edit.is_private(result):
            yield _Norm(node, tuple(readers))


def _is_product(edit: GraphEdit, node: onnx.NodeProto, given: str, channels: int) -> bool:
    """Return whether a node multiplies a value [..., channels] by a constant weight."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.input[0] != given:
        return False
    if attribute(node, "transA", 0):
        return False
    weight = edit.constant(node, 1)
    return weight is not None and weight.ndim == 2 and weight.shape[input_axis(node)] == channels


def _chosen(edit: GraphEdit, names: Sequence[str]) -> dict[str, _Norm]:
    norms = {norm.node.name: norm for norm in _norms(edit)}
    wrong = [name for name in names if name not in norms]
    if wrong:
        raise ExportError(
            f"{', '.join(wrong)} cannot be smoothed: there must be a LayerNormalization of that "
            f"name, read by products with constant weights only ({', '.join(norms) or 'none is'})"
        )
    return {name: norms[name] for name in names}


def _quantized(norm: _Norm, config: StaticInt8) -> list[onnx.NodeProto]:
    return [product for product in norm.products if product.name not in config.kept]


def _rows(edit: GraphEdit, product: onnx.NodeProto) -> Values:
    """Return a product's weight as [channels, outputs]."""
    weight = edit.needed(product, 1)
    return np.moveaxis(weight.astype(np.float64), input_axis(product), 0)


def _fold(edit: GraphEdit, norm: _Norm, divisors: Values) -> None:
    for place in range(1, len(norm.node.input)):
        before = edit.constant(norm.node, place)
        if before is not None:
            edit.replace(norm.node, place, before / divisors)
    for product in norm.products:
        weight = _rows(edit, product) * divisors[:, None]
        edit.replace(product, 1, np.moveaxis(weight, 0, input_axis(product)))


def _not_tiny(sizes: Values) -> Values:
    """Raise values near 0 to a small share of the largest."""
    largest = float(sizes.max())
    return np.maximum(sizes, _SMALLEST * largest) if largest > 0 else np.ones_like(sizes)
