"""Activation ranges: histograms, percentiles, extremes and their cache."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import load_tensors_data

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.activation_ranges import (
    EXTREMES,
    SIGNED,
    UNSIGNED,
    Histogram,
    Levels,
    Ranging,
    ValueRange,
    activation_bounds,
    activation_ranges,
    observe,
    percentile_range,
    save_ranges,
)
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.static_int8 import quantizable_nodes, write_int8
from tests.export.quantizing.small_graphs import batches, fused, graph_of

Make = Callable[..., Source]
every_levels = pytest.mark.parametrize("levels", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
arrays = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


def histogram_of(*parts: NDArray[np.floating], bins: int = 4096) -> Histogram:
    made = Histogram(bins)
    for part in parts:
        made.add(part)
    return made


@given(parts=st.lists(arrays, min_size=1, max_size=6))
def test_a_histogram_counts_everything_where_it_is(parts: list[NDArray[np.float32]]) -> None:
    found, values = histogram_of(*parts, bins=64), np.concatenate(parts)
    assert found.seen == ValueRange(float(values.min()), float(values.max()))
    assert found.counts.sum() == len(values)
    assert len(found.counts) == 128
    edges = found.edges
    below = np.concatenate([[0], np.cumsum(found.counts)])
    # A value that lies on an edge, but for rounding, may be counted on its other side.
    for index in range(0, 129, 8):
        slack = 1e-6 * edges[-1]
        assert (values < edges[index] - slack).sum() <= below[index]
        assert (values <= edges[index] + slack).sum() >= below[index]


def test_what_a_histogram_holds_does_not_grow() -> None:
    found = Histogram(64)
    for power in range(-20, 20):
        found.add(np.full(10, 2.0**power))
        found.add(np.zeros(3))
    assert len(found.counts) == 128
    assert found.counts.sum() == 40 * 13


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="infinite or not a number"):
        histogram_of(np.array([1.0, wrong]))


@every_levels
@settings(max_examples=20)
@given(values=arrays, percentile=st.floats(50.1, 100))
def test_no_cut_goes_beyond_what_was_seen(
    levels: Levels, values: NDArray[np.float32], percentile: float
) -> None:
    found = histogram_of(values)
    seen = found.seen.with_zero()
    kept = percentile_range(found, percentile, levels)
    assert kept.low <= kept.high
    assert kept.bound <= seen.bound * (1 + 1e-6)
    if not levels.symmetric:
        assert seen.low <= kept.low <= 0 <= kept.high <= seen.high


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_is_that_of_the_values(percentile: float) -> None:
    draw = np.random.default_rng(0)
    parts = [draw.laplace(0.5, size=20_000) for _ in range(5)]
    values = np.concatenate(parts)
    found = histogram_of(*parts)
    kept = percentile_range(found, percentile, SIGNED)
    assert kept.bound == pytest.approx(np.percentile(np.abs(values), percentile), rel=0.01)
    assert kept.low == -kept.high
    kept = percentile_range(found, percentile, UNSIGNED)
    rest = (100 - percentile) / 2
    assert kept.low == pytest.approx(np.percentile(values, rest), rel=0.01)
    assert kept.high == pytest.approx(np.percentile(values, 100 - rest), rel=0.01)


def test_a_percentile_of_100_keeps_everything() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    found = histogram_of(values)
    assert percentile_range(found, 100, UNSIGNED) == ValueRange(values.min(), values.max())
    assert percentile_range(found, 100, SIGNED).bound == np.abs(values).max()


@pytest.mark.parametrize("symmetric", [False, True], ids=["cpu", "symmetric"])
def test_percentile_ranges_are_those_in_the_quantized_graph(
    symmetric: bool,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    source, data = clip_towers.image, calibration_images(blobs(20), clip.spec.image)
    ranging = Ranging(method="percentile", percentile=99)
    nodes = quantizable_nodes(source)
    if symmetric:
        bounds = activation_bounds(source, data, ranging, ("MatMul", "Gemm"))
        steps = {name: bound / 127 for name, bound in bounds.items()}
    else:
        ranges = activation_ranges(source, data, ranging, nodes)
        assert all(item.low <= 0 <= item.high for item in ranges.values())
        steps = {name: (item.high - item.low) / 255 for name, item in ranges.items()}
    write_int8(source, tmp_path / "q.onnx", data, StaticInt8(symmetric=symmetric, ranging=ranging))
    graph = load_graph(tmp_path / "q.onnx").graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    found = {
        node.input[0]: float(values[node.input[1]])
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert len(found) == 10  # three of the thirteen products share what they read with others
    assert found == pytest.approx({name: steps[name] for name in found}, rel=1e-5)
    extremes = activation_bounds(source, data)
    assert any(steps[name] < 0.97 * extremes[name] / 127 for name in found)


def test_extremes_are_the_same_by_either_way(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    source, data = clip_towers.image, calibration_images(blobs(20), clip.spec.image)
    bounds = activation_bounds(source, data)
    ranges = activation_ranges(source, data, EXTREMES, quantizable_nodes(source))
    assert set(ranges) < set(bounds)
    for name, found in ranges.items():
        assert found.bound == pytest.approx(bounds[name], rel=1e-5)


def test_what_fused_operators_give_has_a_bound_too(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    """ONNX cannot infer the types of ONNX Runtime's own operators."""
    model = load_graph(clip_towers.image)
    model = fused(model)
    attention = [n.output[0] for n in model.graph.node if n.op_type == "MultiHeadAttention"]
    save_graph(model, tmp_path / "fused.onnx")
    data = calibration_images(blobs(8), clip.spec.image)
    for ranging in (EXTREMES, Ranging(method="percentile")):
        bounds = activation_bounds(tmp_path / "fused.onnx", data, ranging, ("MatMul", "Gemm"))
        assert all(bounds[name] > 0 for name in attention)


