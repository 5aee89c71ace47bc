from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.profiles.measure.open_subject import data_files
from edgeclip.runtime.errors import InputError


def model_with_branches() -> onnx.ModelProto:
    """A graph with one constant of its own, and one in each branch of an `If`."""
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    branches = {}
    for name in ("then_branch", "else_branch"):
        constant = numpy_helper.from_array(np.ones(4, np.float32), f"{name}_c")
        node = helper.make_node("Identity", [f"{name}_c"], [f"{name}_o"])
        value = helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, [4])
        branches[name] = helper.make_graph([node], name, [], [value], [constant])
    nodes = [
        helper.make_node("If", ["condition"], ["chosen"], **branches),
        helper.make_node("Add", ["chosen", "own"], ["out"]),
    ]
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [1])
    own = numpy_helper.from_array(np.arange(4, dtype=np.float32), "own")
    return helper.make_model(helper.make_graph(nodes, "g", [condition], [out], [own]))


def keep_outside(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)


def test_finds_each_file_once_wherever_it_is_named(tmp_path: Path) -> None:
    model, path = model_with_branches(), tmp_path / "m.onnx"
    onnx.save(model, path)
    assert data_files(path) == ()
    keep_outside(model.graph.initializer[0], "m.onnx_data")
    for attribute, location in zip(
        model.graph.node[0].attribute, ("m.onnx_data", "more/branch.bin"), strict=True
    ):
        keep_outside(attribute.g.initializer[0], location)
    path.write_bytes(model.SerializeToString())
    assert data_files(path) == (tmp_path / "m.onnx_data", tmp_path / "more" / "branch.bin")


def test_agrees_with_the_package_onnx(tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_bundle / "onnx" / "text_model.onnx")
    path = tmp_path / "text.onnx"
    onnx.save(
        model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert {file.name for file in data_files(path)} == {
        file.name for file in tmp_path.iterdir() if file != path
    }


def test_refuses_what_is_no_graph(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.onnx", model_with_branches().SerializeToString()
    for content in (whole[: len(whole) // 2], b"\xff" * 40, b"\x0b\x0c", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"m\.onnx"):
            data_files(path)
    with pytest.raises(InputError, match="cannot read"):
        data_files(tmp_path / "none.onnx")
