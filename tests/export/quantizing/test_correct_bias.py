from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.graph import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.correct_bias import correct_biases
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.quality.retrieval import cosines
from edgeclip.runtime.spec import Tower
from tests.export.quantizing.small_graphs import batches, copy_of, fused, graph_of, run

Make = Callable[..., Source]
CPU = StaticInt8(symmetric=False)
SYMMETRIC = StaticInt8(symmetric=True)
TENSORRT = StaticInt8(symmetric=True, float_precision="fp16")


def quantized(
    model: onnx.ModelProto, data: CalibrationData, settings: StaticInt8, folder: Path
) -> onnx.ModelProto:
    save_graph(copy_of(model), folder / "f.onnx")
    write_int8(folder / "f.onnx", folder / "q.onnx", data, settings)
    return load_graph(folder / "q.onnx")


def all_of(model: onnx.ModelProto, data: CalibrationData) -> NDArray[np.float64]:
    """The first output for all batches."""
    found = [run(model, data.batch(index))[0] for index in range(data.count)]
    return np.concatenate(found).astype(np.float64)


def mean_error(found: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Length of the mean difference of the channels, which are the second axis."""
    axes = tuple(axis for axis in range(found.ndim) if axis != 1)
    return float(np.linalg.norm((found - right).mean(axis=axes)))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("settings", [CPU, SYMMETRIC, TENSORRT], ids=["cpu", "fp32", "tensorrt"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_mean_error_of_a_tower_falls_and_its_cosine_does_not(
    tower: Tower,
    settings: StaticInt8,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    def data_of(source: Source) -> CalibrationData:
        if tower == "image":
            return calibration_images(source, clip.spec.image)
        return calibration_texts(source, clip.text_tokenizer)

    model, data = load_graph(clip_towers.graph(tower).path), data_of(blobs(64))
    before = quantized(model, data, settings, tmp_path)
    untouched = before.SerializeToString(deterministic=True)
    after = correct_biases(before, model, data)
    assert before.SerializeToString(deterministic=True) == untouched
    save_graph(copy_of(after), tmp_path / "corrected.onnx")  # valid ONNX
    # Only the projection at the end has no bias; in int32 that is stored quantized.
    added = Counter({"DequantizeLinear": 1}) if settings == CPU else Counter[str]()
    assert kinds(after) - kinds(before) == added
    unseen = data_of(blobs(64, seed=9))
    right = all_of(model, unseen)
    worse, better = (all_of(item, unseen) for item in (before, after))
    assert mean_error(better, right) < 0.8 * mean_error(worse, right)
    assert cosines(better, right).mean() > cosines(worse, right).mean()


@pytest.mark.parametrize("settings", [CPU, SYMMETRIC], ids=["cpu", "fp32"])
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
def test_convolutions_are_corrected_in_a_bias_of_their_own(
    settings: StaticInt8, biased: bool, tmp_path: Path
) -> None:
    """Weights that all round the same way, and activations that are never negative."""
    draw = np.random.default_rng(0)
    # The largest weight makes the step 0.1; all others are 0.03 above a multiple of it.
    weights = {
        "w": draw.integers(-9, 9, (6, 4, 3, 3)) * 0.1 + 0.03,
        "v": draw.normal(size=(5, 6, 1, 1)),
    }
    weights["w"][:, 0, 0, 0] = 12.7
    weights["b"] = draw.normal(size=6)
    read = ["a", "w", "b"] if biased else ["a", "w"]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "act"),
        helper.make_node("Conv", read, ["y"], "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    shapes = {"y": ["batch", 6, 8, 8]}
    model = graph_of(nodes, weights, given=["batch", 4, 8, 8], outputs=shapes)
    values = draw.normal(1, 1, size=(64, 4, 8, 8)).astype(np.float32)
    before = quantized(model, batches(values[:32]), settings, tmp_path)
    after = correct_biases(before, model, batches(values[:32]))
    assert "Add" not in kinds(after)
    (node,) = (item for item in after.graph.node if item.name == "conv")
    assert len(node.input) == 3
    unseen = batches(values[32:])
    right = all_of(model, unseen)
    worse, better = (all_of(item, unseen) for item in (before, after))
    assert mean_error(better, right) < 0.2 * mean_error(worse, right)


def test_a_product_without_a_bias_gets_no_operator(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    shape = {"y": ["batch", 3]}
    model = graph_of([node], {"w": draw.normal(size=(4, 3))}, given=["batch", 4], outputs=shape)
    data = batches(draw.normal(size=(32, 4)).astype(np.float32))
    before = quantized(model, data, SYMMETRIC, tmp_path)
    assert kinds(correct_biases(before, model, data)) == kinds(before)


def test_fused_biases_are_corrected_too(
    convnext: DualEncoder, convnext_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    model = load_graph(convnext_towers.image)
    model = fused(model)
    assert kinds(model)["BiasGelu"] == 2
    data = calibration_images(blobs(32), convnext.spec.image)
    before = quantized(model, data, SYMMETRIC, tmp_path)
    after = correct_biases(before, model, data)
    biases = [node.input[1] for node in before.graph.node if node.op_type == "BiasGelu"]
    values = [
        {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
        for graph in (before, after)
    ]
    assert all((values[0][name] != values[1][name]).any() for name in biases)
    right = all_of(model, data)
    worse, better = (all_of(item, data) for item in (before, after))
    assert mean_error(better, right) < mean_error(worse, right)


def test_a_bias_of_several_products_is_corrected_for_each_by_itself(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    weights = {
        "w": draw.integers(-9, 9, (8, 3)) * 0.1 + 0.03,
        "v": draw.integers(-9, 9, (8, 3)) * 0.1 - 0.03,
        "b": draw.normal(size=3),
    }
    weights["w"][0] = weights["v"][0] = 12.7
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "first"),
        helper.make_node("Add", ["p", "b"], ["y"], "first_bias"),
        helper.make_node("MatMul", ["x", "v"], ["q"], "second"),
        helper.make_node("Add", ["b", "q"], ["z"], "second_bias"),
    ]
    shape = ["batch", 3]
    model = graph_of(nodes, weights, given=["batch", 8], outputs={"y": shape, "z": shape})
    values = draw.uniform(0, 1, size=(64, 8)).astype(np.float32)
    before = quantized(model, batches(values), SYMMETRIC, tmp_path)
    after = correct_biases(before, model, batches(values))
    right, worse, better = (run(item, values) for item in (model, before, after))
    for index in (0, 1):
        assert mean_error(better[index], right[index]) < 1e-4
        assert mean_error(worse[index], right[index]) > 1e-2


def test_graphs_that_do_not_belong_together_are_refused(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model, data = load_graph(clip_towers.image), calibration_images(blobs(4), clip.spec.image)
    with pytest.raises(ExportError, match="no quantized product in common"):
        correct_biases(model, model, data)
