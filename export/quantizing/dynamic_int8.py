"""Quantize towers to dynamic int8 (activation ranges per call), and token tables to int8."""

import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_io import data_path, load_graph, save_graph, write_typed
from edgeclip.export.graph.graph_values import attribute
from edgeclip.export.quantizing.activation_ranges import quiet
from edgeclip.export.quantizing.static_int8 import quantizable_nodes

_LARGEST = 127
# Operators that a token id may pass through before it is looked up.
_SAME_IDS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def token_table_lookups(model: onnx.ModelProto) -> list[str]:
    """Return the names of the Gathers that look up token ids in a table [tokens, width]."""
    graph = model.graph
    tables = {
        item.name
        for item in graph.initializer
        if item.data_type == TensorProto.FLOAT and len(item.dims) == 2
    }
    ids = {item.name for item in graph.input}
    found = []
    for node in graph.node:
        if node.op_type in _SAME_IDS and node.input[0] in ids:
            ids.update(node.output)
        elif (
            node.op_type == "Gather"
            and node.input[0] in tables
            and node.input[1] in ids
            and attribute(node, "axis", 0) == 0
        ):
            found.append(node.name)
    return found


def quantize_token_tables(model: onnx.ModelProto, kept: Collection[str] = ()) -> int:
    """Store the token tables in int8 with a scale for each row, in place; return how many.

    `kept` names look-ups whose table stays in float. A table that another node reads too stays
    beside its int8 copy. The weights must be in memory, as `load_graph` gives them.
    """
    graph = model.graph
    chosen = set(token_table_lookups(model)) - set(kept)
    tables = {item.name: item for item in graph.initializer}
    constants: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        name = node.input[0]
        whole, scales = quantize_rows(numpy_helper.to_array(tables[name]))
        for suffix, values in (("int8", whole), ("scale", scales)):
            made = numpy_helper.from_array(values, f"{name}_{suffix}")
            constants[made.name] = made
        nodes += _lookup(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
    read = {name for node in graph.node for name in node.input}
    for item in tables.values():
        if item.name not in read:
            graph.initializer.remove(item)
    return len(chosen)


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a table [tokens, width] to int8; return it with the scale of each row [tokens, 1]."""
    scales = (np.abs(table).max(axis=1, keepdims=True) / _LARGEST).astype(np.float32)
    scales[scales == 0] = 1
    whole = np.clip(np.rint(table / scales), -_LARGEST, _LARGEST)
    return whole.astype(np.int8), scales


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the nodes that look up the int8 table; the first keeps the Gather's name."""
    (table, ids), result = node.input, node.output[0]
    make = helper.make_node
    return [
        make("Gather", [f"{table}_int8", ids], [f"{result}_int8"], node.name),
        make("Gather", [f"{table}_scale", ids], [f"{result}_scale"], f"{node.name}_scale"),
        make(
            "Cast",
            [f"{result}_int8"],
            [f"{result}_steps"],
            f"{node.name}_cast",
            to=TensorProto.FLOAT,
        ),
        make("Mul", [f"{result}_steps", f"{result}_scale"], [result], f"{node.name}_mul"),
    ]


def write_dynamic_int8(
    source: Path,
    target: Path,
    *,
    reduce_range: bool,
    kept: Collection[str] = (),
    int8_tables: bool = False,
) -> None:
    """Quantize a tower's weights; activations are quantized by their range in each call.

    Args:
        source, target: the ONNX files.
        reduce_range: weights take 7 bits, because 8-bit products can saturate on a CPU
            without int8 dot products.
        kept: names of nodes that stay in float.
        int8_tables: store token tables in int8 too, with a scale for each row.

    Raises:
        ExportError: nothing in the graph can be quantized, or the result is not valid ONNX.
    """
    able = set(quantizable_nodes(source)) - set(kept)
    # onnxruntime first turns a Gemm into a MatMul of another name.
    names = {"MatMul": "{}", "Gemm": "{}_MatMul"}
    nodes = [
        names[node.op_type].format(node.name)
        for node in onnx.load(source, load_external_data=False).graph.node
        if node.name in able and node.op_type in names
    ]
    if not nodes:
        raise ExportError(f"{source.name} has no MatMul or Gemm that could be quantized")
    with tempfile.TemporaryDirectory() as folder, quiet():
        raw = Path(folder) / "int8.onnx"
        typed = write_typed(source, raw.with_name("typed.onnx"))
        quantize_dynamic(
            typed,
            raw,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            use_external_data_format=data_path(typed).exists(),
        )
        model = load_graph(raw)
    if int8_tables:
        quantize_token_tables(model, kept)
    save_graph(model, target)
