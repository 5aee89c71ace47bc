"""fp16 towers: weights and arithmetic in half precision, outputs in float32."""

import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from edgeclip.export.activation_bounds import Bounds
from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.graph import limit_masks, load_graph, save_graph
from edgeclip.export.quantizing.range_cache import cached_bounds

# Other inputs than those of calibration may go further, and sums on their way further still.
_SAFE = float(np.finfo(np.float16).max) / 4


def write_fp16(
    source: Path,
    target: Path,
    data: CalibrationData | None = None,
    *,
    islands: Collection[str] = (),
    cache: Path | None = None,
) -> None:
    """Convert an fp32 tower to fp16; what `data` shows to be too large for it stays in fp32.

    So do `islands`, nodes by name. `cache` is a folder for bounds that were found, which
    belongs to this data alone.

    The graph itself is typed, by casts at its ends, so an engine needs no flags for it.
    The L2 normalisation stays in fp32, because a sum of squares overflows in fp16;
    LayerNormalization keeps its statistics in fp32 by its own definition.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    model = load_graph(source)
    limit_masks(model)
    bounds = cached_bounds(source, data, cache=cache) if data is not None else {}
    save_graph(to_fp16(model, too_large(model, bounds) | set(islands)), target)


def to_fp16(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Convert all but the last L2 norm, what follows it and the nodes named in `keep`.

    Inputs and outputs keep their types; `model` itself may be changed. Nodes keep their
    names, but values do not.
    """
    kept = sorted({*normalisation(model.graph), *keep})
    with warnings.catch_warnings():
        # Of tiny weights, which become the smallest of fp16: that changes nothing here.
        warnings.simplefilter("ignore")
        model = convert_float_to_float16(model, keep_io_types=True, node_block_list=kept)
    _drop_repeated_casts(model.graph)
    _join_round_trips(model.graph)
    # The converter appends its casts, ONNX wants every node behind those it reads from.
    OnnxModel(model).topological_sort()
    return model


def too_large(model: onnx.ModelProto, bounds: Bounds) -> set[str]:
    """Names of the nodes that read or give what fp16 cannot safely hold.

    `bounds` has the largest absolute values of activations.
    """
    large = {name for name, bound in bounds.items() if bound > _SAFE}
    large |= {
        item.name
        for item in model.graph.initializer
        if item.data_type == TensorProto.FLOAT
        and np.abs(numpy_helper.to_array(item)).max(initial=0) > _SAFE
    }
    return {node.name for node in model.graph.node if large & {*node.input, *node.output}}


def normalisation(graph: onnx.GraphProto) -> set[str]:
    """Names of the last L2 norm's node and of all that depend on it."""
    norms = [node for node in graph.node if node.op_type == "ReduceL2"]
    if not norms:
        return set()
    names, values = {norms[-1].name}, set(norms[-1].output)
    for node in graph.node:
        if values & set(node.input):
            names.add(node.name)
            values |= set(node.output)
    return names


def _drop_repeated_casts(graph: onnx.GraphProto) -> None:
    """Keep the first of the equal casts that the converter adds for each reader of a value."""
    seen: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            graph.node.remove(node)
        seen.update(node.output)


def _join_round_trips(graph: onnx.GraphProto) -> None:
    """Where fp32 goes through fp16 to fp32 again, hand on the fp32 value.

    The converter casts behind each node that stays in fp32 and before the next one, which
    would round the norm and the embedding for nothing, and lose what overflows.
    """
    to_fp16 = {
        node.output[0]: node.input[0] for node in graph.node if _is_cast(node, TensorProto.FLOAT16)
    }
    outputs = {item.name for item in graph.output}
    # Outputs last: they give their name to the value that they are made from.
    for node in sorted(graph.node, key=lambda node: node.output[0] in outputs):
        source = to_fp16.get(node.input[0]) if _is_cast(node, TensorProto.FLOAT) else None
        if source is not None and source != graph.input[0].name:
            _rename(graph, node, source)
    read = {name for node in graph.node for name in node.input}
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] not in read | outputs:
            graph.node.remove(node)


def _rename(graph: onnx.GraphProto, cast: onnx.NodeProto, source: str) -> None:
    """Remove `cast`, whose result is `source`; a graph's output keeps its name."""
    result = cast.output[0]
    graph.node.remove(cast)
    is_output = result in {item.name for item in graph.output}
    old, new = (source, result) if is_output else (result, source)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [new if name == old else name for name in values]


def _is_cast(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == kind
