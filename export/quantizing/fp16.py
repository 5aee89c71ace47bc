"""Convert towers to fp16 with fp32 inputs and outputs, and emulate fp16 graphs on a CPU."""

import contextlib
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import (
    limit_masks,
    load_graph,
    note_types,
    save_graph,
    write_unchecked,
)
from edgeclip.export.quantizing.activation_ranges import Bounds, cached_bounds
from edgeclip.runtime.device.device_profile import DeviceProfile

# Other inputs than those of calibration have larger values, and partial sums larger ones still.
_SAFE = float(np.finfo(np.float16).max) / 4


def write_fp16(
    source: Path,
    target: Path,
    data: CalibrationData | None = None,
    *,
    islands: Collection[str] = (),
    cache: Path | None = None,
) -> None:
    """Convert an fp32 tower to fp16, except nodes beyond the range of fp16 and the `islands`.

    `data` shows the range of each activation. `islands` are names of nodes. `cache` is a folder
    for ranges, used with this data only.

    The graph is strongly typed, with casts at its ends, so an engine needs no precision flags.
    The L2 normalisation stays in fp32, because a sum of squares overflows in fp16;
    LayerNormalization keeps its statistics in fp32 by its own definition.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    model = load_graph(source)
    limit_masks(model)
    bounds = cached_bounds(source, data, cache=cache) if data is not None else {}
    save_graph(to_fp16(model, nodes_beyond_fp16(model, bounds) | set(islands)), target)


def to_fp16(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Convert a graph to fp16, except the final L2 norm, what follows it and the nodes in `keep`.

    Inputs and outputs keep their types; `model` itself may be changed. Nodes keep their
    names, values do not.
    """
    kept = sorted({*final_norm_nodes(model.graph), *keep})
    note_types(model)  # the converter casts what it knows to be float
    with warnings.catch_warnings():
        # About tiny weights, which become the smallest fp16 number: harmless here.
        warnings.simplefilter("ignore")
        model = convert_float_to_float16(model, keep_io_types=True, node_block_list=kept)
    del model.graph.value_info[:]
    _drop_repeated_casts(model.graph)
    _join_round_trips(model.graph)
    # The converter appends its casts, ONNX wants every node behind those it reads from.
    OnnxModel(model).topological_sort()
    return model


def nodes_beyond_fp16(model: onnx.ModelProto, bounds: Bounds) -> set[str]:
    """Return the names of the nodes whose inputs or outputs fp16 cannot safely hold.

    `bounds` has the largest absolute value of each activation.
    """
    large = {name for name, bound in bounds.items() if bound > _SAFE}
    large |= {
        item.name
        for item in model.graph.initializer
        if item.data_type == TensorProto.FLOAT
        and np.abs(numpy_helper.to_array(item)).max(initial=0) > _SAFE
    }
    return {node.name for node in model.graph.node if large & {*node.input, *node.output}}


def final_norm_nodes(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the final L2 norm's node and of all nodes that depend on it."""
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
    """Remove all but the first of the equal casts that the converter adds for each reader."""
    seen: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            graph.node.remove(node)
        seen.update(node.output)


def _join_round_trips(graph: onnx.GraphProto) -> None:
    """Remove casts from fp32 to fp16 and back, so that readers get the fp32 value.

    The converter adds them between nodes that stay in fp32. They would round the norm and the
    embedding for nothing, and lose what overflows.
    """
    to_fp16 = {
        node.output[0]: node.input[0] for node in graph.node if _is_cast(node, TensorProto.FLOAT16)
    }
    outputs = {item.name for item in graph.output}
    # Graph outputs last: they give their name to the value that they are cast from.
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


# Operators whose outputs are values of their inputs, so that nothing is rounded again.
_MOVES = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
        *("Max", "Min", "Pad", "Relu", "Reshape", "ScatterND", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze", "Where"),
    }
)
_CONSTANTS = ("Constant", "ConstantOfShape")


