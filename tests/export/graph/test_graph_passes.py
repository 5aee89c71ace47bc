from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import tower_inputs
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_passes import PASSES, GraphPass, passes_for
from edgeclip.export.graph.graph_values import relative_error
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.towers.tower_runner import tower_feed
from tests.export.quantizing.small_graphs import graph_of

BY_NAME = {item.name: item for item in PASSES}
# How often a pass applies to the tiny towers. The two layers of a CLIP text tower have
# three projections each, of which the last layer's query reads one token only. The sums of
# its image tower are read by LayerNormalizations, but the last one is sliced first.
PLACES = {
    ("clip", "image"): {"merge projections": 5, "fuse attention": 2, "fuse residual and norm": 1},
    ("clip", "text"): {"merge projections": 5, "fuse attention": 2, "fuse residual and norm": 1},
    ("convnext", "image"): {"fuse GELU": 2},
    ("convnext", "text"): {"merge projections": 6, "fuse GELU": 2, "fuse residual and norm": 2},
}


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def domains(model: onnx.ModelProto) -> set[str]:
    return {node.domain for node in model.graph.node}


@pytest.mark.parametrize("item", PASSES, ids=lambda item: item.name)
@pytest.mark.parametrize(("student", "tower"), list(PLACES))
def test_a_pass_applies_where_it_should_and_changes_no_output(
    item: GraphPass,
    student: str,
    tower: Tower,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(student)
    paths: TowerPaths = request.getfixturevalue(f"{student}_towers")
    before = load_graph(paths.graph(tower).path)
    untouched = before.SerializeToString(deterministic=True)
    after, places = item.apply(before)
    assert before.SerializeToString(deterministic=True) == untouched
    assert places == PLACES[student, tower].get(item.name, 0)
    if item.engines is None:
        assert domains(after) == {""}
    save_graph(after, tmp_path / "after.onnx")  # valid, with shapes that can be inferred
    for count in (1, 3):
        values = next(tower_inputs(dual, tower, blobs(count)))
        feed = tower_feed(values, tower, "float32-nchw", dual.spec.image)
        results = [
            open_engine(path, device=cpu_device).run(feed)
            for path in (paths.graph(tower).path, tmp_path / "after.onnx")
        ]
        assert results[0].keys() == results[1].keys()
        for name, value in results[0].items():
            assert relative_error(value, results[1][name]) < 1e-6


@pytest.mark.parametrize("student", ["clip", "convnext"])
def test_all_passes_together_change_no_output(
    student: str, cpu_device: DeviceProfile, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    paths: TowerPaths = request.getfixturevalue(f"{student}_towers")
    model = load_graph(paths.text)
    for item in PASSES:
        model, _ = item.apply(model)
    save_graph(model, tmp_path / "after.onnx")
    ids = np.array([[1, 9, 8, 7, 2], [1, 20, 2, 0, 0]])
    expected, found = (
        open_engine(path, device=cpu_device).run({"input_ids": ids})["text_embeds"]
        for path in (paths.text, tmp_path / "after.onnx")
    )
    assert relative_error(expected, found) < 1e-6


def test_fused_operators_take_the_place_of_the_pieces(
    clip_towers: TowerPaths, convnext_towers: TowerPaths
) -> None:
    attention, _ = BY_NAME["fuse attention"].apply(load_graph(clip_towers.image))
    assert kinds(attention)["MultiHeadAttention"] == 2
    assert kinds(attention)["Softmax"] == 0
    gelu, _ = BY_NAME["fuse GELU"].apply(load_graph(convnext_towers.image))
    assert kinds(gelu)["BiasGelu"] == 2
    assert kinds(gelu)["Erf"] == 0
    merged, _ = BY_NAME["merge projections"].apply(load_graph(clip_towers.image))
    assert kinds(merged)["Split"] == 2
    assert kinds(merged)["MatMul"] == kinds(load_graph(clip_towers.image))["MatMul"] - 3


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx"])
def test_other_engines_get_standard_operators_only(engine: Any, cpu_device: DeviceProfile) -> None:
    capability = "8.9" if "tensorrt" in engine else None
    device = replace(
        cpu_device,
        engine=engine,
        precisions=("fp32",),
        compute_capability=capability,
        tensorrt_major=11 if engine.endswith("tensorrt") else None,
    )
    assert {item.name for item in passes_for(device)} == {"simplify", "merge projections"}


def test_standard_files_get_standard_operators_only(cpu_device: DeviceProfile) -> None:
    assert passes_for(cpu_device) == PASSES
    names = {item.name for item in passes_for(cpu_device, standard=True)}
    assert names == {"simplify", "merge projections"}


def model_of(nodes: list[onnx.NodeProto], **constants: NDArray[Any]) -> onnx.ModelProto:
    return graph_of(nodes, constants, given=[None, 4], outputs={"y": [None, 4]})


def test_simplify_folds_and_drops() -> None:
    """A sum of constants, a sum computed twice, an identity, a node that nobody reads."""
    model = model_of(
        [
            helper.make_node("Add", ["a", "a"], ["twice_a"]),
            helper.make_node("Add", ["x", "twice_a"], ["p"]),
            helper.make_node("Add", ["x", "twice_a"], ["q"]),
            helper.make_node("Identity", ["q"], ["r"]),
            helper.make_node("Exp", ["x"], ["unread"]),
            helper.make_node("Mul", ["p", "r"], ["y"]),
        ],
        a=np.ones(4, np.float32),
    )
    found, places = BY_NAME["simplify"].apply(model)
    assert places == 4
    assert [node.op_type for node in found.graph.node] == ["Add", "Mul"]
    assert [len(item.dims) for item in found.graph.initializer] == [1]


@pytest.mark.parametrize("reason", ["no bias", "bias read twice", "other depth", "is an output"])
def test_projections_that_cannot_be_merged_are_let_be(reason: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("MatMul", ["x", "b"], ["xb"]),
        helper.make_node("Add", ["xa", "bias"], ["xa_biased"]),
        helper.make_node("Add", ["xb", "bias"], ["xb_biased"]),
        helper.make_node("Mul", ["xa_biased", "xb_biased"], ["y"]),
    ]
    weights = {"a": np.eye(4, dtype=np.float32), "b": np.ones((4, 4), np.float32)}
    model = model_of(nodes, **weights, bias=np.ones(4, np.float32))
    assert BY_NAME["merge projections"].apply(model)[1] == 2
    if reason == "no bias":
        model.graph.node[2].input[1] = "x"
    elif reason == "bias read twice":
        model.graph.node[4].input[0] = "xa"
    elif reason == "other depth":
        model.graph.node[1].input[0] = "xa_biased"
        model.graph.node.insert(1, model.graph.node.pop(2))
    else:
        model.graph.output.add(name="xa")
    assert BY_NAME["merge projections"].apply(model)[1] == 0
