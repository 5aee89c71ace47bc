from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import Bounds, judge_tower
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.smoothquant import (
    apply_smoothing,
    rescale,
    search_alphas,
    smoothable,
)
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.spec import Tower
from tests.export.quantizing.planted import plant_outlier
from tests.export.quantizing.small_graphs import batches, close, copy_of, fused, graph_of, run

Make = Callable[..., Source]
CPU, SYMMETRIC = StaticInt8(symmetric=False), StaticInt8(symmetric=True)
GATE = Bounds(mean_cosine=0.995, p1_cosine=0.98)
# The norms of the tiny towers that only products read: two in each layer, of the last layer
# one more for the token that is asked for, and the one before the projection. A BERT norms
# its residual stream itself; a ConvNext also norms before convolutions.
SMOOTHABLE = {
    ("clip", "image"): 6,
    ("clip", "text"): 6,
    ("convnext", "image"): 3,
    ("convnext", "text"): 0,
}


def data_of(dual: DualEncoder, tower: Tower, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, dual.spec.image)
    return calibration_texts(source, dual.text_tokenizer)


@st.composite
def normed_products(draw: st.DrawFn) -> tuple[onnx.ModelProto, int]:
    """A LayerNormalization, with a bias or without, and one to three products of any kind."""
    channels = draw(st.integers(1, 9))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = 10.0 ** values.uniform(-2, 2, channels)
    spread[values.random(channels) < 0.1] = 0
    weights = {"scale": values.normal(size=channels) * spread, "bias": values.normal(size=channels)}
    given = ["x", "scale", "bias"] if draw(st.booleans()) else ["x", "scale"]
    nodes = [helper.make_node("LayerNormalization", given, ["normed"], "norm", axis=-1)]
    kinds = st.lists(st.sampled_from(["MatMul", "Gemm", "transB", "again"]), min_size=1, max_size=3)
    shape = (channels, draw(st.integers(1, 5)))
    for index, kind in enumerate(draw(kinds)):
        name, weight = f"y{index}", f"w{index}"
        weights[weight] = values.normal(size=shape[::-1] if kind == "transB" else shape)
        if kind == "again" and "w" in weights:
            nodes.append(helper.make_node("MatMul", ["normed", "w"], [name], name))
        elif kind in ("MatMul", "again"):
            weights["w"] = weights.pop(weight)  # which another one may read too
            nodes.append(helper.make_node("MatMul", ["normed", "w"], [name], name))
        else:
            weights[f"c{index}"] = values.normal(size=shape[1])
            read = ["normed", weight, f"c{index}"]
            nodes.append(helper.make_node("Gemm", read, [name], name, transB=kind == "transB"))
    outputs = {node.output[0]: ["batch", shape[1]] for node in nodes[1:]}
    return graph_of(nodes, weights, given=["batch", channels], outputs=outputs), channels


