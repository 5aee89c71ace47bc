"""Bias correction: what quantizing adds to a product on average is taken out of its bias.

Rounding weights and activations moves the mean of each output channel, and the layers behind
add such shifts up. The mean error is measured for each product by itself, on what it reads in
the float graph; a shift that comes from the layers before goes away with theirs. Nagel et al.,
Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.2,
with calibration data in place of the statistics of batch norms.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph import PRODUCTS, opset_of, with_opset
from edgeclip.export.graph.graph_values import GraphEdit, attribute
from edgeclip.export.quantizing.activation_ranges import run_batches
from edgeclip.runtime.arrays import Values

_SUM, _COUNT = "sum_of_errors:", "count_of_errors:"  # outputs, followed by a node's name
_INSIDE = "quantized:"  # begins all names that come from the quantized graph
_LARGEST_BIAS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Product:
    """A quantized product, in both graphs.

    Attributes:
        node: in the quantized graph.
        inside: the nodes there that quantize and dequantize what it reads, in order.
        twin: the same product in the float graph.
    """

    node: onnx.NodeProto
    inside: tuple[onnx.NodeProto, ...]
    twin: onnx.NodeProto

    @property
    def quantizes(self) -> onnx.NodeProto:
        """What quantizes the value that it multiplies, which is the first thing done."""
        return self.inside[0]

    @property
    def weighs(self) -> onnx.NodeProto:
        """What dequantizes its weight."""
        return next(node for node in self.inside if node.output[0] == self.node.input[1])


def correct_biases(
    quantized: onnx.ModelProto, source: onnx.ModelProto, data: CalibrationData
) -> onnx.ModelProto:
    """Return a copy of a Q/DQ graph whose products give on average what the float ones give.

    The mean error goes into the bias of a Gemm or Conv, which gets one if it has none, or into
    the bias that is added right behind a MatMul. Other products stay as they are: no operator
    is added. Memory does not grow with the data.

    Args:
        quantized: what was made of `source`, its nodes having kept their names.
        source: the float graph, after all transforms.
        data: what the errors are averaged over.

    Raises:
        ExportError: the graphs have no quantized product in common.
        EngineError: they cannot be run here.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(quantized)
    edit = GraphEdit(corrected)
    products = _products(edit, source)
    if not products:
        raise ExportError("the graphs have no quantized product in common, so none is corrected")
    compared = _compared(edit, products, source, opset_of(corrected))
    for name, error in _mean_errors(compared, data).items():
        product = next(item for item in products if item.node.name == name)
        _subtract(edit, product, error)
    edit.drop_unread()
    return corrected


def _products(edit: GraphEdit, source: onnx.ModelProto) -> list[_Product]:
    twins = {node.name: node for node in source.graph.node}
    found = []
    for node in edit.graph.node:
        if node.op_type in PRODUCTS and node.name in twins:
            inside = _inside(edit, node)
            if inside:
                found.append(_Product(node, inside, twins[node.name]))
    return found


def _inside(edit: GraphEdit, product: onnx.NodeProto) -> tuple[onnx.NodeProto, ...]:
    """Nodes that quantize and dequantize what a product reads; none if it is not quantized."""
    found = []
    for place, name in enumerate(product.input):
        after = edit.maker(name)
        if after is None or after.op_type != "DequantizeLinear":
            if place < 2:
                return ()
            continue
        before = edit.maker(after.input[0])
        if place == 0:
            if before is None or before.op_type != "QuantizeLinear":
                return ()
            found.append(before)
        found.append(after)
    return tuple(found)


def _compared(
    edit: GraphEdit, products: Sequence[_Product], source: onnx.ModelProto, opset: int
) -> onnx.ModelProto:
    """Return the float graph, with each quantized product beside its twin, reading the same.

    Outputs are the sum of the errors of each channel, and their number.
    """
    both = onnx.ModelProto()
    both.CopyFrom(with_opset(source, opset))
    del both.graph.output[:]
    known = {item.domain for item in both.opset_import}
    both.opset_import.extend(item for item in edit.opsets if item.domain not in known)
    beside = _Beside(edit, both.graph)
    for product in products:
        beside.add(product)
    return both


