from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import calibration_images
from edgeclip.export.graph.graph_io import save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.node_groups import counted_gains, measured_gains, node_groups
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.runtime.device.device_profile import DeviceProfile
from tests.export.quantizing.small_graphs import batches, graph_of

Make = Callable[..., Source]
CPU = StaticInt8(symmetric=False, reduce_range=True)
SIDE = 16  # pixels


def test_gains_are_shares_of_the_float_towers_time(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    cpu_device: DeviceProfile,
    blobs: Make,
    tmp_path: Path,
) -> None:
    data = calibration_images(blobs(16, seed=1), clip.spec.image)
    quantize_graph(clip_towers.image, tmp_path / "q.onnx", CPU, data)
    groups = node_groups(clip_towers.image)
    feed = {"pixel_values": data.batch(0)[:1]}
    measured = measured_gains(clip_towers.image, tmp_path / "q.onnx", groups, feed, cpu_device)
    assert measured.measured
    assert [item.nodes for item in measured.groups] == [group.nodes for group in groups]
    assert all(abs(item.saved) < 1 for item in measured.groups)
    counted = counted_gains(clip_towers.image, groups, feed, cpu_device)
    assert not counted.measured
    shares = {item.nodes: item.saved for item in counted.groups}
    assert 0.3 < sum(shares.values()) <= 1
    (fc1,) = (group for group in groups if group.title == "layers.0.mlp.fc1")
    (out,) = (group for group in groups if group.title == "layers.0.self_attn.out_proj")
    assert shares[fc1.nodes] == pytest.approx(2 * shares[out.nodes])  # 32 x 64 against 32 x 32
    (wide,) = (group for group in groups if len(group.nodes) == 3)
    assert counted.of(wide.nodes[:1]) == pytest.approx(shares[wide.nodes] / 3)
    assert counted.of(["no such node"]) == 0


def convolutions() -> onnx.ModelProto:
    """Products whose names do not outlive ONNX Runtime: it merges them with what is behind them."""
    draw = np.random.default_rng(0)
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "k0", "c"], ["a"], "first", pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["b"], "relu"),
        make("Conv", ["b", "k1"], ["d"], "second", pads=[1, 1, 1, 1]),
        make("Add", ["b", "d"], ["e"], "residual"),
        make("Conv", ["e", "k2"], ["f"], "narrow"),
        make("GlobalAveragePool", ["f"], ["g"], "pool"),
        make("Flatten", ["g"], ["h"], "flat"),
        make("Gemm", ["h", "w0", "c0"], ["i"], "wide"),
        make("Relu", ["i"], ["j"], "relu of it"),
        make("MatMul", ["j", "w1"], ["k"], "last"),
        make("Add", ["k", "c"], ["y"], "bias"),
    ]
    shapes = {
        **{"k0": (32, 32, 3, 3), "k1": (32, 32, 3, 3), "k2": (64, 32, 1, 1), "c": (32,)},
        **{"w0": (64, 1024), "c0": (1024,), "w1": (1024, 32)},
    }
    weights = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    given = ["b", 32, SIDE, SIDE]
    return graph_of(nodes, weights, given=given, outputs={"y": ["b", 32]})


PIXELS = np.random.default_rng(1).normal(size=(8, 32, SIDE, SIDE)).astype(np.float32)
WORK = {
    "first": SIDE**2 * 32 * 32 * 9,
    "second": SIDE**2 * 32 * 32 * 9,
    "narrow": SIDE**2 * 32 * 64,
    "wide": 64 * 1024,
    "last": 1024 * 32,
}


def test_multiply_adds_are_found_whatever_products_are_merged_with(
    cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    save_graph(convolutions(), tmp_path / "f.onnx")
    groups = node_groups(tmp_path / "f.onnx")
    found = counted_gains(tmp_path / "f.onnx", groups, {"x": PIXELS[:1]}, cpu_device)
    whole = sum(WORK.values())
    assert {item.nodes[0]: item.saved for item in found.groups} == pytest.approx(
        {name: work / whole for name, work in WORK.items()}
    )


def test_times_are_found_whatever_products_are_merged_with(
    cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    """Against a graph without any of the products, each saves or costs all of its time."""
    path, int8, empty = (tmp_path / name for name in ("f.onnx", "int8.onnx", "empty.onnx"))
    save_graph(convolutions(), path)
    quantize_graph(path, int8, CPU, batches(PIXELS))
    exp = helper.make_node("Exp", ["x"], ["y"], "exp")
    shape = ["b", 32, SIDE, SIDE]
    save_graph(graph_of([exp], {}, given=shape, outputs={"y": shape}), empty)
    groups, feed = node_groups(path), {"x": PIXELS[:1]}
    spent = measured_gains(path, empty, groups, feed, cpu_device)
    assert min(item.saved for item in spent.groups) > 0
    assert sum(item.saved for item in spent.groups) <= 1
    cost = measured_gains(empty, int8, groups, feed, cpu_device)
    assert max(item.saved for item in cost.groups) < 0
