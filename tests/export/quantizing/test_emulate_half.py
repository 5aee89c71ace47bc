"""fp16 as it is where it is native: what a CPU that computes in fp32 would hide."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import emulate_half, half_values, stored_in_half, write_fp16
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.quality.retrieval import cosines
from tests.export.quantizing.small_graphs import run

make = helper.make_node
HALF = TensorProto.FLOAT16


def typed(nodes: list[onnx.NodeProto], **weights: NDArray[np.generic]) -> onnx.ModelProto:
    """A graph from float32 `x` to float32 `y`, with `h` being `x` in fp16."""
    graph = helper.make_graph(
        [
            make("Cast", ["x"], ["h"], "down", to=HALF),
            *nodes,
            make("Cast", ["z"], ["y"], "up", to=TensorProto.FLOAT),
        ],
        "typed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_every_result_is_rounded_as_numpy_rounds_it() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 100
    thousand, weight = np.float16(1000), np.arange(16, dtype=np.float16).reshape(4, 4) / 7
    model = typed(
        [
            make("Add", ["h", "thousand"], ["far"], "add"),
            make("Sub", ["far", "thousand"], ["near"], "sub"),
            make("MatMul", ["near", "weight"], ["product"], "product"),
            make("Transpose", ["product"], ["turned"], "turn"),
            make("Mul", ["turned", "turned"], ["z"], "square"),
        ],
        thousand=np.array(thousand),
        weight=weight,
    )
    near = (x.astype(np.float16) + thousand) - thousand
    product = (near.astype(np.float32) @ weight.astype(np.float32)).astype(np.float16).T
    with np.errstate(over="ignore"):
        right = (product.astype(np.float32) ** 2).astype(np.float16)
    (found,) = run(emulate_half(model), x)
    assert found.dtype == np.float32
    assert np.isinf(right).any()
    np.testing.assert_array_equal(found, right.astype(np.float32))


def test_constants_and_foreign_operators_are_rounded_too() -> None:
    third = numpy_helper.from_array(np.array([1 / 3], np.float16))
    model = typed(
        [
            make("Constant", [], ["third"], "third", value=third),
            make("Shape", ["h"], ["shape"], "shape"),
            make("ConstantOfShape", ["shape"], ["thirds"], "thirds", value=third),
            make("Add", ["third", "thirds"], ["sum"], "sum"),
            make("Gelu", ["sum"], ["gelu"], "gelu", domain="com.microsoft"),
            make("Mul", ["gelu", "h"], ["z"], "times"),
        ]
    )
    assert half_values(model) == {"h", "third", "thirds", "sum", "gelu", "z"}
    (found,) = run(emulate_half(model), np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))
    assert found[0, 0] == pytest.approx(0.498, abs=1e-3)


def test_outputs_that_are_left_out_stay_so() -> None:
    """Both of the nodes leave out the same two, which have no name."""
    ones, given = np.ones(4, np.float16), ["h", "h", "ones"]
    model = typed(
        [
            make("SkipLayerNormalization", given, ["n", "", "", "s"], "n", domain="com.microsoft"),
            make(
                "SkipLayerNormalization", ["n", "s", "ones"], ["z", "", ""], domain="com.microsoft"
            ),
        ],
        ones=ones,
    )
    assert half_values(model) == {"h", "ones", "n", "s", "z"}
    (found,) = run(emulate_half(model), np.arange(8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))
    assert found[0] == pytest.approx([-1.34, -0.45, 0.45, 1.34], abs=0.01)


@pytest.mark.parametrize("int8", [False, True], ids=["fp16", "int8"])
def test_the_types_of_a_tower_are_those_that_onnx_infers(
    int8: bool, clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path
) -> None:
    ids = clip.text_tokenizer.encode(["red", "a picture of a white blob, perhaps"])
    data, path = CalibrationData(1, lambda _: ids), tmp_path / "half.onnx"
    if int8:
        write_int8(clip_towers.text, path, data, StaticInt8(symmetric=True, float_precision="fp16"))
    else:
        write_fp16(clip_towers.text, path, data)
    model = load_graph(path)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    halves = {i.name for i in inferred.value_info if i.type.tensor_type.elem_type == HALF}
    halves |= {item.name for item in model.graph.initializer if item.data_type == HALF}
    assert half_values(model) == halves
    emulated = emulate_half(model)
    onnx.checker.check_model(emulated, full_check=True)
    assert half_values(emulated) <= {v for n in emulated.graph.node for v in n.output}
    assert load_graph(path) == model  # which is left alone
    (found,), (right,) = run(emulated, ids), run(load_graph(clip_towers.text), ids)
    assert 0.97 < cosines(found, right).min() < 1
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_towers_are_judged_as_a_gpu_runs_them(
    clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    half = tmp_path / "text_model_fp16.onnx"
    write_fp16(clip_towers.text, half)
    graphs = [clip_towers.graph("text"), TowerGraph("text", "fp16", half, None)]
    with stored_in_half(graphs, cpu_device) as found:
        assert found == tuple(graphs)
    with stored_in_half(graphs, load_device("jetson-orin-nano")) as (plain, shown):
        assert plain == graphs[0]
        assert (shown.tower, shown.precision, shown.pixels) == ("text", "fp16", None)
        assert shown.path.name == half.name
        assert load_graph(shown.path) == emulate_half(load_graph(half))
    assert not shown.path.exists()
    assert half.exists()
