"""fp16 towers: weights and arithmetic in half precision, inputs and outputs in float32."""

from pathlib import Path

import onnx
from onnx import TensorProto
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from edgeclip.export.graph import limit_masks, save_graph


def write_fp16(source: Path, target: Path) -> None:
    """Convert an fp32 tower to fp16.

    The graph itself is typed, by casts at its ends, so an engine needs no flags for it.
    The L2 normalisation stays in fp32, because a sum of squares overflows in fp16;
    LayerNormalization keeps its statistics in fp32 by its own definition.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    model = onnx.load(source)
    limit_masks(model)
    model = convert_float_to_float16(
        model, keep_io_types=True, node_block_list=sorted(_normalisation(model.graph))
    )
    _drop_repeated_casts(model.graph)
    _join_round_trips(model.graph)
    # The converter appends its casts, ONNX wants every node behind those it reads from.
    OnnxModel(model).topological_sort()
    save_graph(model, target)


def _normalisation(graph: onnx.GraphProto) -> set[str]:
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
    would round the norm and the embedding for nothing.
    """
    to_fp16 = {
        node.output[0]: node.input[0] for node in graph.node if _is_cast(node, TensorProto.FLOAT16)
    }
    for node in list(graph.node):
        source = to_fp16.get(node.input[0]) if _is_cast(node, TensorProto.FLOAT) else None
        if source is not None and source != graph.input[0].name:
            _rename(graph, node, source)
    read = {name for node in graph.node for name in node.input}
    read |= {item.name for item in graph.output}
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] not in read:
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
