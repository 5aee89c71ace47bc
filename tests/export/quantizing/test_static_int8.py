"""Static int8 on CPUs: what is quantized, and how close it stays to fp32."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import calibration_images, calibration_texts
from edgeclip.export.graph.graph_io import data_path, load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphEdit
from edgeclip.export.graph.to_onnx import TowerPaths, add_label_head
from edgeclip.export.quantizing.config import StaticInt8, default_config
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.static_int8 import (
    quantizable_nodes,
    restore_float_readers,
    write_int8,
)
from edgeclip.runtime.bundle.index import LabelSet, cosines
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.spec import Tower
from tests.export.conftest import RunGraph
from tests.export.quantizing.small_graphs import batches, copy_of, fused, graph_of, run

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
CPU = StaticInt8(symmetric=False, reduce_range=True)
TENSORRT = StaticInt8(symmetric=True, float_precision="fp16")
SYMMETRIC = StaticInt8(symmetric=True)


def quantized(
    tower: Tower, dual: DualEncoder, paths: TowerPaths, source: Source, settings: StaticInt8
) -> Path:
    fp32 = paths.image if tower == "image" else paths.text
    target = fp32.with_name(f"{tower}_{settings.symmetric}_{settings.float_precision}.onnx")
    data = (
        calibration_images(source, dual.spec.image)
        if tower == "image"
        else calibration_texts(source, dual.text_tokenizer)
    )
    write_int8(fp32, target, data, settings)
    return target


def constants(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


@pytest.mark.parametrize("family", ["clip", "convnext"])
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("settings", [CPU, SYMMETRIC, TENSORRT], ids=["cpu", "fp32", "tensorrt"])
def test_int8_embeds_nearly_as_fp32(
    family: str,
    tower: Tower,
    settings: StaticInt8,
    blobs: Make,
    run_graph: RunGraph,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    path = quantized(tower, dual, paths, blobs(32, seed=1), settings)
    fp32 = paths.image if tower == "image" else paths.text
    test = blobs(8)
    values = (
        calibration_images(test, dual.spec.image).batch(0)
        if tower == "image"
        else dual.text_tokenizer.encode([str(test.caption(index)) for index in range(8)])
    )
    (found,) = run_graph(path, values).values()
    (reference,) = run_graph(fp32, values).values()
    assert cosines(found, reference).min() > 0.97
    # Static ranges: what else is in the batch does not matter.
    (alone,) = run_graph(path, values[3:4]).values()
    np.testing.assert_allclose(alone[0], found[3], atol=2e-3)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_only_products_with_constant_weights_are_quantized(
    tower: Tower, clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model = onnx.load(quantized(tower, clip, clip_towers, blobs(16), CPU))
    made_by = makers(model)
    readers = Counter[str]()
    plain = Counter[str]()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        from_int8 = [made_by[name].op_type for name in node.input if name in made_by]
        if "DequantizeLinear" in from_int8:
            assert node.op_type in ("MatMul", "Gemm")
            readers[node.op_type] += 1
        elif node.op_type == "MatMul":
            plain["MatMul"] += 1
    # Two layers with q, k, v, out, and two in the MLP; QK^T and AV of both stay float.
    assert readers == {"MatMul": 12, "Gemm": 1}
    assert plain == {"MatMul": 4}


def test_what_follows_a_fused_node_is_quantized_too(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    """Not its weights alone: ONNX cannot tell the type of what it reads."""
    model = load_graph(clip_towers.image)
    model = fused(model)
    assert any(node.op_type == "MultiHeadAttention" for node in model.graph.node)
    path = tmp_path / "fused.onnx"
    save_graph(model, path)
    data = calibration_images(blobs(16), clip.spec.image)
    write_int8(path, tmp_path / "q.onnx", data, CPU)
    written = onnx.load(tmp_path / "q.onnx")
    made_by, able = makers(written), set(quantizable_nodes(path))
    products = [node for node in written.graph.node if node.name in able]
    assert len(products) == len(able)
    for node in products:
        assert [made_by[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    assert not written.graph.value_info


def test_results_of_products_stay_float(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model = onnx.load(quantized("image", clip, clip_towers, blobs(16), CPU))
    made_by = makers(model)
    sources = [
        made_by[node.input[0]].op_type
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    ]
    assert sources
    assert not {"MatMul", "Gemm", "Conv", "Softmax"} & set(sources)


@pytest.mark.parametrize("settings", [CPU, TENSORRT], ids=["cpu", "tensorrt"])
def test_weights_are_symmetric_per_channel_int8(
    settings: StaticInt8, clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model = onnx.load(quantized("image", clip, clip_towers, blobs(16), settings))
    values = constants(model)
    limit = 64 if settings.reduce_range else 127
    weights = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in values:
            continue
        weight, scale, zero = (values[name] for name in node.input)
        if weight.dtype == np.int32:
            continue  # a bias
        axis = next(item.i for item in node.attribute if item.name == "axis")
        assert weight.dtype == np.int8
        assert scale.shape == (weight.shape[axis],)
        assert not zero.any()
        assert np.abs(weight.astype(int)).max() <= limit
        weights += 1
    assert weights == 13


@pytest.mark.parametrize("settings", [SYMMETRIC, TENSORRT], ids=["fp32", "tensorrt"])
def test_scales_have_the_type_of_all_that_is_not_int8(
    settings: StaticInt8, clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    model = onnx.load(quantized("text", clip, clip_towers, blobs(16), settings))
    values = constants(model)
    nodes = [node for node in model.graph.node if node.op_type.endswith("uantizeLinear")]
    assert nodes
    assert {values[node.input[1]].dtype for node in nodes} == {
        np.dtype(np.float16 if settings.float_precision == "fp16" else np.float32)
    }
    # No fp32 but at the end, which a cast leads to.
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    to_fp32 = [node for node in casts if node.attribute[0].i == TensorProto.FLOAT]
    assert len(to_fp32) == (1 if settings.float_precision == "fp16" else 0)


def test_ranges_come_from_the_calibration_data(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    first = quantized("text", clip, clip_towers, blobs(16), CPU).read_bytes()
    again = quantized("text", clip, clip_towers, blobs(16), CPU).read_bytes()
    other = quantized("text", clip, clip_towers, blobs(16, seed=5), CPU).read_bytes()
    assert first == again
    assert first != other


def test_patches_and_the_products_of_attention_are_not_among_the_nodes(
    clip_towers: TowerPaths,
) -> None:
    nodes = {node.name: node for node in onnx.load(clip_towers.image).graph.node}
    chosen = [nodes[name] for name in quantizable_nodes(clip_towers.image)]
    assert len(chosen) == 13
    assert "Conv" not in {node.op_type for node in chosen}


def test_dense_convolutions_are_quantized_with_their_results(
    blobs: Make, clip: DualEncoder, tmp_path: Path
) -> None:
    """Patches, then a dense and a depthwise convolution, then the mean of each channel."""
    draw = np.random.default_rng(0)
    weights = {"w1": (16, 3, 4, 4), "w2": (16, 16, 3, 3), "w3": (16, 1, 3, 3)}
    make = helper.make_node
    nodes = [
        make("Conv", ["pixel_values", "w1"], ["a"], "patches", kernel_shape=[4, 4], strides=[4, 4]),
        make("Conv", ["a", "w2"], ["b"], "dense", kernel_shape=[3, 3], strides=[1, 1]),
        make("Conv", ["b", "w3"], ["c"], "depthwise", kernel_shape=[3, 3], group=16),
        make("GlobalAveragePool", ["c"], ["d"], "pool"),
        make("Flatten", ["d"], ["image_embeds"], "flatten"),
    ]
    model = graph_of(
        nodes,
        {name: draw.normal(size=shape) for name, shape in weights.items()},
        name="pixel_values",
        given=["batch", 3, 32, 32],
        outputs={"image_embeds": ["batch", 16]},
    )
    onnx.save(model, tmp_path / "f.onnx")
    assert quantizable_nodes(tmp_path / "f.onnx") == ["dense"]
    data = calibration_images(blobs(8), clip.spec.image)
    write_int8(tmp_path / "f.onnx", tmp_path / "int8.onnx", data, CPU)
    model = onnx.load(tmp_path / "int8.onnx")
    made_by = makers(model)
    (dense,) = (node for node in model.graph.node if node.name == "dense")
    assert [made_by[name].op_type for name in dense.input] == ["DequantizeLinear"] * 2
    readers = [node.op_type for node in model.graph.node if dense.output[0] in node.input]
    assert readers == ["QuantizeLinear"]


def test_only_patches_and_depthwise_convolutions_stay_float(tmp_path: Path) -> None:
    """As in a ResNet or ResNeXt: single pixels and groups are products like others."""
    kinds: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "patches": ((8, 3, 4, 4), {"strides": [4, 4]}),
        "pixels": ((8, 8, 1, 1), {"strides": [1, 1]}),
        "fewer": ((8, 8, 1, 1), {"strides": [2, 2]}),
        "bare": ((8, 8, 1, 1), {}),
        "groups": ((8, 4, 3, 3), {"group": 2}),
        "depthwise": ((8, 1, 1, 1), {"group": 8}),
    }
    nodes, given = [], "pixel_values"
    for name, (_, settings) in kinds.items():
        made = "image_embeds" if name == "depthwise" else f"{name}_made"
        nodes.append(helper.make_node("Conv", [given, f"{name}_w"], [made], name, **settings))
        given = made
    draw = np.random.default_rng(0)
    model = graph_of(
        nodes,
        {f"{name}_w": draw.normal(size=shape) for name, (shape, _) in kinds.items()},
        name="pixel_values",
        given=["batch", 3, 32, 32],
        outputs={"image_embeds": ["batch", 8, 2, 2]},
    )
    onnx.save(model, tmp_path / "f.onnx")
    assert quantizable_nodes(tmp_path / "f.onnx") == ["pixels", "fewer", "bare", "groups"]


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("x86-avx2", StaticInt8(symmetric=False, reduce_range=True)),
        ("x86-avx512-vnni", StaticInt8(symmetric=False, reduce_range=False)),
        ("arm64-dotprod", StaticInt8(symmetric=False, reduce_range=False)),
        ("jetson-orin-nano", StaticInt8(symmetric=True, float_precision="fp16")),
        ("rtx-4000-ada", StaticInt8(symmetric=True, float_precision="fp16")),
    ],
)
def test_settings_follow_the_device(device: str, settings: StaticInt8) -> None:
    assert default_config("int8", load_device(device)) == settings


def test_settings_of_openvino_are_those_of_a_cpu() -> None:
    device = replace(load_device("x86-avx512-vnni"), engine="openvino")
    assert default_config("int8", device) == StaticInt8(symmetric=False)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="reduce_range"):
        StaticInt8(symmetric=True, reduce_range=True)
    with pytest.raises(ValueError, match="float_precision"):
        StaticInt8(symmetric=False, float_precision="fp16")


def test_labels_at_the_end_of_a_tower_are_not_quantized(
    clip_towers: TowerPaths, tmp_path: Path
) -> None:
    path = Path(shutil.copy(clip_towers.image, tmp_path / "labelled.onnx"))
    labels = LabelSet(names=("a", "b"), embeddings=np.eye(2, 16, dtype=np.float32), space="7" * 64)
    add_label_head(path, labels, logit_scale=100)
    assert quantizable_nodes(path) == quantizable_nodes(clip_towers.image)


@pytest.mark.parametrize("settings", [CPU, TENSORRT], ids=["cpu", "tensorrt"])
def test_a_tower_with_its_weights_in_a_second_file_gives_the_same(
    settings: StaticInt8, clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    save_graph(load_graph(clip_towers.text), tmp_path / "large.onnx", limit=1000)
    assert data_path(tmp_path / "large.onnx").exists()
    data = calibration_texts(blobs(16), clip.text_tokenizer)
    write_int8(tmp_path / "large.onnx", tmp_path / "int8.onnx", data, settings)
    whole = quantized("text", clip, clip_towers, blobs(16), settings)
    assert (tmp_path / "int8.onnx").read_bytes() == whole.read_bytes()


def test_a_graph_without_weights_is_refused(blobs: Make, clip: DualEncoder, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [None, 3, 32, 32])
    output = helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, [None, 3, 32, 32])
    node = helper.make_node("Relu", ["pixel_values"], ["image_embeds"], "relu")
    graph = helper.make_graph([node], "relu", [value], [output])
    onnx.save(helper.make_model(graph), tmp_path / "relu.onnx")
    data = calibration_images(blobs(2), clip.spec.image)
    with pytest.raises(ExportError, match="no MatMul, Gemm or Conv"):
        write_int8(tmp_path / "relu.onnx", tmp_path / "int8.onnx", data, CPU)
    assert not (tmp_path / "int8.onnx").exists()


make = helper.make_node
DRAW = np.random.default_rng(0)


def post_norm() -> onnx.ModelProto:
    """As in a BERT: a norm is read by two products and by the sum behind them."""
    weights = {
        "scale": np.ones(16),
        "w1": DRAW.normal(size=(16, 32)),
        "w2": DRAW.normal(size=(16, 32)),
        "w3": DRAW.normal(size=(32, 16)) / 10_000,
    }
    nodes = [
        make("LayerNormalization", ["x", "scale"], ["normed"], "norm"),
        make("MatMul", ["normed", "w1"], ["a"], "first"),
        make("MatMul", ["normed", "w2"], ["b"], "second"),
        make("Mul", ["a", "b"], ["ab"], "gate"),
        make("MatMul", ["ab", "w3"], ["c"], "third"),
        make("Add", ["normed", "c"], ["y"], "residual"),
    ]
    return graph_of(nodes, weights, given=["n", 16], outputs={"y": ["n", 16]})


@pytest.mark.parametrize("kept", [(), ("second",)], ids=["whole", "one product in float"])
def test_a_residual_sum_reads_floats(kept: tuple[str, ...], tmp_path: Path) -> None:
    model, values = post_norm(), DRAW.normal(size=(64, 16)).astype(np.float32)
    save_graph(copy_of(model), tmp_path / "f.onnx")
    config = StaticInt8(symmetric=False, kept=kept)
    quantize_graph(tmp_path / "f.onnx", tmp_path / "q.onnx", config, batches(values))
    quantized = load_graph(tmp_path / "q.onnx")
    edit = GraphEdit(quantized)
    readers = {node.name for node in edit.readers("normed")}
    assert {"residual", *kept} < readers
    rounded = {node.name for node in quantized.graph.node if node.input[0].startswith("normed_")}
    assert {"first", "second", *kept} - set(kept) <= rounded
    (found,), (right,) = run(quantized, values), run(model, values)
    # The norm itself goes through; in 8 bits it would be off by up to 0.01.
    assert 0 < np.abs(found - right).max() < 0.003


def test_chains_of_convolutions_are_left_alone(tmp_path: Path) -> None:
    weights = {"w1": DRAW.normal(size=(4, 4, 3, 3)), "w2": DRAW.normal(size=(4, 4, 3, 3))}
    nodes = [
        make("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["r"], "act"),
        make("Conv", ["r", "w2"], ["b"], "second", pads=[1, 1, 1, 1]),
        make("Add", ["r", "b"], ["y"], "residual"),
    ]
    shape = ["n", 4, 8, 8]
    model = graph_of(nodes, weights, given=shape, outputs={"y": shape})
    save_graph(model, tmp_path / "f.onnx")
    data = batches(DRAW.normal(size=(16, 4, 8, 8)).astype(np.float32))
    config = StaticInt8(symmetric=False)
    quantize_graph(tmp_path / "f.onnx", tmp_path / "q.onnx", config, data)
    made = load_graph(tmp_path / "q.onnx")
    (residual,) = (node for node in made.graph.node if node.name == "residual")
    assert all(name.endswith("DequantizeLinear_Output") for name in residual.input)
    again = copy_of(made)
    restore_float_readers(again)
    assert again == made
