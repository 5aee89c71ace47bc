"""Every family in every precision for TensorRT: symmetric, typed, close to fp32, and built."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from transformers import (
    BertConfig,
    BertModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.to_onnx import GraphForm, export_towers
from edgeclip.export.quantizing.config import Float8, default_config
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.bundle.engine_records import GraphSource
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_library import open_library
from edgeclip.runtime.spec import Tower

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]
Reduced = Literal["fp16", "int8", "fp8"]

FAMILIES = ("clip", "convnext", "vit")
AMPERE, ADA, BLACKWELL = "rtx-a2000", "rtx-4000-ada", "rtx-blackwell"  # SM86, SM89, SM120
DEVICES: dict[Reduced, tuple[str, ...]] = {
    "fp16": (AMPERE, ADA, BLACKWELL),
    "int8": (AMPERE, ADA, BLACKWELL),
    "fp8": (ADA, BLACKWELL),
}
_GRID = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


@dataclass(frozen=True, slots=True)
class Graphs:
    """Both towers of a family as a TensorRT device wants them, and what they see."""

    dual: DualEncoder
    folder: Path
    inputs: dict[Tower, NDArray[Any]]

    def path(self, tower: Tower, precision: str) -> Path:
        return self.folder / f"{tower}_{precision}.onnx"


def tiny_vit(clip: DualEncoder) -> DualEncoder:
    """A ViT beside a BERT, with the specs of the tiny CLIP."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    text = clip.spec.text
    vision = ViTConfig(image_size=clip.spec.image.size, patch_size=8, **shape)
    bert = BertConfig(
        vocab_size=len(clip.tokenizer),
        max_position_embeddings=text.context_length,
        pad_token_id=text.pad_id,
        **shape,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, bert, projection_dim=16)
    model = VisionTextDualEncoderModel(
        config, vision_model=ViTModel(vision), text_model=BertModel(bert)
    )
    return DualEncoder(model.eval(), clip.spec.image, clip.tokenizer)


@pytest.fixture(scope="module", params=FAMILIES)
def graphs(
    request: pytest.FixtureRequest,
    clip: DualEncoder,
    convnext: DualEncoder,
    blobs: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> Graphs:
    dual = {"clip": clip, "convnext": convnext}.get(request.param) or tiny_vit(clip)
    folder = tmp_path_factory.mktemp(request.param)
    towers = export_towers(dual, folder, GraphForm.for_device(load_device(ADA)))
    settings = default_config("int8", load_device(ADA))
    inputs: dict[Tower, NDArray[Any]] = {}
    made = Graphs(dual, folder, inputs)
    for tower in ("image", "text"):
        data = _data(dual, tower, blobs(24, seed=1))
        inputs[tower] = _data(dual, tower, blobs(8)).batch(0)
        source = towers.graph(tower).path.rename(made.path(tower, "fp32"))
        write_fp16(source, made.path(tower, "fp16"), data)
        write_int8(source, made.path(tower, "int8"), data, settings)
        quantize_graph(source, made.path(tower, "fp8"), Float8(), data)
    return made


def _data(dual: DualEncoder, tower: Tower, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, dual.spec.image, "uint8-nhwc")
    return calibration_texts(source, dual.text_tokenizer)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_quantized_graphs_are_fully_symmetric(
    graphs: Graphs, tower: Tower, precision: Reduced
) -> None:
    model = onnx.load(graphs.path(tower, precision))
    constants = {item.name: item for item in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    pairs = [node for node in model.graph.node if node.op_type.endswith("uantizeLinear")]
    assert pairs
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.data_type == _GRID[precision]
        assert not np.asarray(numpy_helper.to_array(zero), np.float32).any()
        assert constants[node.input[1]].data_type == TensorProto.FLOAT16
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        kinds = [makers[name].op_type if name in makers else "" for name in node.input]
        if "DequantizeLinear" in kinds:
            # Both factors come right out of their pairs, and a bias is neither.
            assert kinds[:2] == ["DequantizeLinear"] * 2
            assert all(constants[name].data_type == TensorProto.FLOAT16 for name in node.input[2:])
            scale = constants[makers[node.input[1]].input[1]]
            assert len(scale.dims) == 1  # one for each output channel
            assert (numpy_helper.to_array(scale) > 0).all()


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_graphs_for_tensorrt_embed_nearly_as_fp32(
    graphs: Graphs, tower: Tower, precision: Reduced, run_graph: RunGraph
) -> None:
    (found,) = run_graph(graphs.path(tower, precision), graphs.inputs[tower]).values()
    (reference,) = run_graph(graphs.path(tower, "fp32"), graphs.inputs[tower]).values()
    assert found.dtype == np.float32
    assert cosines(found, reference).min() > (0.9999 if precision == "fp16" else 0.97)


@pytest.mark.parametrize(
    ("precision", "name"), [(kind, name) for kind, names in DEVICES.items() for name in names]
)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_tensorrt_for_rtx_builds_them(
    graphs: Graphs, tower: Tower, precision: Reduced, name: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    device = load_device(name)
    path = graphs.path(tower, precision)
    built = build_engine(_source(graphs, tower, path), device=device, library=open_library(device))
    assert built.key.capability == device.compute_capability
    assert len(built.engine) > 10_000


def _source(graphs: Graphs, tower: Tower, path: Path) -> GraphSource:
    length = graphs.dual.spec.text.context_length if tower == "text" else None
    return GraphSource(name=path.stem, content=path, sha256=sha256_file(path), text_length=length)
