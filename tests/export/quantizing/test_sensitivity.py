from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import Config, Float8, StaticInt8
from edgeclip.export.quantizing.node_groups import NodeGroup, node_groups
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.sensitivity import (
    SensitivityInputs,
    measure_sensitivity,
    row_divergence,
    switched_tower,
)
from edgeclip.export.quantizing.smoothquant import apply_smoothing
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.spec import Tower
from tests.export.quantizing.planted import plant_outlier
from tests.export.quantizing.search_cases import BEHIND_OUTLIER, CHANNEL, OUTLIER

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
CPU = StaticInt8(symmetric=False)
INPUTS = {"image": "pixel_values", "text": "input_ids"}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}


def data_for(tower: Tower, dual: DualEncoder, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, dual.spec.image)
    return calibration_texts(source, dual.text_tokenizer)


def probe_for(tower: Tower, dual: DualEncoder, source: Source) -> SensitivityInputs:
    data = data_for(tower, dual, source)
    inputs = [data.batch(number) for number in range(data.count)]
    draw = np.random.default_rng(0).normal(size=(sum(map(len, inputs)), 16)).astype(np.float32)
    return SensitivityInputs(
        inputs=inputs,
        others=draw / np.linalg.norm(draw, axis=1, keepdims=True),
        logit_scale=20.0,
        feed=lambda values: {INPUTS[tower]: values},
        output=OUTPUTS[tower],
    )


