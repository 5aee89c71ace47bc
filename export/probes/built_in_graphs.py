"""Build the graphs that come with the package: the yardstick, and those of the roofline.

`python -m edgeclip.export.probes.built_in_graphs` writes them where they are kept. Weights are
computed inside a graph from a few numbers, so that files are small and nothing large crosses from
host to device; an engine folds the constants when it loads them. A yardstick that takes another
time needs another `YARDSTICK_NAME` in `benchmark_worker`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeclip.export.graph.graph_io import save_graph
from edgeclip.profiles.layers.roofline import (
    GRAPHS,
    INPUT,
    PRODUCT_SIZES,
    PRODUCTS,
    READING_SIZE,
    Form,
    product_path,
    reading_path,
)
from edgeclip.profiles.measure.benchmark_worker import TOKENS, WIDTH, YARDSTICK_GRAPH

_HEADS = 4
_HIDDEN = 4 * WIDTH
_STEP = 12.9898  # radians between two weights: far from every period
_NO_PATTERN = 1.2345678  # an angle that no size divides: values without a pattern
_SPREAD = 4  # standard deviations that int8 holds; the few beyond are clipped


class _GraphBuilder:
    """Collects nodes and constants of a graph; each node is named after its only output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node, and return its name."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, value: object, dtype: type[np.generic] = np.float32) -> str:
        """Append a constant, and return its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def model(
        self, name: str, given: onnx.ValueInfoProto, made: onnx.ValueInfoProto, opset: int, ir: int
    ) -> onnx.ModelProto:
        """Return the whole graph."""
        graph = helper.make_graph(self.nodes, name, [given], [made], self.constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir
        )


def yardstick_model() -> onnx.ModelProto:
    """Build one transformer layer, attention and MLP with norms and residuals.

    float32 [N, tokens, width] to the same. Its weights are computed inside the graph; each product
    has its own: ONNX Runtime would compute two products with equal weights only once.
    """
    layer = _GraphBuilder()
    used = 0  # weights of all products so far
    layer.constant("one", np.ones(WIDTH))
    layer.constant("zero", np.zeros(WIDTH))
    layer.constant("scale", (WIDTH // _HEADS) ** -0.5)
    layer.constant("root_half", math.sqrt(0.5))
    layer.constant("unit", 1)
    layer.constant("half", 0.5)
    layer.constant("step", _STEP)
    layer.constant("split", [0, TOKENS, _HEADS, WIDTH // _HEADS], np.int64)
    layer.constant("join", [0, TOKENS, WIDTH], np.int64)

    def product(given: str, output: str, rows: int, columns: int) -> None:
        """Multiply by weights [rows, columns], about 1 / sqrt(rows) large."""
        nonlocal used
        first, used = used, used + rows * columns
        layer.constant(f"{output}_first", first)
        layer.constant(f"{output}_end", used)
        layer.constant(f"{output}_factor", math.sqrt(2 / rows))
        layer.constant(f"{output}_shape", [rows, columns], np.int64)
        layer.add("Range", [f"{output}_first", f"{output}_end", "unit"], f"{output}_numbers")
        layer.add("Mul", [f"{output}_numbers", "step"], f"{output}_angles")
        layer.add("Sin", [f"{output}_angles"], f"{output}_sines")
        layer.add("Mul", [f"{output}_sines", f"{output}_factor"], f"{output}_flat")
        layer.add("Reshape", [f"{output}_flat", f"{output}_shape"], f"{output}_weights")
        layer.add("MatMul", [given, f"{output}_weights"], output)

    layer.add("LayerNormalization", ["values", "one", "zero"], "normed", axis=-1)
    for name in ("query", "key", "content"):
        product("normed", name, WIDTH, WIDTH)
        layer.add("Reshape", [name, "split"], f"{name}_split")
        order = [0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]
        layer.add("Transpose", [f"{name}_split"], f"{name}_heads", perm=order)
    layer.add("MatMul", ["query_heads", "key_heads"], "likeness")
    layer.add("Mul", ["likeness", "scale"], "scaled")
    layer.add("Softmax", ["scaled"], "attention", axis=-1)
    layer.add("MatMul", ["attention", "content_heads"], "attended")
    layer.add("Transpose", ["attended"], "attended_tokens", perm=[0, 2, 1, 3])
    layer.add("Reshape", ["attended_tokens", "join"], "joined")
    product("joined", "projected", WIDTH, WIDTH)
    layer.add("Add", ["values", "projected"], "middle")
    layer.add("LayerNormalization", ["middle", "one", "zero"], "middle_normed", axis=-1)
    product("middle_normed", "hidden", WIDTH, _HIDDEN)
    layer.add("Mul", ["hidden", "root_half"], "hidden_scaled")
    layer.add("Erf", ["hidden_scaled"], "erf")
    layer.add("Add", ["erf", "unit"], "erf_and_one")
    layer.add("Mul", ["hidden", "erf_and_one"], "gelu_doubled")
    layer.add("Mul", ["gelu_doubled", "half"], "gelu")
    product("gelu", "reduced", _HIDDEN, WIDTH)
    layer.add("Add", ["middle", "reduced"], "result")
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", TOKENS, WIDTH])
        for name in ("values", "result")
    )
    model = layer.model("yardstick", given, made, opset=17, ir=8)  # LayerNormalization's first
    onnx.checker.check_model(model, full_check=True)
    return model


def product_graph(form: Form, size: int) -> onnx.ModelProto:
    """Build a graph of `PRODUCTS` matrix products in a row, each [size, size] by [size, size].

    The weights are a discrete cosine transform (DCT-IV, orthogonal and its own inverse), so
    that after an even number of products everything is what it was at first: nothing grows,
    and the result tells whether it was computed.

    Args:
        form: "int8" has uint8 activations with a zero point as CPUs like it, "symmetric_int8"
            signed ones as TensorRT does, both with int8 weights.
        size: size of the matrices.
    """
    nodes = _GraphBuilder()
    grid = _grid(nodes, size)
    weights = _cosines(nodes, grid, "weights", math.pi / size, size)
    values = _cosines(nodes, grid, "values", _NO_PATTERN, size)
    last = nodes.add("Mul", [values, INPUT], "start")
    if form in ("int8", "symmetric_int8"):
        last = _int8_products(nodes, last, weights, size, signed=form == "symmetric_int8")
    elif form == "fp16":
        weights = nodes.add("Cast", [weights], "weights_fp16", to=TensorProto.FLOAT16)
        last = nodes.add("Cast", [last], "start_fp16", to=TensorProto.FLOAT16)
        last = _products(nodes, last, weights)
        last = nodes.add("Cast", [last], "last", to=TensorProto.FLOAT)
    else:
        last = _products(nodes, last, weights)
    return _largest(nodes, last)


def reading_graph(size: int) -> onnx.ModelProto:
    """Build a graph of `PRODUCTS` products of one row with weights [size, size], to read memory.

    Each weight is 1 / size, so that the row keeps its values.
    """
    nodes = _GraphBuilder()
    value = numpy_helper.from_array(np.array([1 / size], np.float32))
    shape = nodes.constant("shape", [size, size], np.int64)
    weights = nodes.add("ConstantOfShape", [shape], "weights", value=value)
    row = nodes.constant("row", [1, size], np.int64)
    return _largest(nodes, _products(nodes, nodes.add("Expand", [INPUT, row], "start"), weights))


def _largest(nodes: _GraphBuilder, last: str) -> onnx.ModelProto:
    """End the graph: from `factor` float32 [1] to the largest value of `last`, a scalar."""
    nodes.add("ReduceMax", [last], "largest", keepdims=0)
    given = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1])
    made = helper.make_tensor_value_info("largest", TensorProto.FLOAT, [])
    return nodes.model("probe", given, made, opset=18, ir=9)


def write_probe_graphs(folder: Path = GRAPHS) -> tuple[Path, ...]:
    """Write the graphs of the roofline; the same bytes every time.

    Raises:
        ExportError: a graph is not valid ONNX.
    """
    written = []
    for form, sizes in PRODUCT_SIZES.items():
        for size in sizes:
            save_graph(product_graph(form, size), product_path(form, size, folder))
            written.append(product_path(form, size, folder))
    save_graph(reading_graph(READING_SIZE), reading_path(folder))
    return (*written, reading_path(folder))


def _grid(nodes: _GraphBuilder, size: int) -> str:
    """Add the matrix (i + 1/2) (j + 1/2), [size, size]."""
    ends = [nodes.constant(name, value) for name, value in (("first", 0.5), ("end", size))]
    numbers = nodes.add("Range", [*ends, nodes.constant("step", 1)], "numbers")
    column = nodes.constant("column", [-1, 1], np.int64)
    rows = nodes.add("Reshape", [numbers, column], "rows")
    return nodes.add("Mul", [rows, numbers], "grid")


def _cosines(nodes: _GraphBuilder, grid: str, name: str, angle: float, size: int) -> str:
    """Add sqrt(2 / size) cos(angle * grid), with rows of length about 1."""
    turned = nodes.add("Mul", [grid, nodes.constant(f"{name}_angle", angle)], f"{name}_turned")
    cosine = nodes.add("Cos", [turned], f"{name}_cosine")
    scale = nodes.constant(f"{name}_scale", math.sqrt(2 / size))
    return nodes.add("Mul", [cosine, scale], name)


def _products(nodes: _GraphBuilder, last: str, weights: str) -> str:
    for number in range(PRODUCTS):
        last = nodes.add("MatMul", [last, weights], f"product_{number}")
    return last


def _int8_products(
    nodes: _GraphBuilder, last: str, weights: str, size: int, *, signed: bool
) -> str:
    """Add products with Q/DQ around each, as a quantized bundle has them."""
    scale = nodes.constant("weight_scale", math.sqrt(2 / size) / 127)
    zero = nodes.constant("weight_zero", 0, np.int8)
    steps = nodes.add("Round", [nodes.add("Div", [weights, scale], "steps")], "whole_steps")
    kept = nodes.add("Cast", [steps], "weights_int8", to=TensorProto.INT8)
    read = nodes.add("DequantizeLinear", [kept, scale, zero], "weights_read")
    grid = [
        nodes.constant("scale", _SPREAD / math.sqrt(size) / 127),
        nodes.constant("zero", 0 if signed else 128, np.int8 if signed else np.uint8),
    ]
    for number in range(PRODUCTS + 1):
        rounded = nodes.add("QuantizeLinear", [last, *grid], f"int8_{number}")
        last = nodes.add("DequantizeLinear", [rounded, *grid], f"read_{number}")
        if number < PRODUCTS:
            last = nodes.add("MatMul", [last, read], f"product_{number}")
    return last


def main(arguments: list[str] | None = None) -> int:
    """Write all graphs and print where."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeclip.export.probes.built_in_graphs", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="folder (default: where the package keeps them)")
    folder = parser.parse_args(arguments).out
    yardstick = YARDSTICK_GRAPH if folder is None else folder / YARDSTICK_GRAPH.name
    written = (*write_probe_graphs(folder or GRAPHS), yardstick)
    yardstick.write_bytes(yardstick_model().SerializeToString(deterministic=True))
    print(
        f"{len(written)} graphs written to {' and '.join({str(path.parent) for path in written})}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
