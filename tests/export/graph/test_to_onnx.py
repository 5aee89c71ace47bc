from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.embedders import graph_embedder, torch_embedder
from edgeclip.export.graph.to_onnx import PLAIN_OPSET, TowerPaths, export_tower
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Tower

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
    ids[:, 0], ids[:, -1] = dual.spec.text.bos_id, dual.spec.text.eos_id
    found = graph_embedder(paths.graph("text"), dual.image_spec, cpu_device)(ids)
    np.testing.assert_allclose(found, torch_embedder(dual, "text")(ids), atol=EXACT)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_same_weights_give_the_same_bytes(
    tower: Tower, clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path
) -> None:
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
