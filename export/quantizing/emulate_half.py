"""What an fp16 graph gives where every fp16 value is really stored in fp16.

ONNX Runtime's CPU provider has few fp16 kernels. It computes the other nodes in fp32 and does
not round between them, so on a CPU an overflow or a lost digit does not show that will on a
GPU. Here each value is rounded by casts of its own, which no engine may leave out. Sums inside
a node stay in fp32, as LayerNormalization is defined and as tensor cores add products up; an
engine that adds up in fp16 loses more.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from edgeclip.export.graph import load_graph, write_unchecked
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.profiles.device import DeviceProfile

# Give values that they were given.
_MOVES = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
        *("Max", "Min", "Pad", "Relu", "Reshape", "ScatterND", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze", "Where"),
    }
)
_CONSTANTS = ("Constant", "ConstantOfShape")


def emulate_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in fp32 that gives what a typed fp16 graph gives where fp16 is native.

    The weights must be in memory, as `load_graph` gives them. Nodes and values keep their
    names; inputs and outputs that are fp16 become fp32.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    halves = half_values(made)
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
def stored_in_half(
    graphs: Sequence[TowerGraph], device: DeviceProfile
) -> Iterator[tuple[TowerGraph, ...]]:
    """Give towers to judge on a CPU in place of those that a device will run, in the same order.

    Those in fp32, without fp16, or for a CPU are given as they are, of the others graphs made by
    `emulate_half`, which are gone when the block ends.

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
            if half_values(model):
                path = Path(folder) / str(place) / path.name
                path.parent.mkdir()
                write_unchecked(emulate_half(model), path)
            shown.append(replace(graph, path=path))
        yield tuple(shown)


def half_values(model: onnx.ModelProto) -> frozenset[str]:
    """Names of a graph's values that are fp16, found without the shapes of any."""
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
    """Make a node's output exact under another name; return what rounds it."""
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