def plain_run(path: Path, tower: Tower, values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Run a graph as it is written: no products of integers, which add up otherwise."""

    class Plain(OrtEngine):
        def _load(self, ort, graph, options, chain):  # type: ignore[no-untyped-def]
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            return super()._load(ort, graph, options, chain)

    engine = Plain(path, providers=("CPUExecutionProvider",), threads=1)
    return engine.run({INPUTS[tower]: values})[OUTPUTS[tower]]


@pytest.mark.parametrize("family", ["clip", "convnext"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_groups_hold_every_product_once_and_share_what_they_read(
    family: str, tower: Tower, request: pytest.FixtureRequest
) -> None:
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    path = paths.graph(tower).path
    groups = node_groups(path)
    assert [node for group in groups for node in group.nodes] != []
    assert sorted(node for group in groups for node in group.nodes) == sorted(
        quantizable_nodes(path)
    )
    reads = {node.name: node.input[0] for node in load_graph(path).graph.node}
    shared = [{reads[node] for node in group.nodes} for group in groups]
    assert all(len(values) == 1 for values in shared)
    assert len(set.union(*shared)) == len(groups)


def test_groups_have_the_names_of_the_model(clip_towers: TowerPaths) -> None:
    titles = [group.title for group in node_groups(clip_towers.image)]
    assert "layers.0.self_attn.q_proj+k_proj+v_proj" in titles
    assert {"layers.0.mlp.fc1", "layers.0.mlp.fc2", "layers.0.self_attn.out_proj"} <= set(titles)
    (wide,) = (group for group in node_groups(clip_towers.image) if len(group.nodes) == 3)
    assert [single.title for single in wide.singles()] == [
        f"layers.0.self_attn.{name}_proj" for name in "qkv"
    ]


CASES: dict[str, Config] = {
    "cpu": CPU,
    "7 bits": StaticInt8(symmetric=False, reduce_range=True),
    "one scale": StaticInt8(symmetric=False, per_channel=False),
    "symmetric": StaticInt8(symmetric=True),
    "fp8": Float8(),
}


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_switches_give_the_float_tower_and_the_quantized_one(
    tower: Tower,
    config: Config,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    source, data = clip_towers.graph(tower).path, data_for(tower, clip, blobs(16, seed=1))
    written = tmp_path / "written.onnx"
    quantize_graph(source, written, config, data)
    values = data.batch(0)
    with switched_tower(source, written, threads=1) as switched:
        assert set(switched.nodes) == set(quantizable_nodes(source))
        off = switched.run({INPUTS[tower]: values})[OUTPUTS[tower]]
        on = switched.run({INPUTS[tower]: values}, switched.nodes)[OUTPUTS[tower]]
    np.testing.assert_allclose(off, plain_run(source, tower, values), atol=1e-6)
    # Float8 leaves fp16 between the products, and int8 on a CPU rounds biases too.
    found = cosines(on, plain_run(written, tower, values))
    assert found.min() > (0.995 if isinstance(config, Float8) else 0.9999)
    assert np.abs(on - off).max() > 1e-4


def test_one_switch_is_the_graph_with_all_other_products_kept(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    data = data_for("image", clip, blobs(16, seed=1))
    source = clip_towers.image
    quantize_graph(source, tmp_path / "whole.onnx", StaticInt8(symmetric=True), data)
    names = quantizable_nodes(source)
    with switched_tower(source, tmp_path / "whole.onnx", threads=1) as switched:
        for name in (names[0], names[5], names[-1]):
            kept = tuple(other for other in names if other != name)
            quantize_graph(
                source, tmp_path / "one.onnx", StaticInt8(symmetric=True, kept=kept), data
            )
            on = switched.run({"pixel_values": data.batch(0)}, [name])["image_embeds"]
            right = plain_run(tmp_path / "one.onnx", "image", data.batch(0))
            np.testing.assert_allclose(on, right, atol=1e-5)


def test_a_graph_without_quantized_products_has_no_switches(clip_towers: TowerPaths) -> None:
    with (
        pytest.raises(ExportError, match="no quantized product"),
        switched_tower(clip_towers.image, clip_towers.image, threads=1),
    ):
        pass


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), others=st.integers(1, 9))
def test_the_divergence_is_that_of_the_softmax(seed: int, rows: int, others: int) -> None:
    draw = np.random.default_rng(seed)
    found, reference = (draw.normal(size=(rows, 4)).astype(np.float32) for _ in range(2))
    targets = draw.normal(size=(others, 4)).astype(np.float32)
    result = row_divergence(found, reference, targets, 5.0)
    for row in range(rows):
        logits = [5.0 * targets.astype(np.float64) @ item[row] for item in (reference, found)]
        right, wrong = (
            np.exp(item - item.max()) / np.exp(item - item.max()).sum() for item in logits
        )
        some = right > 1e-300
        expected = (right[some] * np.log(right[some] / np.maximum(wrong[some], 1e-300))).sum()
        assert result[row] == pytest.approx(max(expected, 0), rel=1e-6, abs=1e-9)
    assert (row_divergence(reference, reference, targets, 5.0) == 0).all()


def test_a_planted_outlier_damages_most(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    source = tmp_path / "planted.onnx"
    save_graph(plant_outlier(load_graph(clip_towers.image), OUTLIER, CHANNEL), source)
    quantize_graph(source, tmp_path / "int8.onnx", CPU, data_for("image", clip, blobs(16, seed=1)))
    probe = probe_for("image", clip, blobs(20, seed=2))
    found = measure_sensitivity(
        source, tmp_path / "int8.onnx", node_groups(source), probe, config="k"
    )
    assert found.config == "k"
    assert found.inputs == 20
    worst, second = found.groups[:2]
    assert worst.title == BEHIND_OUTLIER
    assert worst.divergence.value > 10 * second.divergence.value
    assert worst.cosine_loss.value > 10 * second.cosine_loss.value
    assert worst.divergence.low <= worst.divergence.value <= worst.divergence.high


def test_a_group_is_taken_apart_if_some_of_its_nodes_are_not_to_blame(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    """One projection alone has a weight that no scale suits."""
    model = load_graph(clip_towers.image)
    (wide,) = (group for group in node_groups(clip_towers.image) if len(group.nodes) == 3)
    bad = wide.nodes[2]
    save_graph(model, tmp_path / "f.onnx")
    config = StaticInt8(symmetric=False, per_channel=False)
    data = data_for("image", clip, blobs(16, seed=1))
    quantize_graph(tmp_path / "f.onnx", tmp_path / "q.onnx", config, data)
    broken = load_graph(tmp_path / "q.onnx")
    _coarsen(broken, bad)
    save_graph(broken, tmp_path / "q.onnx")
    probe = probe_for("image", clip, blobs(20, seed=2))
    groups = node_groups(tmp_path / "f.onnx")
    found = measure_sensitivity(tmp_path / "f.onnx", tmp_path / "q.onnx", groups, probe)
    by_nodes = {item.nodes: item for item in found.groups}
    assert found.groups[0].nodes == (bad,)
    assert wide.nodes not in by_nodes
    assert {(node,) for node in wide.nodes} <= set(by_nodes)
    # In float and with each group, then in float and with each node of that one.
    assert found.runs == 20 * (1 + len(groups) + 1 + len(wide.nodes))
    assert found.rate == pytest.approx(found.runs / found.seconds)


def test_of_a_group_that_is_quantized_in_part_each_product_is_measured_alone(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    (wide,) = (group for group in node_groups(clip_towers.image) if len(group.nodes) == 3)
    first, *rest = wide.nodes
    data = data_for("image", clip, blobs(16, seed=1))
    config = StaticInt8(symmetric=True, kept=(first,))
    quantize_graph(clip_towers.image, tmp_path / "q.onnx", config, data)
    probe = probe_for("image", clip, blobs(8, seed=2))
    groups = node_groups(clip_towers.image)
    found = measure_sensitivity(clip_towers.image, tmp_path / "q.onnx", groups, probe)
    titles = {item.nodes: item.title for item in found.groups}
    assert [titles[(node,)] for node in rest] == [
        f"layers.0.self_attn.{name}_proj" for name in "kv"
    ]
    assert {node for nodes in titles for node in nodes} == {
        *quantizable_nodes(clip_towers.image)
    } - {first}


def _coarsen(model, name: str) -> None:  # type: ignore[no-untyped-def]
    """Make a product's weight as coarse as 1 bit."""
    from onnx import numpy_helper

    nodes = {node.name: node for node in model.graph.node}
    made = {output: node for node in model.graph.node for output in node.output}
    weight = made[nodes[name].input[1]].input[0]
    (tensor,) = (item for item in model.graph.initializer if item.name == weight)
    values = numpy_helper.to_array(tensor)
    coarse = np.where(values > 0, 100, -100).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(coarse, weight))