class _Beside:
    """Adds quantized products to the float graph."""

    def __init__(self, edit: GraphEdit, graph: onnx.GraphProto) -> None:
        self._edit, self._graph = edit, graph
        self._constants: set[str] = set()

    def add(self, product: _Product) -> None:
        """Add one, and the sum and the number of its errors as outputs."""
        node, name = product.node, product.node.name
        kind = helper.np_dtype_to_tensor_dtype(self._edit.needed(product.quantizes, 1).dtype)
        given = self._make("Cast", [product.twin.input[0]], f"{name}:given", to=kind)
        read = {product.quantizes.input[0]: given}
        for item in (*product.inside, node):
            self._copy(item, name, read)
        found = self._make("Cast", [read[node.output[0]]], f"{name}:found", to=TensorProto.FLOAT)
        error = self._make("Sub", [found, product.twin.output[0]], f"{name}:error")
        rank = self._edit.needed(product.weighs, 0).ndim
        if node.op_type != "Conv":  # [..., channels]; a Conv has [N, channels, ...]
            error = self._make("Flatten", [error], f"{name}:errors", axis=-1)
        axes = self._constant(f"{name}:axes", np.array([0, *range(2, rank)]))
        total = self._make("ReduceSum", [error, axes], f"{name}:sum", keepdims=0)
        count = self._make("Size", [error], f"{name}:size")
        for output, value in ((_SUM + name, total), (_COUNT + name, count)):
            self._graph.node.append(helper.make_node("Identity", [value], [output], output))
            self._graph.output.append(onnx.ValueInfoProto(name=output))

    def _copy(self, node: onnx.NodeProto, name: str, read: dict[str, str]) -> None:
        """Copy a node; `read` says what the copies are called that it reads, and is added to."""
        made = self._graph.node.add()
        made.CopyFrom(node)
        made.name = f"{_INSIDE}{name}:{node.name}"
        for place, value in enumerate(node.input):
            constant = self._edit.constant(node, place)
            if constant is not None:
                made.input[place] = self._constant(value, constant)
            elif value:
                made.input[place] = read[value]
        made.output[:] = [f"{_INSIDE}{name}:{value}" for value in node.output]
        read.update(zip(node.output, made.output, strict=True))

    def _make(self, operator: str, inputs: list[str], output: str, **settings: int) -> str:
        output = _INSIDE + output
        made = helper.make_node(operator, inputs, [output], output)
        made.attribute.extend(helper.make_attribute(key, value) for key, value in settings.items())
        self._graph.node.append(made)
        return output

    def _constant(self, name: str, values: NDArray[np.generic]) -> str:
        name = _INSIDE + name
        if name not in self._constants:
            self._constants.add(name)
            self._graph.initializer.append(numpy_helper.from_array(values, name))
        return name


def _mean_errors(compared: onnx.ModelProto, data: CalibrationData) -> dict[str, Values]:
    """Mean error of each channel, by the name of the product."""
    sums: dict[str, Values] = {}
    counts: dict[str, int] = {}

    def visit(output: str, values: NDArray[np.generic]) -> None:
        if output.startswith(_SUM):
            name = output.removeprefix(_SUM)
            sums[name] = sums.get(name, 0.0) + values.astype(np.float64)
        else:
            name = output.removeprefix(_COUNT)
            counts[name] = counts.get(name, 0) + int(values)

    run_batches(compared, data, visit)
    return {name: total * len(total) / counts[name] for name, total in sums.items()}


def _subtract(edit: GraphEdit, product: _Product, error: Values) -> None:
    """Take the mean error of each channel out of a product's bias, wherever that is."""
    node = product.node
    if node.op_type == "MatMul":
        reader = edit.only_reader(node.output[0])
        place = None if reader is None else _bias_place(edit, reader, len(error))
        if reader is not None and place is not None:
            edit.replace(reader, place, edit.needed(reader, place) - error)
        return
    weight = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    if weight == 0:
        return
    change = -error / weight
    stored = edit.maker(node.input[2]) if len(node.input) > 2 else None
    if len(node.input) < 3 or not node.input[2]:
        _give_bias(edit, product, change)
    elif stored is None:
        edit.replace(node, 2, edit.needed(node, 2) + change)
    else:
        steps = np.rint(change / edit.needed(stored, 1))
        edit.replace(stored, 0, _as_int32(edit.needed(stored, 0) + steps))


def _bias_place(edit: GraphEdit, reader: onnx.NodeProto, channels: int) -> int | None:
    """Return where the reader of a product takes its bias [channels]; None if nowhere."""
    if reader.op_type not in ("Add", "BiasGelu"):
        return None
    for place in (0, 1):
        bias = edit.constant(reader, place)
        if bias is not None and bias.ndim and bias.size == bias.shape[-1] == channels:
            return place
    return None


def _give_bias(edit: GraphEdit, product: _Product, bias: Values) -> None:
    """Add a bias to a Gemm or Conv that has none, as its quantized form takes it."""
    node, name = product.node, f"{product.node.name}_correction"
    place = 2 if len(node.input) > 2 else len(node.input)
    scales = edit.needed(product.quantizes, 1) * edit.needed(product.weighs, 1)
    if edit.needed(product.quantizes, 2).dtype != np.uint8:
        edit.add(node, place, name, bias.astype(scales.dtype))
        return
    # Products of uint8 and int8 add up in int32, and so must the bias.
    made = helper.make_node("DequantizeLinear", [], [name], f"{name}_DQ", axis=0)
    made = edit.insert_before(node, made)
    edit.add(made, 0, f"{name}_quantized", _as_int32(np.rint(bias / scales)))
    edit.add(made, 1, f"{name}_scale", scales)
    edit.read(node, place, name)


def _as_int32(values: NDArray[np.floating]) -> NDArray[np.int32]:
    return np.asarray(np.clip(values, -_LARGEST_BIAS, _LARGEST_BIAS), np.int32)
