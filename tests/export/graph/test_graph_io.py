from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_io import (
    clean_graph,
    data_path,
    limit_masks,
    load_graph,
    save_graph,
)
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from tests.export.quantizing.small_graphs import graph_of


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


def wide_model(lowest: float = -1.0) -> onnx.ModelProto:
    """Two products, each with weights of more than one kibibyte, and a small constant."""
    draw = np.random.default_rng(0)
    weights = [draw.normal(size=(40, 40)).astype(np.float32) for _ in range(2)]
    weights[0][0, 0] = lowest
    nodes = [
        helper.make_node("MatMul", ["x", "c0"], ["p"]),
        helper.make_node("MatMul", ["p", "c1"], ["q"]),
        helper.make_node("Add", ["q", "c2"], ["y"]),
    ]
    constants = {"c0": weights[0], "c1": weights[1], "c2": np.array(3.0)}
    return graph_of(nodes, constants, given=[None, 40], outputs={"y": [None, 40]})


def cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    clean_graph(model)
    return model


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


def test_a_large_graph_has_its_weights_in_a_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    save_graph(wide_model(), path, limit=0)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["tower.onnx", "tower.onnx_data"]
    assert path.stat().st_size < 1000
    assert load_graph(path) == cleaned(wide_model())


def test_onnx_runtime_reads_the_weights_from_there(
    tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    values = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    results = []
    for name, limit in (("one", 10**9), ("two", 0)):
        save_graph(wide_model(), tmp_path / name, limit=limit)
        engine = open_engine(tmp_path / name, device=cpu_device)
        results.append(engine.run({"x": values})["y"])
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("limit", [0, 10**9])
def test_the_same_graph_gives_the_same_bytes(tmp_path: Path, limit: int) -> None:
    for folder in ("a", "b"):
        save_graph(wide_model(), tmp_path / folder / "tower.onnx", limit=limit)
    names = sorted(item.name for item in (tmp_path / "a").iterdir())
    assert len(names) == (2 if limit == 0 else 1)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_data_file_goes_when_the_graph_has_shrunk(tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    save_graph(wide_model(), path, limit=0)
    save_graph(load_graph(path), path)
    assert [item.name for item in tmp_path.iterdir()] == ["tower.onnx"]
    save_graph(wide_model(), tmp_path / "never_large.onnx")
    assert path.read_bytes() == (tmp_path / "never_large.onnx").read_bytes()


def test_a_large_graph_can_be_cleaned_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    save_graph(wide_model(lowest=-3e38), path, limit=0)
    model = load_graph(path)
    limit_masks(model)
    save_graph(model, path, limit=0)
    assert numpy_helper.to_array(load_graph(path).graph.initializer[0]).min() == -1e4


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_refused_graph_leaves_the_old_files_alone(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "tower.onnx"
    save_graph(wide_model(), path, limit=0)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    bad = wide_model()
    bad.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"tower\.onnx is not a valid ONNX graph"):
        save_graph(bad, path, limit=limit)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


@pytest.mark.parametrize("location", ["../w", "/etc/hostname", "sub/w", "a\\b", "", "."])
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    path = tmp_path / "sub" / "tower.onnx"
    save_graph(wide_model(), path, limit=0)
    for place in (tmp_path / "w", tmp_path / "sub" / "sub" / "w"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"\0" * 10000)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"beside it|cannot read the weights"):
        load_graph(path)


def test_a_link_to_weights_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "tower.onnx"
    save_graph(wide_model(), path, limit=0)
    data_path(path).rename(tmp_path / "w")
    data_path(path).symlink_to(tmp_path / "w")
    with pytest.raises(ExportError, match="cannot read the weights"):
        load_graph(path)


@pytest.mark.parametrize("kept", [None, 0, 6399])
def test_missing_or_short_weights_are_an_error_that_names_the_file(
    tmp_path: Path, kept: int | None
) -> None:
    path = tmp_path / "tower.onnx"
    save_graph(wide_model(), path, limit=0)
    content = data_path(path).read_bytes()
    data_path(path).unlink()
    if kept is not None:
        data_path(path).write_bytes(content[:kept])
    with pytest.raises(ExportError, match=r"weights of tower\.onnx from tower\.onnx_data"):
        load_graph(path)


@pytest.mark.parametrize("content", [None, b"no graph"])
def test_what_is_not_onnx_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tower.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match="as ONNX"):
        load_graph(path)
