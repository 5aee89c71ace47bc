"""Symmetric Q/DQ in int8 and float8: pairs around the products with weights, close to fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.export.quantizing.config import Float8
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.export.quantizing.symmetric_qdq import (
    FLOAT8,
    INT8,
    NumberFormat,
    insert_qdq,
    write_symmetric,
)
from edgeclip.runtime.bundle.index import cosines

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
OPSET = [helper.make_opsetid("", 21)]


def one_product(weight: NDArray[np.floating], *, transposed: bool = False) -> onnx.ModelProto:
    """`x [batch, inputs]` times a weight, in the weight's own type."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    operator = "Gemm" if transposed else "MatMul"
    node = helper.make_node(operator, ["x", "w"], ["y"], "product")
    if transposed:
        node.attribute.append(helper.make_attribute("transB", 1))
    inputs, outputs = weight.shape[::-1] if transposed else weight.shape
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind, ["batch", inputs])],
        [helper.make_tensor_value_info("y", kind, ["batch", outputs])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


def weights_of(kind: type[np.floating]) -> st.SearchStrategy[NDArray[np.floating]]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=5)
    return hnp.arrays(kind, shapes, elements=st.floats(-512, 512, width=16))


def dequantized(model: onnx.ModelProto) -> NDArray[np.floating]:
    """What the product reads in place of its weight."""
    value = helper.make_empty_tensor_value_info("w_axis1_dequantized")
    model.graph.output.append(value)
    inputs = model.graph.input[0].type.tensor_type
    kind = helper.tensor_dtype_to_np_dtype(inputs.elem_type)
    x = np.zeros((1, inputs.shape.dim[1].dim_value), kind)
    (weight,) = ReferenceEvaluator(model).run([value.name], {"x": x})
    assert isinstance(weight, np.ndarray)
    return weight


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("number_format", [INT8, FLOAT8], ids=["int8", "fp8"])
@given(data=st.data(), bound=st.floats(0, 16000))
def test_weights_lose_at_most_half_a_step_and_nothing_is_cut_off(
    number_format: NumberFormat, kind: type[np.floating], data: st.DataObject, bound: float
) -> None:
    weight = data.draw(weights_of(kind))
    model = one_product(weight)
    insert_qdq(model, {"product": bound}, number_format)
    onnx.checker.check_model(model, full_check=True)
    scales = {
        item.name: numpy_helper.to_array(item)
        for item in model.graph.initializer
        if item.name.endswith("scale")
    }
    for scale in scales.values():
        assert scale.dtype == kind
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    # Nothing that calibration saw is beyond the largest value.
    assert float(scales["x_scale"]) * number_format.largest >= bound
    steps = scales["w_axis1_scale"].astype(np.float64)
    error = np.abs(dequantized(model).astype(np.float64) - weight)
    rounding = 2.0**-10 * np.abs(weight) if kind == np.float16 else 2.0**-22 * np.abs(weight)
    # E4M3: three bits of fraction, and steps of 2^-9 near 0.
    half = 0.5 if number_format == INT8 else np.maximum(2.0**-4 * np.abs(weight) / steps, 2.0**-10)
    # Products of tiny fp16 scales fall between the subnormal numbers.
    assert (error <= half * steps * 1.001 + rounding + 2.0**-24).all()


def test_output_channels_of_a_transposed_product_are_its_rows() -> None:
    weight = np.array([[1, 4], [100, 400], [0, 0]], np.float32)
    model = one_product(weight, transposed=True)
    insert_qdq(model, {"product": 1}, INT8)
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    np.testing.assert_array_equal(values["w_axis0_quantized"], [[32, 127], [32, 127], [0, 0]])
    assert values["w_axis0_scale"][2] == 1
    assert "w" not in values


