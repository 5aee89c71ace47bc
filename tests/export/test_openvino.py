"""OpenVINO reads the standard towers by itself, as a person without EdgeCLIP would."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.machine import detect_processor, has_int8_dot_products
from edgeclip.runtime.spec import Precision, Tower

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
Values = NDArray[np.generic]

# Without the first, OpenVINO computes in bfloat16 on processors that can.
CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
INPUTS: dict[Tower, str] = {"image": "pixel_values", "text": "input_ids"}
OUTPUTS: dict[Tower, str] = {"image": "image_embeds", "text": "text_embeds"}
INT8 = {
    "asymmetric": StaticInt8(symmetric=False, reduce_range=True),
    "symmetric": StaticInt8(symmetric=True),
}


@pytest.fixture(params=["clip", "convnext"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dual(family: str, request: pytest.FixtureRequest) -> DualEncoder:
    found: DualEncoder = request.getfixturevalue(family)
    return found


@pytest.fixture
def paths(family: str, request: pytest.FixtureRequest) -> TowerPaths:
    found: TowerPaths = request.getfixturevalue(f"{family}_towers")
    return found


def of_tower(paths: TowerPaths, tower: Tower) -> Path:
    return paths.image if tower == "image" else paths.text


def embed(path: Path, tower: Tower, values: Values) -> FloatArray:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", CONFIG)
    found: FloatArray = np.array(compiled({INPUTS[tower]: values})[OUTPUTS[tower]])
    return found


def calibration(tower: Tower, dual: DualEncoder, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, dual.spec.image)
    return calibration_texts(source, dual.text_tokenizer)


def inputs_of(tower: Tower, dual: DualEncoder, source: Source) -> Values:
    if tower == "image":
        return calibration_images(source, dual.spec.image).batch(0)
    captions = [str(source.caption(index)) for index in range(len(source))]
    return dual.text_tokenizer.encode(captions)


def torch_embeds(tower: Tower, dual: DualEncoder, values: Values) -> FloatArray:
    method = dual.embed_image if tower == "image" else dual.embed_text
    with torch.inference_mode():
        found: FloatArray = method(torch.from_numpy(values)).numpy()
    return found


@pytest.mark.parametrize("tower", ["image", "text"])
def test_fp32_is_what_torch_computes(
    tower: Tower, dual: DualEncoder, paths: TowerPaths, blobs: Make
) -> None:
    values = inputs_of(tower, dual, blobs(8))
    found = embed(of_tower(paths, tower), tower, values)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch_embeds(tower, dual, values), atol=1e-4)


def test_batch_and_length_are_free(dual: DualEncoder, paths: TowerPaths) -> None:
    captions = ["red", "a picture of a white blob", "blue blue blue"]
    ids = dual.text_tokenizer.encode(captions)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(paths.text), "CPU", CONFIG)
    together = np.array(compiled({"input_ids": ids})["text_embeds"])
    for number, caption in enumerate(captions):
        alone = dual.text_tokenizer.encode([caption])
        (found,) = np.array(compiled({"input_ids": alone})["text_embeds"])
        np.testing.assert_allclose(found, together[number], atol=1e-5)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", ["fp16", *INT8])
def test_lower_precisions_stay_inside_their_gates(
    kind: str, tower: Tower, dual: DualEncoder, paths: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    if kind == "symmetric" and not has_int8_dot_products(detect_processor().flags):
        pytest.skip("OpenVINO's sums of 8-bit products saturate on this processor")
    source, target = of_tower(paths, tower), tmp_path / "tower.onnx"
    precision: Precision = "fp16"
    if kind == "fp16":
        write_fp16(source, target)
    else:
        precision = "int8"
        write_int8(source, target, calibration(tower, dual, blobs(32, seed=1)), INT8[kind])
    values = inputs_of(tower, dual, blobs(16))
    near = cosines(embed(target, tower, values), torch_embeds(tower, dual, values))
    bounds = DEFAULT_BOUNDS[precision]
    assert near.mean() >= bounds.mean_cosine
    assert np.percentile(near, 1) >= bounds.p1_cosine
    assert near.min() < 1 - 1e-9  # it is the rounded tower that was read