def test_saved_ranges_are_those_that_onnxruntime_reads(tmp_path: Path) -> None:
    save_ranges({"x": ValueRange(-0.5, 2.0), "y": ValueRange(0.0, 1 / 3)}, tmp_path / "ranges.json")
    read = load_tensors_data(tmp_path / "ranges.json")
    assert read.calibration_method is CalibrationMethod.MinMax
    assert {name: item.range_value for name, item in read.items()} == {
        "x": (np.float32(-0.5), np.float32(2.0)),
        "y": (np.float32(0.0), np.float32(1 / 3)),
    }


def test_a_value_that_becomes_infinite_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["large"], "exp"),
        helper.make_node("MatMul", ["large", "w"], ["y"], "product"),
    ]
    model = graph_of(nodes, {"w": np.eye(2)}, given=["b", 2], outputs={"y": ["b", 2]})
    onnx.save(model, tmp_path / "f.onnx")
    data = batches(np.full((4, 2), 1000, np.float32))
    with pytest.raises(ExportError, match="no range can be found for large"):
        activation_ranges(tmp_path / "f.onnx", data, Ranging(method="percentile"), ["product"])


def test_values_are_observed_batch_by_batch(
    clip_towers: TowerPaths, clip: DualEncoder, blobs: Make
) -> None:
    """More values than are held at a time, the input among them."""
    model = load_graph(clip_towers.image)
    made = [node.output[0] for node in model.graph.node]
    data = calibration_images(blobs(20), clip.spec.image)
    seen: dict[str, list[int]] = {}

    def visit(name: str, values: NDArray[np.generic]) -> None:
        seen.setdefault(name, []).append(values.shape[0] if values.ndim else 0)

    observe(model, ["pixel_values", *made, made[0]], data, visit)
    assert set(seen) == {"pixel_values", *made}
    assert {len(found) for found in seen.values()} == {2}
    assert seen["pixel_values"] == [16, 4]


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """numpy tells tracemalloc of its arrays: what is kept of a batch would show."""
    draw = np.random.default_rng(0)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    shape = {"y": ["b", 64, 256]}
    model = graph_of(
        [node], {"w": draw.normal(size=(256, 256))}, given=["b", 64, 256], outputs=shape
    )
    onnx.save(model, tmp_path / "f.onnx")

    def batch(index: int) -> NDArray[np.float32]:
        values = np.random.default_rng(index).normal(size=(16, 64, 256))  # 1 MB as float32
        return values.astype(np.float32)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            data = CalibrationData(count, batch)
            activation_ranges(tmp_path / "f.onnx", data, Ranging(method="percentile"), ["product"])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is loaded once
    assert peak(16) < 1.1 * peak(4)


def test_bounds_are_the_largest_absolute_values(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    data = calibration_images(blobs(20), clip.spec.image)
    bounds = activation_bounds(clip_towers.image, data)
    model = onnx.load(clip_towers.image)
    name = next(n.output[0] for n in model.graph.node if n.op_type == "LayerNormalization")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    seen = [
        np.abs(session.run([name], {"pixel_values": data.batch(index)})[0]).max()
        for index in range(data.count)
    ]
    assert data.count == 2
    assert bounds[name] == pytest.approx(max(seen), rel=1e-5)
    assert bounds["pixel_values"] == pytest.approx(1, abs=0.1)


def test_a_percentile_cuts_off_what_is_rare(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = calibration_images(blobs(20), clip.spec.image)
    extremes = activation_bounds(clip_towers.image, data)
    cut = activation_bounds(
        clip_towers.image, data, Ranging(method="percentile", percentile=99), ("MatMul",)
    )
    assert cut
    assert all(cut[name] <= extremes[name] * 1.001 for name in cut)
    assert any(cut[name] < extremes[name] * 0.97 for name in cut)
    assert capsys.readouterr().out == ""


def test_weights_may_lie_in_a_second_file(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    data = calibration_images(blobs(4), clip.spec.image)
    save_graph(load_graph(clip_towers.image), tmp_path / "large.onnx", limit=1000)
    assert activation_bounds(tmp_path / "large.onnx", data) == activation_bounds(
        clip_towers.image, data
    )


@pytest.mark.parametrize("percentile", [50, 101, float("nan")])
def test_a_percentile_that_is_none_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile must be"):
        Ranging(percentile=percentile)
