"""Fold the batch normalisations of a graph into the products beside them.

In evaluation each is a scale and a shift for every channel, so that the results stay the same up to
rounding, and quantization finds a product with nothing between it and its activation.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_EPSILON = 1e-5  # what ONNX takes where a node says nothing


def fold_batch_norms(model: onnx.ModelProto) -> int:
    """Fold, in place, what lies behind a Conv or MatMul or before a Conv of 1 x 1; return how many.

    Others, and those of a product whose result is read elsewhere too, are left as they are. Weights
    must be in memory.
    """
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    folded = sum(_Folder(model.graph).fold(node) for node in norms)
    read = {name for node in model.graph.node for name in node.input}
    for item in [item for item in model.graph.initializer if folded and item.name not in read]:
        model.graph.initializer.remove(item)
    return folded


class _Folder:
    """Looks at a graph as it is now, and folds one normalisation."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._constants = {item.name: item for item in graph.initializer}
        self._maker = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {item.name for item in graph.output}

    def fold(self, norm: onnx.NodeProto) -> bool:
        """Fold a normalisation, if it can be; tell whether it was."""
        if not set(norm.input[1:5]) <= self._constants.keys() or norm.output[0] in self._outputs:
            return False
        gain, offset, mean, variance = (self._value(name) for name in norm.input[1:5])
        scale = gain / np.sqrt(variance + _attribute(norm, "epsilon", _EPSILON))
        shift = offset - mean * scale
        before = self._product_before(norm.input[0])
        if before is not None and before.op_type == "Conv":
            self._scale_conv(before, scale, shift)
            self._skip(norm)
            return True
        if before is not None:  # MatMul: the shift stays, as the bias of a linear layer
            weight = before.input[1]
            before.input[1] = self._constant(f"{weight}_folded", self._value(weight) * scale)
            bias = self._constant(f"{norm.output[0]}_bias", shift)
            name = norm.name or norm.output[0]
            added = helper.make_node("Add", [norm.input[0], bias], list(norm.output), name)
            norm.CopyFrom(added)
            return True
        behind = self._pointwise_behind(norm.output[0])
        if behind is None:
            return False
        self._scale_inputs(behind, scale, shift)
        self._skip(norm)
        return True

    def _product_before(self, value: str) -> onnx.NodeProto | None:
        """Return the Conv that makes a value, or the MatMul before a Reshape to rows."""
        maker = self._only_reader_of(value)
        if maker is not None and maker.op_type == "Reshape":
            reshape, maker = maker, self._only_reader_of(maker.input[0])
            if maker is None or not self._is_to_rows(reshape, maker):
                return None
            kinds = ("MatMul",)
        else:
            kinds = ("Conv",)
        if maker is None or maker.op_type not in kinds:
            return None
        return maker if set(maker.input[1:]) - {""} <= self._constants.keys() else None

    def _is_to_rows(self, reshape: onnx.NodeProto, product: onnx.NodeProto) -> bool:
        """Tell whether a reshape makes rows [N, width] of a product of that width."""
        shape = self._constants.get(reshape.input[1])
        weight = self._constants.get(product.input[1]) if len(product.input) > 1 else None
        if shape is None or weight is None:
            return False
        wanted = numpy_helper.to_array(shape).tolist()
        return len(wanted) == 2 and wanted[-1] == weight.dims[-1]

    def _only_reader_of(self, value: str) -> onnx.NodeProto | None:
        """Return the maker of a value that a single node reads."""
        if len(self._readers.get(value, ())) != 1 or value in self._outputs:
            return None
        return self._maker.get(value)

    def _pointwise_behind(self, value: str) -> onnx.NodeProto | None:
        readers = self._readers.get(value, [])
        if len(readers) != 1 or value in self._outputs or readers[0].op_type != "Conv":
            return None
        conv = readers[0]
        if not set(conv.input[1:]) <= self._constants.keys() or _attribute(conv, "group", 1) != 1:
            return None
        shape, pads = self._constants[conv.input[1]].dims, _attribute(conv, "pads", ())
        return conv if list(shape[2:]) == [1, 1] and not any(pads) else None

    def _scale_conv(
        self, conv: onnx.NodeProto, scale: NDArray[np.float64], shift: NDArray[np.float64]
    ) -> None:
        """Fold behind a convolution [out, in, *kernel]."""
        weight = self._value(conv.input[1])
        bias = (
            self._value(conv.input[2])
            if len(conv.input) > 2 and conv.input[2]
            else np.zeros(len(weight))
        )
        spread = scale.reshape(-1, *[1] * (weight.ndim - 1))
        self._replace(conv, weight * spread, bias * scale + shift)

    def _scale_inputs(
        self, conv: onnx.NodeProto, scale: NDArray[np.float64], shift: NDArray[np.float64]
    ) -> None:
        """Fold before a convolution [out, in, 1, 1]."""
        weight = self._value(conv.input[1])
        bias = (
            self._value(conv.input[2])
            if len(conv.input) > 2 and conv.input[2]
            else np.zeros(len(weight))
        )
        moved = bias + weight[:, :, 0, 0] @ shift
        self._replace(conv, weight * scale.reshape(1, -1, 1, 1), moved)

    def _bias(self, conv: onnx.NodeProto, count: int) -> NDArray[np.float64]:
        has = len(conv.input) > 2 and conv.input[2]
        return self._value(conv.input[2]) if has else np.zeros(count)

    def _replace(
        self, conv: onnx.NodeProto, weight: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> None:
        name = conv.input[1]  # tells the block that a cut lies in
        inputs = [conv.input[0], self._constant(f"{name}_folded", weight)]
        conv.input[:] = [*inputs, self._constant(f"{name}_bias_folded", bias)]

    def _value(self, name: str) -> NDArray[np.float64]:
        return numpy_helper.to_array(self._constants[name]).astype(np.float64)

    def _constant(self, name: str, value: NDArray[np.float64]) -> str:
        while name in self._constants:
            name += "_again"
        made = numpy_helper.from_array(value.astype(np.float32), name)
        self._graph.initializer.append(made)
        self._constants[name] = made
        return name

    def _skip(self, norm: onnx.NodeProto) -> None:
        """Remove a normalisation; its readers take what it read."""
        for reader in self._readers.get(norm.output[0], []):
            names = [norm.input[0] if name == norm.output[0] else name for name in reader.input]
            reader.input[:] = names
        self._graph.node.remove(norm)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = [helper.get_attribute_value(item) for item in node.attribute if item.name == name]
    return found[0] if found else default