def test_projections_of_one_value_share_its_pair(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    nodes = quantizable_nodes(clip_towers.text)
    data = calibration_texts(blobs(8), clip.text_tokenizer)
    write_symmetric(
        clip_towers.text, tmp_path / "q.onnx", data, nodes=nodes, number_format=INT8, half=True
    )
    graph = onnx.load(tmp_path / "q.onnx").graph
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    readers = [
        [node.op_type for node in graph.node if pair.output[0] in node.input] for pair in pairs
    ]
    assert all(kinds == ["DequantizeLinear"] for kinds in readers)
    # The first layer's query, key and value read one value. The last layer's query is of one
    # token only, so it has a pair to itself.
    assert len(nodes) - len(pairs) == 3


def test_an_old_operator_set_is_raised_for_fp16_scales_and_only_then(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    nodes = quantizable_nodes(clip_towers.text)
    data = calibration_texts(blobs(8), clip.text_tokenizer)
    found = {}
    for number_format, half in ((INT8, False), (INT8, True), (FLOAT8, True)):
        write_symmetric(
            clip_towers.text,
            tmp_path / "q.onnx",
            data,
            nodes=nodes,
            number_format=number_format,
            half=half,
        )
        (imported,) = onnx.load(tmp_path / "q.onnx").opset_import
        found[number_format.kind, half] = imported.version
    assert found == {
        (TensorProto.INT8, False): 18,
        (TensorProto.INT8, True): 19,
        (TensorProto.FLOAT8E4M3FN, True): 21,
    }


def test_outliers_beyond_fp16_stay_fp32_and_are_not_quantized(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32)
    model = one_product(weight)
    model.graph.node.append(helper.make_node("MatMul", ["y", "small"], ["z"], "after"))
    model.graph.initializer.append(numpy_helper.from_array(weight * np.float32(1e-5), "small"))
    model.graph.node.append(helper.make_node("MatMul", ["z", "w"], ["out"], "last"))
    model.graph.output[0].name = "out"
    onnx.save(model, tmp_path / "f.onnx")
    data = CalibrationData(1, lambda _: np.full((2, 4), 1e5, np.float32))
    nodes = quantizable_nodes(tmp_path / "f.onnx")
    assert nodes == ["product", "after", "last"]
    write_symmetric(
        tmp_path / "f.onnx", tmp_path / "q.onnx", data, nodes=nodes, number_format=INT8, half=True
    )
    quantized = onnx.load(tmp_path / "q.onnx").graph
    made = {name: node.op_type for node in quantized.node for name in node.output}
    reads = {
        node.name: made.get(node.input[0]) for node in quantized.node if node.op_type == "MatMul"
    }
    assert reads["last"] == "DequantizeLinear"
    assert "DequantizeLinear" not in (reads["product"], reads["after"])


def test_a_tower_of_outliers_only_is_refused(tmp_path: Path) -> None:
    onnx.save(one_product(np.eye(4, dtype=np.float32)), tmp_path / "f.onnx")
    data = CalibrationData(1, lambda _: np.full((2, 4), 1e5, np.float32))
    with pytest.raises(ExportError, match="too large"):
        write_symmetric(
            tmp_path / "f.onnx",
            tmp_path / "q.onnx",
            data,
            nodes=["product"],
            number_format=FLOAT8,
            half=True,
        )
    assert not (tmp_path / "q.onnx").exists()


RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]


def test_fp8_embeds_nearly_as_fp32_and_is_typed(
    clip: DualEncoder, blobs: Callable[..., Source], tmp_path: Path, run_graph: RunGraph
) -> None:
    form = GraphForm(opset=19, pixels="uint8-nhwc")
    export_tower(clip, "image", tmp_path / "fp32.onnx", form)
    data = calibration_images(blobs(32, seed=1), clip.image_spec, "uint8-nhwc")
    quantize_graph(tmp_path / "fp32.onnx", tmp_path / "fp8.onnx", Float8(), data)
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
    quantize_graph(clip_towers.text, tmp_path / "fp8.onnx", Float8(), data)
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
        quantize_graph(tmp_path / "relu.onnx", tmp_path / "fp8.onnx", Float8(), data)


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
    quantize_graph(tmp_path / "fp32.onnx", path, Float8(), data)
    source = GraphSource(name="fp8", content=path, sha256=sha256_file(path))
    for name in ("rtx-4000-ada", "rtx-blackwell"):
        device = load_device(name)
        assert build_engine(source, device=device, library=open_library(device)).engine
    ampere = load_device("rtx-a2000")
    with pytest.raises(EngineError):
        build_engine(source, device=ampere, library=open_library(ampere))
