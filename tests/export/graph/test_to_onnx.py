"""Export towers to ONNX, and fold the uint8 input into the graph."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import to_onnx
from edgeclip.export.graph.embedders import graph_embedder, torch_embedder
from edgeclip.export.graph.export_modules import patch_map, tower_module
from edgeclip.export.graph.to_onnx import (
    PLAIN_OPSET,
    TENSORRT_OPSET,
    GraphForm,
    TowerPaths,
    add_label_head,
    capture,
    export_tower,
    export_towers,
)
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.inputs.preprocess import normalise
from edgeclip.runtime.spec import Tower

pytestmark = pytest.mark.slow

EXACT = 1e-5
TEXTS = ["red", "", "picture of a teal blob", "blue green red white"]


def shape_of(value: onnx.ValueInfoProto) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("towers", ["clip_towers", "convnext_towers"])
def test_names_and_shapes_are_those_that_others_read(
    towers: str, request: pytest.FixtureRequest
) -> None:
    paths: TowerPaths = request.getfixturevalue(towers)
    image, text = onnx.load(paths.image).graph, onnx.load(paths.text).graph
    assert (paths.image.name, paths.text.name) == ("vision_model.onnx", "text_model.onnx")
    assert [(v.name, shape_of(v)) for v in image.input] == [("pixel_values", ["batch", 3, 32, 32])]
    assert [(v.name, shape_of(v)) for v in image.output] == [("image_embeds", ["batch", 16])]
    assert [(v.name, shape_of(v)) for v in text.input] == [("input_ids", ["batch", "length"])]
    assert [(v.name, shape_of(v)) for v in text.output] == [("text_embeds", ["batch", 16])]
    assert text.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert image.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("towers", ["clip_towers", "convnext_towers"])
def test_graphs_are_clean_and_made_of_plain_operators(
    towers: str, request: pytest.FixtureRequest
) -> None:
    paths: TowerPaths = request.getfixturevalue(towers)
    for path in (paths.image, paths.text):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(item.domain, item.version) for item in model.opset_import] == [("", PLAIN_OPSET)]
        assert not model.graph.value_info
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert b"site-packages" not in path.read_bytes()
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["LayerNormalization"] > 0
        assert "Attention" not in kinds


def test_attention_is_matmul_and_softmax(clip_towers: TowerPaths) -> None:
    kinds = Counter(node.op_type for node in onnx.load(clip_towers.text).graph.node)
    # Each of the two layers: q, k, v, QK^T, AV, out and two of the MLP; the projection is a Gemm.
    assert (kinds["MatMul"], kinds["Softmax"], kinds["Gemm"]) == (16, 2, 1)


def test_mask_constants_fit_fp16(clip_towers: TowerPaths, convnext_towers: TowerPaths) -> None:
    for path in (clip_towers.text, convnext_towers.text):
        for tensor in onnx.load(path).graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.size:
                assert values.min() >= -1e4


@pytest.mark.parametrize("family", ["clip", "convnext"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_images_embed_as_in_torch(
    family: str, count: int, cpu_device: DeviceProfile, request: pytest.FixtureRequest
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    found = graph_embedder(paths.graph("image"), dual.image_spec, cpu_device)(pixels(count))
    np.testing.assert_allclose(found, torch_embedder(dual, "image")(pixels(count)), atol=EXACT)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("family", ["clip", "convnext"])
def test_texts_embed_as_in_torch_alone_and_together(
    family: str, cpu_device: DeviceProfile, request: pytest.FixtureRequest
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    embed = graph_embedder(paths.graph("text"), dual.image_spec, cpu_device)
    reference = torch_embedder(dual, "text")
    together = embed(dual.text_tokenizer.encode(TEXTS))
    np.testing.assert_allclose(together, reference(dual.text_tokenizer.encode(TEXTS)), atol=EXACT)
    for text, expected in zip(TEXTS, together, strict=True):
        ids = dual.text_tokenizer.encode([text])
        np.testing.assert_allclose(embed(ids)[0], expected, atol=EXACT)
        np.testing.assert_allclose(reference(ids)[0], expected, atol=EXACT)


@pytest.mark.parametrize("family", ["clip", "convnext"])
@pytest.mark.parametrize("length", [2, 3, 10, 23, 24])
def test_every_text_length_up_to_the_context_runs(
    family: str, length: int, cpu_device: DeviceProfile, request: pytest.FixtureRequest
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    ids = np.full((3, length), 40, dtype=np.int64)
    (first,), (last,) = dual.spec.text.frame
    ids[:, 0], ids[:, -1] = first, last
    found = graph_embedder(paths.graph("text"), dual.image_spec, cpu_device)(ids)
    np.testing.assert_allclose(found, torch_embedder(dual, "text")(ids), atol=EXACT)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_same_weights_give_the_same_bytes(
    tower: Tower,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(to_onnx, "capture", capture)  # in place of `captured_once`
    export_tower(clip, tower, tmp_path / "again.onnx")
    first = clip_towers.image if tower == "image" else clip_towers.text
    assert (tmp_path / "again.onnx").read_bytes() == first.read_bytes()


class _FixedBatch(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * len(hidden)


class _DependsOnValues(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if hidden.sum() > 0 else -hidden


@pytest.mark.parametrize(
    ("end", "message"),
    [(_FixedBatch(), "for fixed sizes"), (_DependsOnValues(), "torch cannot export the image")],
)
def test_a_model_that_cannot_be_captured_is_one_clear_error(
    end: torch.nn.Module, message: str, clip: DualEncoder, tmp_path: Path
) -> None:
    student = deepcopy(clip)
    plain = student.model.visual_projection
    assert isinstance(plain, torch.nn.Module)
    student.model.visual_projection = torch.nn.Sequential(plain, end)
    with pytest.raises(ExportError, match=message) as caught:
        export_tower(student, "image", tmp_path / "tower.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tower.onnx").exists()


class _OwnLayerNorm(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        centred = hidden - hidden.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def test_a_layer_norm_taken_apart_is_refused(clip: DualEncoder, tmp_path: Path) -> None:
    student = deepcopy(clip)
    vision: Any = student.model.vision_model
    vision.post_layernorm = _OwnLayerNorm()
    with pytest.raises(ExportError, match="would overflow in fp16"):
        export_tower(student, "image", tmp_path / "tower.onnx")


RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]
FAMILIES = pytest.mark.parametrize("family", ["clip", "convnext"])


def crops(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_the_form_follows_the_device() -> None:
    jetson = load_device("jetson-orin-nano")
    assert GraphForm.for_device(jetson) == GraphForm(opset=TENSORRT_OPSET, pixels="uint8-nhwc")
    assert GraphForm.for_device(load_device("web")) == GraphForm(opset=PLAIN_OPSET)
    fixed = replace(jetson, batch_min=4, batch_best=4, batch_max=4)
    assert GraphForm.for_device(fixed).batch == 4
    assert GraphForm.for_device(jetson, patch_features=True).patch_features


@FAMILIES
@pytest.mark.parametrize("opset", [PLAIN_OPSET, TENSORRT_OPSET])
def test_the_device_form_takes_uint8_and_embeds_the_same(
    family: str, opset: int, tmp_path: Path, cpu_device: DeviceProfile, request: Any
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths = export_towers(dual, tmp_path, GraphForm(opset=opset, pixels="uint8-nhwc"))
    assert paths.image.name == "vision_device.onnx"
    model = onnx.load(paths.image)
    (given,) = model.graph.input
    assert given.name == "pixels"
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert model.opset_import[0].version == opset
    # Folded: nothing between the pixels and the convolution but a cast and a transposition.
    assert [node.op_type for node in model.graph.node][:2] == ["Cast", "Transpose"]
    readers = {node.op_type for node in model.graph.node if "pixels_nchw" in node.input}
    assert readers == {"Conv", "Shape"}
    for count in (1, 3):
        found = graph_embedder(paths.graph("image"), dual.image_spec, cpu_device)(crops(count))
        np.testing.assert_allclose(found, torch_embedder(dual, "image")(crops(count)), atol=2e-6)


def test_padding_is_not_folded_into_the_convolution(
    clip: DualEncoder, tmp_path: Path, run_graph: RunGraph
) -> None:
    """A stem that pads sees zeros of the normalised picture, not of the raw one."""
    from edgeclip.export.graph.to_onnx import to_device_form

    export_tower(clip, "image", tmp_path / "standard.onnx")
    model = onnx.load(tmp_path / "standard.onnx")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    kept = [item for item in conv.attribute if item.name not in ("pads", "strides")]
    del conv.attribute[:]
    conv.attribute.extend(kept)
    # Four more columns and rows with a stride of 9 give the same four by four patches.
    conv.attribute.append(onnx.helper.make_attribute("pads", [2, 2, 2, 2]))
    conv.attribute.append(onnx.helper.make_attribute("strides", [9, 9]))
    onnx.save(model, tmp_path / "padded.onnx")
    to_device_form(model, clip.image_spec)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "device.onnx")
    assert [node.op_type for node in model.graph.node][:4] == ["Cast", "Transpose", "Mul", "Add"]
    (expected,) = run_graph(tmp_path / "padded.onnx", normalise(crops(2), clip.image_spec)).values()
    (found,) = run_graph(tmp_path / "device.onnx", crops(2)).values()
    np.testing.assert_allclose(found, expected, atol=2e-6)


@FAMILIES
@pytest.mark.parametrize("pixels", ["uint8-nhwc", "float32-nchw"])
def test_a_static_graph_takes_one_batch_size_and_embeds_any_number(
    family: str, pixels: Any, tmp_path: Path, cpu_device: DeviceProfile, request: Any
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths = export_towers(dual, tmp_path, GraphForm(batch=2, pixels=pixels))
    for path in (paths.image, paths.text):
        for value in (*onnx.load(path).graph.input, *onnx.load(path).graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_value == 2
    device = replace(cpu_device, batch_min=2, batch_best=2, batch_max=2)
    ids = dual.text_tokenizer.encode(["picture 1: red", "blue", "pink teal red"])
    for tower, values in (("image", crops(3)), ("text", ids)):
        found = graph_embedder(paths.graph(tower), dual.image_spec, device)(values)  # type: ignore[arg-type]
        expected = torch_embedder(dual, tower)(values)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, atol=2e-6)


@FAMILIES
def test_patch_features_are_the_last_hidden_states(
    family: str, tmp_path: Path, run_graph: RunGraph, request: Any
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    form = GraphForm(patch_features=True, pixels="uint8-nhwc")
    export_tower(dual, "image", tmp_path / "image.onnx", form)
    outputs = run_graph(tmp_path / "image.onnx", crops(2))
    given = torch.from_numpy(normalise(crops(2), dual.image_spec))
    with torch.inference_mode():
        hidden = dual.model.vision_model(pixel_values=given).last_hidden_state.numpy()  # type: ignore[operator]
    # Both have a grid of four by four and a width of 32.
    if family == "clip":
        expected = hidden[:, 1:].reshape(2, 4, 4, 32)  # behind the class token, row by row
    else:
        expected = hidden.transpose(0, 2, 3, 1)
    assert outputs["patch_features"].shape == (2, 4, 4, 32)
    np.testing.assert_allclose(outputs["patch_features"], expected, atol=2e-5)
    embeds = torch_embedder(dual, "image")(crops(2))
    np.testing.assert_allclose(outputs["image_embeds"], embeds, atol=2e-6)


def test_patches_without_a_grid_are_refused() -> None:
    with pytest.raises(ExportError, match="square grid"):
        patch_map(torch.zeros(1, 3 * 3 + 2, 8))


def test_a_text_tower_has_no_patches(clip: DualEncoder) -> None:
    module = tower_module(clip, "text", patch_features=True)
    assert module(torch.tensor([[1, 2]])).shape == (1, 16)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_head_gives_the_best_label_and_its_share(
    precision: str, clip: DualEncoder, tmp_path: Path, run_graph: RunGraph
) -> None:
    draw = np.random.default_rng(0)
    embeddings = draw.normal(size=(5, 16)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = LabelSet(names=tuple("abcde"), embeddings=embeddings, space="7" * 64)
    path = tmp_path / "image.onnx"
    export_tower(clip, "image", path)
    if precision == "fp16":
        write_fp16(path, path)
    pixels = draw.normal(size=(4, 3, 32, 32)).astype(np.float32)
    before = run_graph(path, pixels)["image_embeds"]
    add_label_head(path, labels, logit_scale=20.0)
    after = run_graph(path, pixels)
    np.testing.assert_array_equal(after["image_embeds"], before)
    logits = 20.0 * before @ embeddings.T
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert after["label_index"].dtype == np.int64
    np.testing.assert_array_equal(after["label_index"], logits.argmax(axis=1))
    np.testing.assert_allclose(after["label_score"], shares.max(axis=1), rtol=1e-4)