def test_damage_of_a_smoothed_config_is_that_of_its_smoothed_graph(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    source = tmp_path / "planted.onnx"
    save_graph(plant_outlier(load_graph(clip_towers.image), OUTLIER, CHANNEL), source)
    data = data_for("image", clip, blobs(16, seed=1))
    config = replace(CPU, smoothing=((OUTLIER, 0.5),))
    quantize_graph(source, tmp_path / "q.onnx", config, data)
    model = load_graph(source)
    apply_smoothing(model, config.smoothing, data)
    save_graph(model, tmp_path / "smooth.onnx")
    probe = probe_for("image", clip, blobs(20, seed=2))
    groups = node_groups(source)
    found = measure_sensitivity(tmp_path / "smooth.onnx", tmp_path / "q.onnx", groups, probe)
    assert max(item.cosine_loss.value for item in found.groups) < 0.01


def test_the_other_tower_is_what_rows_are_compared_with(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    """Real embeddings of captions in place of drawn ones: damage is small and finite."""
    data = data_for("image", clip, blobs(16, seed=1))
    quantize_graph(clip_towers.image, tmp_path / "q.onnx", CPU, data)
    source = blobs(12, seed=2)
    captions = [str(source.caption(number)) for number in range(12)]
    others = torch_embedder(clip, "text")(clip.text_tokenizer.encode(captions))
    probe = replace(probe_for("image", clip, source), others=others)
    nodes = tuple(quantizable_nodes(clip_towers.image))
    only = NodeGroup("all", nodes, nodes)
    found = measure_sensitivity(clip_towers.image, tmp_path / "q.onnx", [only], probe)
    (whole,) = found.groups
    assert 0 < whole.divergence.value < 1
