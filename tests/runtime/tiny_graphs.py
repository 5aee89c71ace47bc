"""Tiny ONNX graphs that TensorRT can build, and keys of engines."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.engine_records import EngineKey, GraphSource

TOKENS = 24


def graph_bytes(
    nodes: list[Any],
    given: tuple[str, int, list[Any]],
    output: str,
    constants: dict[str, NDArray[Any]],
) -> bytes:
    """A checked ONNX graph with one input (name, type, shape) and one float output [n, 4]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        output,
        [helper.make_tensor_value_info(*given)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [given[2][0], 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def image_content(batch: int | str = "n", *, zero_point: int | None = None) -> bytes:
    """Mean colour of uint8 [batch, 8, 8, 3], then a matrix product; Q/DQ before it if asked."""
    from onnx import TensorProto, helper

    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    constants = {"axes": np.array([1, 2]), "weights": weights}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], "mean colour", keepdims=0),
    ]
    last = "mean"
    if zero_point is not None:
        constants["scale"] = np.array(2, np.float32)
        constants["zero_point"] = np.array(zero_point, np.int8)
        names = ["scale", "zero_point"]
        nodes += [
            helper.make_node("QuantizeLinear", ["mean", *names], ["quantized"], "quantize"),
            helper.make_node("DequantizeLinear", ["quantized", *names], ["rounded"], "dequantize"),
        ]
        last = "rounded"
    nodes.append(helper.make_node("MatMul", [last, "weights"], ["image_embeds"]))
    given = ("pixels", TensorProto.UINT8, [batch, 8, 8, 3])
    return graph_bytes(nodes, given, "image_embeds", constants)


def text_content() -> bytes:
    """The sum of token vectors of int64 [n, length]."""
    from onnx import TensorProto, helper

    table = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "axis"], ["text_embeds"], keepdims=0),
    ]
    given = ("input_ids", TensorProto.INT64, ["n", "length"])
    return graph_bytes(nodes, given, "text_embeds", {"table": table, "axis": np.array([1])})


def source_of(name: str, content: bytes, text_length: int | None = None) -> GraphSource:
    sha256 = hashlib.sha256(content).hexdigest()
    return GraphSource(name=name, content=content, sha256=sha256, text_length=text_length)


def a_key(**changes: Any) -> EngineKey:
    """A key of an engine for an Orin Nano, with changes."""
    fields: dict[str, Any] = {
        "library": "tensorrt",
        "version": "10.3.0",
        "capability": "8.7",
        "graph_sha256": "a" * 64,
        "batch_min": 1,
        "batch_best": 4,
        "batch_max": 32,
        "text_length": None,
        "hardware_portability": "none",
        "version_portability": False,
        "sparse_weights": True,
        "workspace_mb": 2000,
    }
    return EngineKey(**(fields | changes))
