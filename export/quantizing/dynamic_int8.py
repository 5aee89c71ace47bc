"""Dynamic int8: activations get their range in every call, over the whole batch.

That needs no calibration, and is offered for it. It is never a default: the scale of an
activation follows from the largest value in the batch, so an embedding depends on what else is
in its batch. The same picture can then be nearest to another text when it is embedded with
others, and an index built in batches does not hold what single queries give.

Only products with constant weights are quantized, with a scale for each output channel.
`quantize_dynamic` by itself takes the token table too, with one scale for all of it, and one
for each weight: then one token or channel of large values costs all others their digits.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from edgeclip.export.activation_bounds import quiet
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import data_path, load_graph, save_graph, write_typed
from edgeclip.export.quantize import quantizable_nodes
from edgeclip.export.quantizing.int8_tables import store_tables

_OPERATORS = ("MatMul", "Gemm")


def write_dynamic_int8(
    source: Path,
    target: Path,
    *,
    reduce_range: bool,
    kept: Collection[str] = (),
    int8_tables: bool = False,
) -> None:
    """Quantize the weights of a tower's products, and let each call range what they read.

    Args:
        source, target: the ONNX files.
        reduce_range: weights take 7 bits, because 8-bit products can saturate on a CPU
            without int8 dot products.
        kept: names of nodes that stay in float.
        int8_tables: store token tables in int8 too, with a scale for each row.

    Raises:
        ExportError: nothing in the graph can be quantized, or the result is not valid ONNX.
    """
    nodes = _products(source, kept)
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
        store_tables(model, kept)
    save_graph(model, target)


def _products(source: Path, kept: Collection[str]) -> list[str]:
    """Names of what is quantized: onnxruntime first turns a Gemm into a MatMul of another name."""
    able = set(quantizable_nodes(source)) - set(kept)
    names = {"MatMul": "{}", "Gemm": "{}_MatMul"}
    return [
        names[node.op_type].format(node.name)
        for node in onnx.load(source, load_external_data=False).graph.node
        if node.name in able and node.op_type in _OPERATORS
    ]
