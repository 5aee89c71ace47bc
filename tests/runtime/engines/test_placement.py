from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper

from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine, placement_entries
from edgeclip.runtime.errors import EngineError

AZURE = "AzureExecutionProvider"  # in the usual builds, and takes no node of such graphs
pytestmark = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason=f"this onnxruntime has no {AZURE}"
)


def write_graph(path: Path, nodes: list[NodeProto]) -> Path:
    """A graph of x float32 [n, 2] to int64 or float32 `y`."""
    kind = TensorProto.FLOAT if nodes[-1].op_type == "Mul" else TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def test_arithmetic_on_shapes_may_run_on_the_cpu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Concat", ["shape", "shape"], ["y"], name="twice", axis=0),
    ]
    path = write_graph(tmp_path / "shapes.onnx", nodes)
    engine = OrtEngine(path, providers=(AZURE,), threads=1)
    found = engine.run({"x": np.zeros((3, 2), np.float32)})["y"]
    np.testing.assert_array_equal(found, [3, 2, 3, 2])


def test_the_error_names_what_computes_and_nothing_else(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"], name="same"),
        helper.make_node("Unsqueeze", ["same", "axis"], ["more"], name="unsqueeze"),
        helper.make_node("Mul", ["more", "more"], ["y"], name="square"),
    ]
    nodes.insert(0, helper.make_node("Constant", [], ["axis"], value_ints=[0], name="axis"))
    path = write_graph(tmp_path / "mixed.onnx", nodes)
    with pytest.raises(EngineError, match=r"leaves 1 of the \d nodes .*provider: square \(Mul\): "):
        OrtEngine(path, providers=(AZURE,), threads=1)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    names = ["x", *(f"v{count}" for count in range(6)), "y"]
    nodes = [
        helper.make_node("Mul", [given, "x"], [made], name=f"times{count}")
        for count, (given, made) in enumerate(pairwise(names))
    ]
    path = write_graph(tmp_path / "long.onnx", nodes)
    with pytest.raises(EngineError, match=r"leaves 7 of the 7 nodes") as raised:
        OrtEngine(path, providers=(AZURE,), threads=1)
    assert str(raised.value).count("(Mul)") == 5
    assert "(Mul), ...:" in str(raised.value)


def test_entry_suits_this_onnxruntime() -> None:
    (key,) = placement_entries(onnxruntime)
    told = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
    assert (
        key == f"session.{'record_ep_graph_assignment_info' if told else 'disable_cpu_ep_fallback'}"
    )
