from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph import limit_masks, save_graph


def model_with(value: float, *, kind: str = "Add") -> onnx.ModelProto:
    node = helper.make_node(kind, ["x", "constant"], ["y"], name="only", doc_string="a note")
    constant = numpy_helper.from_array(np.array([value, -5.0], np.float32), "constant")
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [constant],
        value_info=[helper.make_tensor_value_info("stale", TensorProto.FLOAT, [9])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("value", [-np.inf, float(np.finfo(np.float32).min), -70000.0])
def test_masks_beyond_fp16_are_limited(value: float) -> None:
    model = model_with(value)
    limit_masks(model)
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == [-1e4, -5.0]
    assert model.graph.initializer[0].name == "constant"


def test_masks_in_attributes_are_limited_too() -> None:
    model = model_with(0.0)
    fill = numpy_helper.from_array(np.array([-3e38], np.float32))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["x"], ["z"], value=fill))
    limit_masks(model)
    assert numpy_helper.to_array(model.graph.node[1].attribute[0].t).tolist() == [-1e4]


@pytest.mark.parametrize("value", [-60000.0, 3e38, float("inf")])
def test_other_constants_are_let_be(value: float) -> None:
    model = model_with(value)
    before = model.SerializeToString()
    limit_masks(model)
    assert model.SerializeToString() == before


def test_notes_and_stale_shapes_are_dropped(tmp_path: Path) -> None:
    save_graph(model_with(1.0), tmp_path / "deep" / "graph.onnx")
    model = onnx.load(tmp_path / "deep" / "graph.onnx")
    assert not model.graph.value_info
    assert not model.graph.node[0].doc_string


def test_an_invalid_graph_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a valid ONNX graph"):
        save_graph(model_with(1.0, kind="NoSuchOperator"), tmp_path / "graph.onnx")
    assert not (tmp_path / "graph.onnx").exists()
