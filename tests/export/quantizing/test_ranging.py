import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
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
    Method,
    Range,
    Ranging,
    activation_bounds,
    activation_ranges,
    cut_information,
    cut_share,
    cut_squared_error,
    observe,
    save_ranges,
    squared_error,
)
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.static_int8 import quantizable_nodes, write_int8
from tests.export.quantizing.small_graphs import batches, fused, graph_of

Make = Callable[..., Source]
CUTS: tuple[Method, ...] = ("percentile", "entropy", "mse")
every_levels = pytest.mark.parametrize("levels", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
arrays = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


def histogram_of(*parts: NDArray[np.floating], bins: int = 4096) -> Histogram:
    made = Histogram(bins)
    for part in parts:
        made.add(part)
    return made


def error_of(values: NDArray[np.floating], kept: Range, levels: Levels) -> float:
    return float(np.mean((levels.round(values, kept) - values) ** 2))


@given(parts=st.lists(arrays, min_size=1, max_size=6))
def test_a_histogram_counts_everything_where_it_is(parts: list[NDArray[np.float32]]) -> None:
    found, values = histogram_of(*parts, bins=64), np.concatenate(parts)
    assert found.seen == Range(float(values.min()), float(values.max()))
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
    cuts = (
        cut_share(found, percentile, levels),
        cut_information(found, levels),
        cut_squared_error(found, levels),
    )
    for kept in cuts:
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
    kept = cut_share(found, percentile, SIGNED)
    assert kept.bound == pytest.approx(np.percentile(np.abs(values), percentile), rel=0.01)
    assert kept.low == -kept.high
    kept = cut_share(found, percentile, UNSIGNED)
    rest = (100 - percentile) / 2
    assert kept.low == pytest.approx(np.percentile(values, rest), rel=0.01)
    assert kept.high == pytest.approx(np.percentile(values, 100 - rest), rel=0.01)


def test_a_percentile_of_100_keeps_everything() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    found = histogram_of(values)
    assert cut_share(found, 100, UNSIGNED) == Range(values.min(), values.max())
    assert cut_share(found, 100, SIGNED).bound == np.abs(values).max()


@every_levels
@settings(max_examples=20)
@given(
    scale=st.floats(0.01, 100),
    centre=st.floats(-1, 1),
    kept=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
def test_the_squared_error_is_that_of_the_quantized_values(
    levels: Levels, scale: float, centre: float, kept: float, seed: int
) -> None:
    values = scale * np.random.default_rng(seed).normal(centre, 1, size=20_000)
    found = histogram_of(values)
    tried = Range(kept * found.seen.low, kept * found.seen.high)
    right = error_of(values, tried, levels)
    assert squared_error(found, tried, levels) == pytest.approx(right, rel=0.05)


@every_levels
@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "one-sided", "uniform", "zero"])
def test_the_range_of_least_squared_error_is_found(levels: Levels, kind: str) -> None:
    draw = np.random.default_rng(0)
    values = {
        "normal": draw.normal(size=20_000),
        "laplace": draw.laplace(size=20_000),
        "outlier": np.append(np.tile(draw.normal(size=20_000), 200), 60.0),
        "one-sided": np.maximum(draw.laplace(size=20_000), -0.17),
        "uniform": draw.uniform(-1, 1, size=20_000),
        "zero": np.zeros(10),
    }[kind]
    found = histogram_of(values)
    kept = cut_squared_error(found, levels)
    error, naive = error_of(values, kept, levels), error_of(values, found.seen, levels)
    shares = np.geomspace(1, 1 / 60, 30)
    ends = [(low, high) for low in shares for high in ([low] if levels.symmetric else shares)]
    tried = [Range(low * found.seen.low, high * found.seen.high) for low, high in ends]
    best = min(tried, key=lambda item: squared_error(found, item, levels))
    assert error <= naive * 1.001
    assert error <= error_of(values, best, levels) * 1.05
    if kind == "outlier":  # one in four millions: clipping it costs less than wide steps
        assert error < 0.3 * naive
    if kind == "uniform":
        assert kept.bound > 0.95


@every_levels
def test_information_is_worth_more_than_a_lonely_outlier(levels: Levels) -> None:
    draw = np.random.default_rng(0)
    values = np.append(draw.normal(size=100_000), 60.0)
    kept = cut_information(histogram_of(values), levels)
    assert 2 < kept.bound < 12
    uniform = cut_information(histogram_of(draw.uniform(-1, 1, size=100_000)), levels)
    assert uniform.bound > 0.9


@pytest.mark.parametrize("method", CUTS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["cpu", "symmetric"])
def test_the_ranges_of_every_method_stand_in_the_quantized_graph(
    method: Method,
    symmetric: bool,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    source, data = clip_towers.image, calibration_images(blobs(20), clip.spec.image)
    ranging = Ranging(method=method, percentile=99)
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
    for ranging in (EXTREMES, Ranging(method="mse")):
        bounds = activation_bounds(tmp_path / "fused.onnx", data, ranging, ("MatMul", "Gemm"))
        assert all(bounds[name] > 0 for name in attention)


def test_saved_ranges_are_those_that_onnxruntime_reads(tmp_path: Path) -> None:
    save_ranges({"x": Range(-0.5, 2.0), "y": Range(0.0, 1 / 3)}, tmp_path / "ranges.json")
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
        activation_ranges(tmp_path / "f.onnx", data, Ranging(method="mse"), ["product"])


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


@pytest.mark.parametrize("method", CUTS)
def test_memory_does_not_grow_with_the_data(method: Method, tmp_path: Path) -> None:
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
            activation_ranges(tmp_path / "f.onnx", data, Ranging(method=method), ["product"])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is loaded once
    assert peak(16) < 1.1 * peak(4)
