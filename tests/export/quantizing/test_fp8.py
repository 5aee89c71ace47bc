"""fp8 graphs: E4M3 pairs around the products with weights, close to fp32, and buildable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.export.quantizing.write_config import write_fp8
from edgeclip.runtime.quality.retrieval import cosines

RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]


def test_fp8_embeds_nearly_as_fp32_and_is_typed(
    clip: DualEncoder, blobs: Callable[..., Source], tmp_path: Path, run_graph: RunGraph
) -> None:
    form = GraphForm(opset=19, pixels="uint8-nhwc")
    export_tower(clip, "image", tmp_path / "fp32.onnx", form)
    data = calibration_images(blobs(32, seed=1), clip.image_spec, "uint8-nhwc")
    write_fp8(tmp_path / "fp32.onnx", tmp_path / "fp8.onnx", data)
    pixels = calibration_images(blobs(8), clip.image_spec, "uint8-nhwc").batch(0)
    (found,) = run_graph(tmp_path / "fp8.onnx", pixels).values()
    (reference,) = run_graph(tmp_path / "fp32.onnx", pixels).values()
    least = cosines(found, reference).min()
    assert 0.97 < least < 1 - 1e-7  # close, and not simply fp32
    model = onnx.load(tmp_path / "fp8.onnx")
    kinds = {item.data_type for item in model.graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in kinds
    assert not kinds & {TensorProto.INT8, TensorProto.UINT8}
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def test_weights_are_float8_and_the_rest_is_fp16(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Callable[..., Source], tmp_path: Path
) -> None:
    data = calibration_texts(blobs(16), clip.text_tokenizer)
    write_fp8(clip_towers.text, tmp_path / "fp8.onnx", data)
    graph = onnx.load(tmp_path / "fp8.onnx").graph
    types = {item.name: item.data_type for item in graph.initializer}
    weights = [
        types[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in types
    ]
    assert len(weights) == len(quantizable_nodes(clip_towers.text))
    assert set(weights) == {TensorProto.FLOAT8E4M3FN}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert {types[node.input[1]] for node in norms} == {TensorProto.FLOAT16}


def test_fp8_of_a_graph_without_weights_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [None, 3])
    output = helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, [None, 3])
    node = helper.make_node("Relu", ["pixel_values"], ["image_embeds"], "relu")
    graph = helper.make_graph([node], "relu", [value], [output])
    onnx.save(helper.make_model(graph), tmp_path / "relu.onnx")
    data = CalibrationData(1, lambda _: np.zeros((1, 3), np.float32))
    with pytest.raises(ExportError, match="no MatMul, Gemm or Conv"):
        write_fp8(tmp_path / "relu.onnx", tmp_path / "fp8.onnx", data)


def test_fp8_builds_for_ada_and_not_for_ampere(
    clip: DualEncoder, blobs: Callable[..., Source], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgeclip.runtime.bundle.engine_records import GraphSource
    from edgeclip.runtime.bundle.files import sha256_file
    from edgeclip.runtime.device.device_profile import load_device
    from edgeclip.runtime.engines.tensorrt_build import build_engine
    from edgeclip.runtime.engines.tensorrt_library import open_library
    from edgeclip.runtime.errors import EngineError

    form = GraphForm(opset=19, pixels="uint8-nhwc")
    path = tmp_path / "fp8.onnx"
    export_tower(clip, "image", tmp_path / "fp32.onnx", form)
    data = calibration_images(blobs(16, seed=1), clip.image_spec, "uint8-nhwc")
    write_fp8(tmp_path / "fp32.onnx", path, data)
    source = GraphSource(name="fp8", content=path, sha256=sha256_file(path))
    for name in ("rtx-4000-ada", "rtx-blackwell"):
        device = load_device(name)
        assert build_engine(source, device=device, library=open_library(device)).engine
    ampere = load_device("rtx-a2000")
    with pytest.raises(EngineError):
        build_engine(source, device=ampere, library=open_library(ampere))
