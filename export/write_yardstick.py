"""Write the yardstick: one layer of a transformer whose weights the file only describes.

Every weight is the sine of its number, which ONNX Runtime computes once, while it loads the
graph. So the file has some kilobytes, and the loaded graph the megabytes of a real layer.

    python -m edgeclip.export.write_yardstick runtime/measuring/graphs/yardstick.onnx

A graph that takes another time needs another `NAME` in `runtime/measuring/yardstick.py`.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.runtime.measuring.yardstick import TOKENS, WIDTH

_HEADS = 4
_HIDDEN = 4 * WIDTH
_STEP = 12.9898  # radians between two weights: far from every period
_OPSET, _IR_VERSION = 17, 8  # LayerNormalization begins there


def yardstick_model() -> onnx.ModelProto:
    """Attention and a two-layer perceptron, both with norm and residual: [N, tokens, width]."""
    layer = _Layer()
    layer.add("LayerNormalization", ["values", "one", "zero"], "normed", axis=-1)
    for name in ("query", "key", "content"):
        layer.product("normed", name, WIDTH, WIDTH)
        layer.add("Reshape", [name, "split"], f"{name}_split")
        order = [0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]
        layer.add("Transpose", [f"{name}_split"], f"{name}_heads", perm=order)
    layer.add("MatMul", ["query_heads", "key_heads"], "likeness")
    layer.add("Mul", ["likeness", "scale"], "scaled")
    layer.add("Softmax", ["scaled"], "attention", axis=-1)
    layer.add("MatMul", ["attention", "content_heads"], "attended")
    layer.add("Transpose", ["attended"], "attended_tokens", perm=[0, 2, 1, 3])
    layer.add("Reshape", ["attended_tokens", "join"], "joined")
    layer.product("joined", "projected", WIDTH, WIDTH)
    layer.add("Add", ["values", "projected"], "middle")
    layer.add("LayerNormalization", ["middle", "one", "zero"], "middle_normed", axis=-1)
    layer.product("middle_normed", "hidden", WIDTH, _HIDDEN)
    layer.add("Mul", ["hidden", "root_half"], "hidden_scaled")
    layer.add("Erf", ["hidden_scaled"], "erf")
    layer.add("Add", ["erf", "unit"], "erf_and_one")
    layer.add("Mul", ["hidden", "erf_and_one"], "gelu_doubled")
    layer.add("Mul", ["gelu_doubled", "half"], "gelu")
    layer.product("gelu", "reduced", _HIDDEN, WIDTH)
    layer.add("Add", ["middle", "reduced"], "result")
    return layer.model()


def main(arguments: list[str] | None = None) -> int:
    """Write the file whose path is the only argument."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    Path(path).write_bytes(yardstick_model().SerializeToString(deterministic=True))
    return 0


class _Layer:
    """Nodes and constants in the order in which they were asked for."""

    def __init__(self) -> None:
        self._weights = 0  # of all products so far
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._constant("one", np.ones(WIDTH, np.float32))
        self._constant("zero", np.zeros(WIDTH, np.float32))
        for name, number in {
            "scale": (WIDTH // _HEADS) ** -0.5,
            "root_half": math.sqrt(0.5),
            "unit": 1,
            "half": 0.5,
            "step": _STEP,
        }.items():
            self._constant(name, np.array(number, np.float32))
        self._constant("split", np.array([0, TOKENS, _HEADS, WIDTH // _HEADS]))
        self._constant("join", np.array([0, TOKENS, WIDTH]))

    def add(self, op: str, inputs: list[str], output: str, **settings: Any) -> None:
        """Append a node of one output, which names it."""
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **settings))

    def product(self, given: str, output: str, rows: int, columns: int) -> None:
        """Multiply by weights [rows, columns] of their own, about 1/sqrt(rows) large.

        Were they those of another product, ONNX Runtime would compute both only once.
        """
        first, self._weights = self._weights, self._weights + rows * columns
        for name, number in {
            "first": first,
            "end": self._weights,
            "factor": math.sqrt(2 / rows),
        }.items():
            self._constant(f"{output}_{name}", np.array(number, np.float32))
        self._constant(f"{output}_shape", np.array([rows, columns]))
        self.add("Range", [f"{output}_first", f"{output}_end", "unit"], f"{output}_numbers")
        self.add("Mul", [f"{output}_numbers", "step"], f"{output}_angles")
        self.add("Sin", [f"{output}_angles"], f"{output}_sines")
        self.add("Mul", [f"{output}_sines", f"{output}_factor"], f"{output}_flat")
        self.add("Reshape", [f"{output}_flat", f"{output}_shape"], f"{output}_weights")
        self.add("MatMul", [given, f"{output}_weights"], output)

    def model(self) -> onnx.ModelProto:
        """The whole graph, checked."""
        shape: list[str | int | None] = ["N", TOKENS, WIDTH]
        graph = helper.make_graph(
            self._nodes,
            "yardstick",
            [helper.make_tensor_value_info("values", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("result", TensorProto.FLOAT, shape)],
            self._constants,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        self._constants.append(numpy_helper.from_array(value, name))


if __name__ == "__main__":
    sys.exit(main())
