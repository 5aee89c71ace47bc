"""Write symmetric Q/DQ graphs (int8 or float8) with fp16 in between, as TensorRT needs them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import PRODUCTS, limit_masks, load_graph, save_graph, with_opset
from edgeclip.export.quantizing.activation_ranges import EXTREMES, Bounds, Ranging, cached_bounds
from edgeclip.export.quantizing.fp16 import nodes_beyond_fp16, to_fp16


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """A quantized data type.

    Attributes:
        kind: data type, a constant of ONNX's TensorProto.
        largest: absolute value that is used.
        opset: the first operator set with Q/DQ of this type and fp16 scales.
    """

    kind: int
    largest: float
    opset: int

    def round(self, values: NDArray[np.float64]) -> onnx.TensorProto:
        """Round to the nearest representable value, ties to even."""
        limited = np.asarray(np.clip(values, -self.largest, self.largest))
        if self.kind == TensorProto.INT8:
            return numpy_helper.from_array(np.asarray(np.rint(limited), np.int8))
        rounded = torch.from_numpy(np.asarray(limited, np.float32)).to(torch.float8_e4m3fn)
        raw = rounded.view(torch.uint8).numpy().tobytes()
        return helper.make_tensor("", self.kind, values.shape, raw, raw=True)

    def zeros(self, shape: tuple[int, ...]) -> onnx.TensorProto:
        """Return zero points of this type."""
        return self.round(np.zeros(shape))


INT8 = NumberFormat(TensorProto.INT8, 127, opset=19)
# OCP 8-bit floating point, E4M3. Its Q/DQ came with 19, but ONNX Runtime moves them across
# Transpose and Reshape, which take float8 since 21.
FLOAT8 = NumberFormat(TensorProto.FLOAT8E4M3FN, 448, opset=21)


def write_symmetric(
    source: Path,
    target: Path,
    data: CalibrationData,
    *,
    nodes: Iterable[str],
    number_format: NumberFormat,
    half: bool,
    ranging: Ranging = EXTREMES,
    per_channel: bool = True,
    cache: Path | None = None,
) -> None:
    """Quantize `nodes` of an fp32 tower symmetrically; the rest becomes fp16 if `half`.

    Nodes beyond the range of fp16 stay in fp32 and are not quantized: such outliers would leave
    hardly a step for all other values. `cache` is a folder for ranges, used with this data only.

    Raises:
        ExportError: nothing is left to quantize, or the result is not valid ONNX.
    """
    model = load_graph(source)
    limit_masks(model)
    extremes = cached_bounds(source, data, cache=cache)
    bounds = extremes
    if ranging != EXTREMES:
        bounds = cached_bounds(source, data, ranging, PRODUCTS, cache=cache)
    kept = nodes_beyond_fp16(model, extremes) if half else set()
    reads = {node.name: bounds[node.input[0]] for node in model.graph.node if node.name in nodes}
    chosen = {name: bound for name, bound in reads.items() if name not in kept}
    if not chosen:
        raise ExportError(f"{source.name}: everything that could be quantized is too large for it")
    if half or number_format == FLOAT8:
        model = with_opset(model, number_format.opset)
    if half:
        model = to_fp16(model, kept)
    insert_qdq(model, chosen, number_format, per_channel=per_channel)
    save_graph(model, target)


def insert_qdq(
    model: onnx.ModelProto, nodes: Bounds, number_format: NumberFormat, *, per_channel: bool = True
) -> None:
    """Insert Q/DQ pairs before the first input of `nodes`, and DQ before their weights.

    `nodes` has the largest absolute value of each node's input. Weights have one scale for each
    output channel if `per_channel`, else one. Nodes that read the same value share a pair, so
    that an engine can fuse the query, key and value projections.
    """
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    writer = _Writer(number_format)
    for node in graph.node:
        if node.name in nodes:
            weight = weights[node.input[1]]
            kind = helper.tensor_dtype_to_np_dtype(weight.data_type)
            node.input[0] = writer.activation(node.input[0], nodes[node.name], kind)
            axis = _channel_axis(node, weight) if per_channel else None
            node.input[1] = writer.weight(weight, axis)
        writer.nodes.append(node)
    ordered = list(writer.nodes)
    del graph.node[:]
    graph.node.extend(ordered)
    graph.initializer.extend(writer.constants.values())
    read = {name for node in graph.node for name in node.input}
    for item in weights.values():
        if item.name not in read:
            graph.initializer.remove(item)


def _channel_axis(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    """Return the axis of a weight's output channels."""
    transposed = any(item.name == "transB" and item.i for item in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else len(weight.dims) - 1


class _Writer:
    """Create the Q/DQ nodes and constants of a quantized graph, each once."""

    def __init__(self, number_format: NumberFormat) -> None:
        self.number_format = number_format
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._done: dict[tuple[str, int | None], str] = {}

    def activation(self, name: str, bound: float, kind: np.dtype) -> str:
        """Add a Q/DQ pair for a value; return the name of its result."""
        if (name, -1) not in self._done:
            scale = self._constant(
                f"{name}_scale", _scale(np.array(bound), self.number_format, kind)
            )
            zero = self._zeros(())
            whole, back = f"{name}_quantized", f"{name}_dequantized"
            self.nodes += [
                helper.make_node("QuantizeLinear", [name, scale, zero], [whole], f"{name}_Q"),
                helper.make_node("DequantizeLinear", [whole, scale, zero], [back], f"{name}_DQ"),
            ]
            self._done[name, -1] = back
        return self._done[name, -1]

    def weight(self, tensor: onnx.TensorProto, axis: int | None) -> str:
        """Add a quantized weight and its DQ; return the name of its result.

        There is one scale for each index of `axis`, or one for all.
        """
        name = tensor.name
        if (name, axis) not in self._done:
            values = numpy_helper.to_array(tensor)
            others = tuple(place for place in range(values.ndim) if place != axis)
            scales = _scale(
                np.asarray(np.abs(values).max(axis=others)), self.number_format, values.dtype
            )
            spread = np.expand_dims(scales.astype(np.float64), others)
            stem = name if axis is None else f"{name}_axis{axis}"
            rounded = self.number_format.round(values.astype(np.float64) / spread)
            rounded.name = f"{stem}_quantized"
            self.constants[rounded.name] = rounded
            inputs = [rounded.name, self._constant(f"{stem}_scale", scales)]
            inputs.append(self._zeros(scales.shape))
            back = f"{stem}_dequantized"
            node = helper.make_node("DequantizeLinear", inputs, [back], f"{stem}_DQ")
            if axis is not None:
                node.attribute.append(helper.make_attribute("axis", axis))
            self.nodes.append(node)
            self._done[name, axis] = back
        return self._done[name, axis]

    def _constant(self, name: str, value: NDArray[np.floating]) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def _zeros(self, shape: tuple[int, ...]) -> str:
        name = "_".join(["zero_point", *map(str, shape)])
        zeros = self.number_format.zeros(shape)
        zeros.name = name
        self.constants[name] = zeros
        return name


def _scale(
    bound: NDArray[np.floating], number_format: NumberFormat, kind: np.dtype
) -> NDArray[np.floating]:
    """Return bound / largest, rounded up to the dtype `kind`; 1 where `bound` is 0.

    fp16 is coarse near 0, and a scale that is rounded down would clip the largest values. Weights
    are rounded with the scale as it is stored, so nothing else is lost.
    """
    exact = bound.astype(np.float64) / number_format.largest
    stored = exact.astype(kind)
    up = np.nextafter(stored, np.array(np.inf, kind))
    scale = np.where(stored.astype(np.float64) < exact, up, stored)
    return np.where(exact == 0, np.array(1, kind), scale)