@settings(max_examples=40)
@given(made=normed_products(), alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_smoothing_changes_no_result(
    made: tuple[onnx.ModelProto, int], alpha: float, seed: int
) -> None:
    model, channels = made
    values = np.random.default_rng(seed).normal(size=(8, channels)).astype(np.float32)
    before = run(model, values)
    assert smoothable(model) == ("norm",)
    smoothed = copy_of(model)
    apply_smoothing(smoothed, (("norm", alpha),), batches(values))
    assert [node.op_type for node in smoothed.graph.node] == [
        node.op_type for node in model.graph.node
    ]
    for found, right in zip(run(smoothed, values), before, strict=True):
        assert close(found, right)


@pytest.mark.parametrize(("family", "tower"), list(SMOOTHABLE))
def test_smoothing_changes_no_tower(
    family: str, tower: Tower, blobs: Make, request: pytest.FixtureRequest
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    model, data = load_graph(paths.graph(tower).path), data_of(dual, tower, blobs(20))
    norms = smoothable(model)
    assert len(norms) == SMOOTHABLE[family, tower]
    (before,) = run(model, data.batch(0))
    for alpha in (0.0, 0.5, 1.0):
        smoothed = onnx.ModelProto()
        smoothed.CopyFrom(model)
        apply_smoothing(smoothed, tuple((name, alpha) for name in norms), data)
        assert len(smoothed.graph.node) == len(model.graph.node)
        (after,) = run(smoothed, data.batch(0))
        assert close(after, before)


def test_smoothing_makes_the_channels_of_one_size(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model, data = load_graph(clip_towers.image), calibration_images(blobs(20), clip.spec.image)
    norm = smoothable(model)[0]
    apply_smoothing(model, ((norm, 1.0),), data)
    (node,) = (item for item in model.graph.node if item.name == norm)
    model.graph.output.append(helper.make_empty_tensor_value_info(node.output[0]))
    seen = np.concatenate(
        [run(model, data.batch(index))[-1].reshape(-1, 32) for index in range(data.count)]
    )
    np.testing.assert_allclose(np.abs(seen).max(axis=0), 1, rtol=1e-4)


def test_fused_and_merged_graphs_are_smoothed_alike(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model, data = load_graph(clip_towers.image), calibration_images(blobs(20), clip.spec.image)
    model = fused(model)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Split", "MultiHeadAttention", "SkipLayerNormalization"} <= kinds
    norms = smoothable(model)
    # One is fused with the sum before it, and stays as it is.
    assert len(norms) == SMOOTHABLE["clip", "image"] - 1
    smoothed = copy_of(model)
    apply_smoothing(smoothed, tuple((name, 0.5) for name in norms), data)
    for found, right in zip(run(smoothed, data.batch(0)), run(model, data.batch(0)), strict=True):
        assert close(found, right)


def test_a_norm_that_is_also_read_elsewhere_is_left_alone() -> None:
    values = np.random.default_rng(0)
    weights = {"scale": values.normal(size=4), "w": values.normal(size=(4, 4))}
    norm = helper.make_node("LayerNormalization", ["x", "scale"], ["normed"], "norm")
    product = helper.make_node("MatMul", ["normed", "w"], ["y"], "product")
    for last in (
        helper.make_node("Add", ["normed", "y"], ["z"], "residual"),
        helper.make_node("MatMul", ["y", "normed"], ["z"], "attention"),
        helper.make_node("Identity", ["normed"], ["z"], "output"),
    ):
        nodes, shape = [norm, product, last], [4, 4]
        model = graph_of(nodes, weights, given=shape, outputs={"y": shape, "z": shape})
        assert smoothable(model) == ()
        with pytest.raises(ExportError, match="norm cannot be smoothed"):
            apply_smoothing(model, (("norm", 0.5),), batches(np.ones((4, 4), np.float32)))
    seen = graph_of([norm, product], weights, given=shape, outputs={"y": shape, "normed": shape})
    assert smoothable(seen) == ()


@pytest.mark.parametrize("config", [CPU, SYMMETRIC], ids=["cpu", "symmetric"])
def test_a_planted_outlier_is_found_and_what_needs_no_smoothing_is_not(config: StaticInt8) -> None:
    """Of two norms of equal channels, one has a channel that is a hundred times as large."""
    draw = np.random.default_rng(1)
    weights = {
        "scale": np.ones(16),
        "large": np.where(np.arange(16) == 3, 100.0, 1.0),
        "w": draw.uniform(0.9, 1, (16, 64)) * draw.choice([-1, 1], (16, 64)),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["a"], "good"),
        helper.make_node("LayerNormalization", ["x", "large"], ["b"], "bad"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "first"),
        helper.make_node("MatMul", ["b", "w"], ["z"], "second"),
    ]
    shape = ["batch", 64]
    model = graph_of(nodes, weights, given=["batch", 16], outputs={"y": shape, "z": shape})
    # Each batch has all rotations of a row, so that all channels are alike. The first two have
    # the extremes, which no other row goes beyond: one for those that are looked for, and one
    # for those that alphas are compared on.
    usual = draw.uniform(-1, 1, (32, 16))
    extreme = np.array([2.5, *np.linspace(0.4, 0.6, 7), -2.5, *np.linspace(-0.6, -0.4, 7)])
    rows = [np.roll(row, by) for row in (extreme, extreme, *usual) for by in range(16)]
    data = batches(np.array(rows, np.float32))
    found = search_alphas(model, data, config)
    assert [name for name, _ in found] == ["bad"]
    kept = StaticInt8(symmetric=config.symmetric, kept=("second",))
    assert search_alphas(model, data, kept) == ()


@pytest.mark.parametrize(
    ("symmetric", "alphas"), [(False, "searched"), (True, "searched"), (True, 0.5)]
)
def test_a_planted_outlier_ruins_naive_int8_and_smoothing_repairs_it(
    symmetric: bool,
    alphas: float | str,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    model, data = load_graph(clip_towers.image), calibration_images(blobs(64), clip.spec.image)
    planted = plant_outlier(model, smoothable(model)[-1], channel=5)
    test = calibration_images(blobs(16, seed=1), clip.spec.image).batch(0)
    (reference,) = run(model, test)
    np.testing.assert_allclose(run(planted, test)[0], reference, atol=1e-5)

    def misses(source: onnx.ModelProto) -> list[str]:
        save_graph(copy_of(source), tmp_path / "f.onnx")
        settings = StaticInt8(symmetric=symmetric)
        write_int8(tmp_path / "f.onnx", tmp_path / "q.onnx", data, settings)
        (found,) = run(load_graph(tmp_path / "q.onnx"), test)
        return [item.name for item in judge_tower(found, reference, GATE) if not item.is_inside]

    assert misses(model) == []
    assert misses(planted) != []
    config = StaticInt8(symmetric=symmetric)
    chosen = (
        search_alphas(planted, data, config)
        if alphas == "searched"
        else tuple((name, float(alphas)) for name in smoothable(planted))
    )
    smoothed = copy_of(planted)
    apply_smoothing(smoothed, chosen, data)
    assert misses(smoothed) == []


def test_rescaling_shared_constants_leaves_their_other_readers_alone(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    """The norm before the last attention is computed twice, with the same scale and bias."""
    model, data = load_graph(clip_towers.text), calibration_texts(blobs(8), clip.text_tokenizer)
    nodes = {node.name: node for node in model.graph.node}
    scales = [nodes[name].input[1] for name in smoothable(model)]
    shared = [name for name in smoothable(model) if scales.count(nodes[name].input[1]) == 2]
    assert len(shared) == 2
    changed = copy_of(model)
    rescale(changed, shared[0], np.linspace(0.1, 10, 32))
    for index in range(data.count):
        assert close(run(changed, data.batch(index))[0], run(model, data.batch(index))[0])
    # The second is the last to read them, so they are changed in place.
    rescale(changed, shared[1], np.linspace(0.1, 10, 32))
    assert len(changed.graph.initializer) == len(model.graph.initializer) + 2
    assert close(run(changed, data.batch(0))[0], run(model, data.batch(0))[0])