def emulate_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an fp32 graph that rounds every value as a native fp16 engine would.

    The weights must be in memory, as `load_graph` gives them. Nodes and values keep their
    names; fp16 inputs and outputs become fp32.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    halves = fp16_values(made)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for item in (*graph.input, *graph.output):
        if item.type.tensor_type.elem_type == TensorProto.FLOAT16:
            item.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type in _CONSTANTS:
            for attribute in node.attribute:
                _widen_tensor(attribute.t)
        elif node.op_type not in _MOVES:
            for place, name in enumerate(node.output):
                if name in halves:
                    nodes += _rounded(node, place)
    del graph.node[:]
    graph.node.extend(nodes)
    return made


@contextlib.contextmanager
def emulated_fp16(
    graphs: Sequence[TowerGraph], device: DeviceProfile
) -> Iterator[tuple[TowerGraph, ...]]:
    """Replace fp16 graphs by their emulation, so that a CPU can judge them; order is kept.

    Graphs in fp32, without fp16 values, or for a CPU stay as they are. The files of the others,
    made by `emulate_fp16`, are deleted when the block ends.

    Raises:
        ExportError: a graph cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        shown = []
        for place, graph in enumerate(graphs):
            path = graph.path
            if device.on_cpu or graph.precision == "fp32":
                shown.append(graph)
                continue
            model = load_graph(path)
            if fp16_values(model):
                path = Path(folder) / str(place) / path.name
                path.parent.mkdir()
                write_unchecked(emulate_fp16(model), path)
            shown.append(replace(graph, path=path))
        yield tuple(shown)


def fp16_values(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of a graph's fp16 values; no shapes are needed."""
    graph = model.graph
    versions = {item.domain: item.version for item in model.opset_import}
    halves = {item.name for item in graph.initializer if item.data_type == TensorProto.FLOAT16}
    halves |= {
        item.name for item in graph.input if item.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    for node in graph.node:
        # An output that is left out, as of SkipLayerNormalization, has no name.
        halves.update(filter(None, _half_outputs(node, halves, versions)))
    return frozenset(halves)


def _half_outputs(node: onnx.NodeProto, halves: set[str], versions: dict[str, int]) -> list[str]:
    settings = {item.name: item for item in node.attribute}
    if node.op_type == "Cast":
        return list(node.output) if settings["to"].i == TensorProto.FLOAT16 else []
    if node.op_type in _CONSTANTS:
        value = settings.get("value", AttributeProto()).t
        return list(node.output) if value.data_type == TensorProto.FLOAT16 else []
    if node.domain not in ("", "ai.onnx"):
        return list(node.output) if halves & set(node.input) else []
    schema = onnx.defs.get_schema(node.op_type, versions[""], "")
    # Letters of the operator's types, such as T, that stand for fp16 here.
    letters = {
        schema.inputs[min(place, len(schema.inputs) - 1)].type_str
        for place, name in enumerate(node.input)
        if name in halves
    }
    return [
        name
        for place, name in enumerate(node.output)
        if schema.outputs[min(place, len(schema.outputs) - 1)].type_str in letters
    ]


def _rounded(node: onnx.NodeProto, place: int) -> list[onnx.NodeProto]:
    """Rename a node's output, and return the casts that give its fp16 rounding the old name."""
    name = node.output[place]
    if node.op_type == "Cast":
        half = node.output[place] = f"{name}_half"
        return [helper.make_node("Cast", [half], [name], f"{name}_wide", to=TensorProto.FLOAT)]
    exact, half = f"{name}_exact", f"{name}_half"
    node.output[place] = exact
    return [
        helper.make_node("Cast", [exact], [half], f"{name}_round", to=TensorProto.FLOAT16),
        helper.make_node("Cast", [half], [name], f"{name}_wide", to=TensorProto.FLOAT),
    ]


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values.astype("float32"), tensor.name))
