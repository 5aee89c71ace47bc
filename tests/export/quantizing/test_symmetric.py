from collections.abc import Callable
from pathlib import Path

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
from edgeclip.export.graph.calibration import CalibrationData, calibration_texts
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.export.quantizing.symmetric import FLOAT8, INT8, Grid, insert_qdq, write_symmetric

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
@pytest.mark.parametrize("grid", [INT8, FLOAT8], ids=["int8", "fp8"])
@given(data=st.data(), bound=st.floats(0, 16000))
def test_weights_lose_at_most_half_a_step_and_nothing_is_cut_off(
    grid: Grid, kind: type[np.floating], data: st.DataObject, bound: float
) -> None:
    weight = data.draw(weights_of(kind))
    model = one_product(weight)
    insert_qdq(model, {"product": bound}, grid)
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
    assert float(scales["x_scale"]) * grid.largest >= bound
    steps = scales["w_axis1_scale"].astype(np.float64)
    error = np.abs(dequantized(model).astype(np.float64) - weight)
    rounding = 2.0**-10 * np.abs(weight) if kind == np.float16 else 2.0**-22 * np.abs(weight)
    # E4M3: three bits of fraction, and steps of 2^-9 near 0.
    half = 0.5 if grid == INT8 else np.maximum(2.0**-4 * np.abs(weight) / steps, 2.0**-10)
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
    write_symmetric(clip_towers.text, tmp_path / "q.onnx", data, nodes=nodes, grid=INT8, half=True)
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
    for grid, half in ((INT8, False), (INT8, True), (FLOAT8, True)):
        write_symmetric(
            clip_towers.text, tmp_path / "q.onnx", data, nodes=nodes, grid=grid, half=half
        )
        (imported,) = onnx.load(tmp_path / "q.onnx").opset_import
        found[grid.kind, half] = imported.version
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
        tmp_path / "f.onnx", tmp_path / "q.onnx", data, nodes=nodes, grid=INT8, half=True
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
            grid=FLOAT8,
            half=True,
        )
    assert not (tmp_path / "q.onnx").exists()
