"""What graphs take and give in every form: operator set, pixels, batch, outputs."""

from collections.abc import Callable
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
from edgeclip.export.graph.embedders import graph_embedder, torch_embedder
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.to_onnx import (
    PLAIN_OPSET,
    TENSORRT_OPSET,
    GraphForm,
    export_tower,
    export_towers,
)
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.inputs.preprocess import normalise

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
    from edgeclip.export.graph.export_modules import _patch_map

    with pytest.raises(ExportError, match="square grid"):
        _patch_map(torch.zeros(1, 3 * 3 + 2, 8))


def test_a_text_tower_has_no_patches(clip: DualEncoder) -> None:
    module = tower_module(clip, "text", patch_features=True)
    assert module(torch.tensor([[1, 2]])).shape == (1, 16)
