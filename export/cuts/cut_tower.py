"""Cut a tower's graph into a head graph and a tail graph."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from edgeclip.export.cuts.cut_points import FoundCut, activations
from edgeclip.export.graph.graph_values import GraphValues, Opener
from edgeclip.runtime.planning.cut_set import CUT_TENSOR

_BATCH = "edgeclip_batch"  # int64 [1]: the batch size
_SKIP_NORM = "SkipLayerNormalization"
_KINDS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def prepare_for_cutting(
    model: onnx.ModelProto, output: str, feed: Mapping[str, NDArray[Any]], open_engine: Opener
) -> onnx.ModelProto:
    """Return the part of a tower that computes `output`, rewritten so that it can be cut anywhere.

    Fused residual sums and normalisations are split again, and all reads of a value's shape are
    replaced by one node that gives the batch size.

    Args:
        model: the tower, with its weights in memory.
        output: the only output that is kept.
        feed: the tower's input for at least two pictures, or for the whole batch where the batch
            size is fixed.
        open_engine: loads an ONNX file.

    Raises:
        EngineError: the graph cannot be run.
    """
    part = GraphValues(model, feed, open_engine).cut([output])
    _split_skip_norms(part)
    _replace_shapes(part, feed, open_engine)
    return part


def cut_head(model: onnx.ModelProto, cut: FoundCut) -> onnx.ModelProto:
    """Return the graph from the input to `cut`, float32 [N, *shape].

    Args:
        model: the result of `prepare_for_cutting`.
        cut: any cut but the input.
    """
    given = model.graph.input[0].name
    _read_batch_from(model, given)
    part = _extract(model, cut, given, cut.value)
    if cut.point.dtype == "float32":
        _rename(part.graph, cut.value)
    else:
        cast = helper.make_node("Cast", [cut.value], [CUT_TENSOR], "cut_cast", to=TensorProto.FLOAT)
        part.graph.node.append(cast)
    part.graph.output[0].CopyFrom(_cut_info(model, cut))
    return part


def cut_tail(model: onnx.ModelProto, cut: FoundCut) -> onnx.ModelProto:
    """Return the graph from `cut`, float32 [N, *shape], to the output; from the input at cut 0.

    Args:
        model: the result of `prepare_for_cutting`.
        cut: where the tail begins.
    """
    _read_batch_from(model, cut.value)
    part = _extract(model, cut, cut.value, model.graph.output[0].name)
    if cut.point.number == 0:
        return part
    if cut.point.dtype == "float32":
        _rename(part.graph, cut.value)
    else:
        kind = _KINDS[cut.point.dtype]
        cast = helper.make_node("Cast", [CUT_TENSOR], [cut.value], "cut_cast", to=kind)
        part.graph.node.insert(0, cast)
    part.graph.input[0].CopyFrom(_cut_info(model, cut))
    return part


def _extract(model: onnx.ModelProto, cut: FoundCut, first: str, last: str) -> onnx.ModelProto:
    """Extract the nodes between two values; onnx needs the type of both."""
    kind = _KINDS.get(cut.point.dtype, TensorProto.UNDEFINED)
    del model.graph.value_info[:]
    if cut.point.number:
        model.graph.value_info.append(helper.make_tensor_value_info(cut.value, kind, None))
    part = Extractor(model).extract_model([first], [last])
    del part.graph.value_info[:]
    part.graph.name = model.graph.name
    part.producer_name = model.producer_name
    return part


def _cut_info(model: onnx.ModelProto, cut: FoundCut) -> onnx.ValueInfoProto:
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    sizes = [batch.dim_param or batch.dim_value or None, *cut.point.shape]
    return helper.make_tensor_value_info(CUT_TENSOR, TensorProto.FLOAT, sizes)


def _rename(graph: onnx.GraphProto, value: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [CUT_TENSOR if name == value else name for name in names]


def _read_batch_from(model: onnx.ModelProto, value: str) -> None:
    """Read the batch size from a value that the extracted half has."""
    for node in model.graph.node:
        if _BATCH in node.output:
            node.input[0] = value


def _replace_shapes(
    model: onnx.ModelProto, feed: Mapping[str, NDArray[Any]], open_engine: Opener
) -> None:
    """Replace each Shape of an activation by a + b * (batch size), with constants a and b.

    The constants follow from two runs, one without the last picture.
    """
    graph = model.graph
    active = activations(graph)
    asking = [n for n in graph.node if n.op_type == "Shape" and n.input[0] in active]
    if not asking:
        return
    names = [node.output[0] for node in asking]
    known = GraphValues(model, feed, open_engine).values(names)
    fixed = graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    fewer = {name: value[:-1] for name, value in feed.items()}
    before = known if fixed else GraphValues(model, fewer, open_engine).values(names)
    count = len(next(iter(feed.values())))
    given = graph.input[0].name
    nodes = [helper.make_node("Shape", [given], [_BATCH], "batch_size", start=0, end=1)]
    for name in names:
        each = known[name] - before[name]
        nodes += _affine(graph, name, known[name] - count * each, each)
    kept = [*nodes, *(node for node in graph.node if node not in asking)]
    del graph.node[:]
    graph.node.extend(kept)


def _affine(
    graph: onnx.GraphProto, name: str, start: NDArray[np.int64], each: NDArray[np.int64]
) -> list[onnx.NodeProto]:
    """Make nodes that compute `name` as start + each * batch, all int64 [axes]."""
    constants = {f"{name}_start": start, f"{name}_each": each}
    graph.initializer.extend(numpy_helper.from_array(v, key) for key, v in constants.items())
    first, factor = constants
    product = f"{name}_product"
    return [
        helper.make_node("Mul", [_BATCH, factor], [product], f"{name}_mul"),
        helper.make_node("Add", [product, first], [name], f"{name}_add"),
    ]


def _split_skip_norms(model: onnx.ModelProto) -> None:
    """Split ONNX Runtime's SkipLayerNormalization into sums and LayerNormalization.

    Its inputs are two summands, weight, bias and a third summand; its outputs the norm, two
    that inference leaves empty, and the sum.
    """
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != _SKIP_NORM:
            nodes.append(node)
            continue
        inputs, outputs = [[*names, *[""] * 5] for names in (node.input, node.output)]
        total = outputs[3] or f"{node.name}_sum"
        if inputs[4]:
            part = f"{node.name}_part"
            nodes.append(helper.make_node("Add", inputs[:2], [part], f"{node.name}_add"))
            inputs[:2] = [part, inputs[4]]
        nodes.append(helper.make_node("Add", inputs[:2], [total], f"{node.name}_skip"))
        weights = [name for name in inputs[2:4] if name]
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-12)
        nodes.append(
            helper.make_node(
                "LayerNormalization", [total, *weights], [outputs[0]], node.name, epsilon=epsilon
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)
