"""Every cut of real towers: where it is, and that its halves compute what the whole does."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.build_bundle import BuiltBundle
from edgeclip.export.cuts.cut_points import FoundCut, find_cuts
from edgeclip.export.cuts.cut_tower import cut_head, cut_tail, prepare_for_cutting
from edgeclip.export.graph.graph_io import load_graph, write_unchecked
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.spec import ImageSpec, Precision
from edgeclip.runtime.towers.tower_runner import tower_feed
from tests.export.quantizing.small_graphs import graph_of

pytestmark = pytest.mark.slow

SIZE = 32
IMAGE = ImageSpec(size=SIZE, resize=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PIXELS = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
Opener = Callable[[Path], Engine]


@pytest.fixture
def opener(cpu_device: DeviceProfile) -> Opener:
    return partial(open_engine, device=cpu_device)


def feed(count: int, form: Any = "float32-nchw") -> dict[str, NDArray[Any]]:
    return tower_feed(PIXELS[:count], "image", form, IMAGE)


def cuts_of(
    model: onnx.ModelProto, opener: Opener, form: Any = "float32-nchw"
) -> tuple[onnx.ModelProto, tuple[FoundCut, ...]]:
    model = prepare_for_cutting(model, "image_embeds", feed(3, form), opener)
    return model, find_cuts(model, feed(3, form), SIZE, opener)


def opened(model: onnx.ModelProto, path: Path, opener: Opener) -> Engine:
    write_unchecked(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return opener(path)


def differences(
    whole: Path, folder: Path, opener: Opener, form: Any = "float32-nchw"
) -> dict[str, float]:
    """The largest change of a value of an embedding by each cut, at batches 1 and 3."""
    model, found = cuts_of(load_graph(whole), opener, form)
    found_by_name = {}
    for cut in found:
        behind = opened(cut_tail(model, cut), folder / "tail.onnx", opener)
        before = (
            opened(cut_head(model, cut), folder / "head.onnx", opener) if cut.point.number else None
        )
        worst = 0.0
        for count in (1, 3):
            given = feed(count, form)
            if before is not None:
                given = before.run(given)
                assert given["cut"].shape == (count, *cut.point.shape)
                assert given["cut"].dtype == np.float32
            (expected,) = opener(whole).run(feed(count, form)).values()
            worst = max(worst, float(np.abs(behind.run(given)["image_embeds"] - expected).max()))
        found_by_name[cut.point.name] = worst
    return found_by_name


def test_halves_of_a_clip_tower(clip_towers: TowerPaths, tmp_path: Path, opener: Opener) -> None:
    found = differences(clip_towers.image, tmp_path, opener)
    assert list(found) == [
        "pixels",
        "before block 0",
        "in block 0",
        "after block 0",
        "in block 1",
        "after block 1",
    ]
    assert max(found.values()) < 1e-4


def test_halves_of_a_convnext_tower(
    convnext_towers: TowerPaths, tmp_path: Path, opener: Opener
) -> None:
    found = differences(convnext_towers.image, tmp_path, opener)
    assert list(found) == [
        "pixels",
        "before block 0.0",
        "after block 0.0",
        "before block 1.0",
        "after block 1.0",
    ]
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_halves_in_every_precision(
    precision: Precision, built: BuiltBundle, tmp_path: Path, opener: Opener
) -> None:
    path = built.bundle.tower_path("image", precision)
    found = differences(path, tmp_path, opener, "uint8-nhwc")
    assert {"pixels", "before block 0", "after block 0"} <= set(found)
    # A rounding error on the way can become one step of int8.
    assert max(found.values()) < (1e-4 if precision == "fp32" else 1e-2)


def test_block_boundaries_survive_the_fusions_of_the_device_graph(
    clip_towers: TowerPaths, tmp_path: Path, opener: Opener
) -> None:
    fused = ir.from_proto(load_graph(clip_towers.image))
    for item in PASSES:
        fused = ir.from_proto(item.apply(ir.to_proto(fused))[0])
    path = tmp_path / "fused.onnx"
    write_unchecked(ir.to_proto(fused), path)
    kinds = {node.op_type for node in load_graph(path).graph.node}
    assert {"SkipLayerNormalization", "MultiHeadAttention"} <= kinds
    found = differences(path, tmp_path, opener)
    assert {"before block 0", "in block 0", "after block 0", "after block 1"} <= set(found)
    assert max(found.values()) < 1e-4


def test_graph_for_one_batch_size_with_patch_features(
    clip: DualEncoder, tmp_path: Path, opener: Opener
) -> None:
    path = tmp_path / "static.onnx"
    form = GraphForm(pixels="uint8-nhwc", batch=2, patch_features=True)
    export_tower(clip, "image", path, form)
    given = feed(2, "uint8-nhwc")
    model = prepare_for_cutting(load_graph(path), "image_embeds", given, opener)
    expected = opener(path).run(given)["image_embeds"]
    found = find_cuts(model, given, SIZE, opener)
    assert {"after block 0", "in block 1"} <= {cut.point.name for cut in found}
    for cut in found[1:]:
        value = opened(cut_head(model, cut), tmp_path / "head.onnx", opener).run(given)
        behind = opened(cut_tail(model, cut), tmp_path / "tail.onnx", opener)
        np.testing.assert_allclose(behind.run(value)["image_embeds"], expected, atol=1e-4)


def test_channels_of_tokens_come_last_and_of_maps_first(
    clip_towers: TowerPaths, convnext_towers: TowerPaths, opener: Opener
) -> None:
    _, tokens = cuts_of(load_graph(clip_towers.image), opener)
    assert {cut.point.axis for cut in tokens if len(cut.point.shape) == 2} == {2}
    _, maps = cuts_of(load_graph(convnext_towers.image), opener)
    after = next(cut.point for cut in maps if cut.point.name == "after block 0.0")
    assert after.axis == 1
    assert after.shape[0] == 16


def test_head_and_tail_share_no_heavy_node(clip_towers: TowerPaths, opener: Opener) -> None:
    model, found = cuts_of(load_graph(clip_towers.image), opener)
    total = sum(node.op_type in ("MatMul", "Gemm", "Conv") for node in model.graph.node)
    for cut in found[1:]:
        halves = (cut_head(model, cut), cut_tail(model, cut))
        counts = [
            sum(node.op_type in ("MatMul", "Gemm", "Conv") for node in half.graph.node)
            for half in halves
        ]
        assert min(counts) > 0
        assert sum(counts) == total


def residual_model(heavy_between: bool) -> onnx.ModelProto:
    """x -> A -> (+ skip over B) -> C, or with a slice of the sum before C."""
    constants = {
        "a": np.eye(12, 8, dtype=np.float32),
        "b": np.eye(8, dtype=np.float32),
        "c": np.ones((8 if heavy_between else 4, 4), np.float32),
        "ends": np.array([4]),
        "starts": np.array([0]),
        "axes": np.array([1]),
    }
    nodes = [
        helper.make_node("MatMul", ["pixel_values", "a"], ["first"]),
        helper.make_node("MatMul", ["first", "b"], ["branch"]),
        helper.make_node("Add", ["first", "branch"], ["summed"]),
    ]
    last = "summed"
    if not heavy_between:
        nodes.append(helper.make_node("Slice", ["summed", "starts", "ends", "axes"], ["small"]))
        last = "small"
    nodes.append(helper.make_node("MatMul", [last, "c"], ["image_embeds"]))
    outputs = {"image_embeds": ["batch", 4]}
    return graph_of(nodes, constants, name="pixel_values", given=["batch", 12], outputs=outputs)


@pytest.mark.parametrize(("heavy_between", "expected"), [(True, "summed"), (False, "small")])
def test_no_cut_through_a_skip_and_the_smallest_of_equals(
    heavy_between: bool, expected: str, opener: Opener
) -> None:
    given = {"pixel_values": np.ones((3, 12), np.float32)}
    found = find_cuts(residual_model(heavy_between), given, 2, opener)
    # Nothing between `first` and `summed`: two values cross there.
    assert [cut.value for cut in found] == ["pixel_values", "first", expected]
    assert [cut.point.name for cut in found] == ["pixels", "cut 1", "cut 2"]


def test_tower_of_one_product_can_only_be_cut_before_it(tmp_path: Path, opener: Opener) -> None:
    model = graph_of(
        [helper.make_node("MatMul", ["pixel_values", "a"], ["image_embeds"])],
        {"a": np.ones((12, 4))},
        name="pixel_values",
        given=["batch", 12],
        outputs={"image_embeds": ["batch", 4]},
    )
    found = find_cuts(model, {"pixel_values": np.ones((2, 12), np.float32)}, 2, opener)
    assert [cut.point.name for cut in found] == ["pixels"]
