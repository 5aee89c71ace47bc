"""fp16 conversion, and its emulation on a CPU."""

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
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import emulate_fp16, emulated_fp16, fp16_values, write_fp16
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.spec import Tower
from tests.export.conftest import RunGraph
from tests.export.quantizing.small_graphs import graph_of, run

pytestmark = pytest.mark.slow

NODES = {"first", "up", "gain_up", "relu", "gain_down", "down", "residual", "project", "norm"}


def inputs_of(tower: Tower, dual: DualEncoder) -> np.ndarray:
    if tower == "text":
        return dual.text_tokenizer.encode(["red", "a picture of a white blob, perhaps"])
    return np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("family", ["clip", "convnext"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_fp16_is_half_as_large_and_nearly_the_same(
    family: str,
    tower: Tower,
    run_graph: RunGraph,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    source = paths.image if tower == "image" else paths.text
    write_fp16(source, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.75 * source.stat().st_size
    values = inputs_of(tower, dual)
    (half,) = run_graph(tmp_path / "half.onnx", values).values()
    (full,) = run_graph(source, values).values()
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=5e-3)
    # The norm is taken in fp32 and not rounded on its way out.
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)


def test_weights_and_arithmetic_are_half_and_the_ends_are_not(
    clip_towers: TowerPaths, tmp_path: Path
) -> None:
    write_fp16(clip_towers.text, tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    wide = [t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    readers = {n.op_type for n in model.graph.node if set(n.input) & set(wide)}
    assert readers <= {"Clip"}  # the floor of the norm
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    back = [node for node in casts if node.attribute[0].i == TensorProto.FLOAT]
    assert len(back) == 1
    tail = [node.op_type for node in model.graph.node if set(back[0].output) & set(node.input)]
    assert sorted(tail) == ["Div", "ReduceL2"]


def test_huge_masks_and_large_norms_survive_fp16(run_graph: RunGraph, tmp_path: Path) -> None:
    """Softmax over masked scores, then an embedding whose squares overflow fp16."""
    lowest = np.finfo(np.float32).min
    mask = np.array([[0, 0, lowest], [0, lowest, -np.inf]], np.float32)
    weights = np.full((3, 16), 300, np.float32) * np.arange(1, 17, dtype=np.float32) / 16
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["flat"], "flat", keepdims=0),
        helper.make_node("MatMul", ["flat", "to_scores"], ["scores"], "scores"),
        helper.make_node("Add", ["scores", "mask"], ["masked"], "masked"),
        helper.make_node("Softmax", ["masked"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "weights"], ["features"], "features"),
        helper.make_node("ReduceL2", ["features", "last"], ["norm"], "norm", keepdims=1),
        helper.make_node("Div", ["features", "norm"], ["image_embeds"], "div"),
    ]
    constants = {
        "axes": np.array([2, 3]),
        "to_scores": np.eye(3, dtype=np.float32),
        "mask": mask,
        "weights": weights,
        "last": np.array([-1]),
    }
    outputs = {"image_embeds": [2, 16]}
    model = graph_of(nodes, constants, name="pixel_values", given=[2, 3, 4, 4], outputs=outputs)
    onnx.save(model, tmp_path / "f.onnx")
    write_fp16(tmp_path / "f.onnx", tmp_path / "half.onnx")
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    (half,) = run_graph(tmp_path / "half.onnx", values).values()
    (full,) = run_graph(tmp_path / "f.onnx", values).values()
    assert np.isfinite(half).all()
    np.testing.assert_allclose(half, full, atol=2e-3)


def wide_mlp(path: Path) -> None:
    """Two layers whose hidden values reach 1e5 between layers that do not, then the L2 norm."""
    draw = np.random.default_rng(0)
    shapes = {"w0": (6, 8), "w1": (8, 32), "w2": (32, 8), "w3": (8, 5)}
    constants = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    constants |= {
        "gain": np.array(1e5, np.float32),
        "back": np.array(1e-5, np.float32),
        "last": np.array([-1]),
    }
    make = helper.make_node
    nodes = [
        make("MatMul", ["pixel_values", "w0"], ["a"], "first"),
        make("MatMul", ["a", "w1"], ["b"], "up"),
        make("Mul", ["b", "gain"], ["c"], "gain_up"),
        make("Relu", ["c"], ["d"], "relu"),
        make("Mul", ["d", "back"], ["e"], "gain_down"),
        make("MatMul", ["e", "w2"], ["f"], "down"),
        make("Add", ["a", "f"], ["g"], "residual"),
        make("MatMul", ["g", "w3"], ["h"], "project"),
        make("ReduceL2", ["h", "last"], ["norm"], "norm", keepdims=1),
        make("Div", ["h", "norm"], ["image_embeds"], "div"),
    ]
    outputs = {"image_embeds": ["batch", 5]}
    model = graph_of(nodes, constants, name="pixel_values", given=["batch", 6], outputs=outputs)
    onnx.save(model, path)


def test_what_overflows_fp16_stays_fp32_and_nothing_else(
    run_graph: RunGraph, tmp_path: Path
) -> None:
    wide_mlp(tmp_path / "f.onnx")
    values = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)
    data = CalibrationData(1, lambda _: values)
    write_fp16(tmp_path / "f.onnx", tmp_path / "half.onnx", data)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx"))
    types = {item.name: item.type.tensor_type.elem_type for item in model.graph.value_info}
    made = {node.name: types.get(node.output[0]) for node in model.graph.node}
    wide = {name for name, kind in made.items() if kind == TensorProto.FLOAT} & NODES
    assert wide == {"gain_up", "relu", "gain_down", "norm"}
    (half,) = run_graph(tmp_path / "half.onnx", values).values()
    (full,) = run_graph(tmp_path / "f.onnx", values).values()
    np.testing.assert_allclose(half, full, atol=5e-3)


def test_without_calibration_such_a_tower_is_lost(run_graph: RunGraph, tmp_path: Path) -> None:
    wide_mlp(tmp_path / "f.onnx")
    write_fp16(tmp_path / "f.onnx", tmp_path / "half.onnx")
    values = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)
    (half,) = run_graph(tmp_path / "half.onnx", values).values()
    assert not np.isfinite(half).all()


def test_calibration_changes_nothing_where_all_values_fit(
    clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path
) -> None:
    ids = inputs_of("text", clip)
    write_fp16(clip_towers.text, tmp_path / "plain.onnx")
    write_fp16(clip_towers.text, tmp_path / "seen.onnx", CalibrationData(1, lambda _: ids))
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "seen.onnx").read_bytes()


@pytest.mark.parametrize("family", ["clip", "convnext"])
def test_pixels_become_fp16_at_once(
    family: str, run_graph: RunGraph, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    form = GraphForm(opset=19, pixels="uint8-nhwc")
    export_tower(dual, "image", tmp_path / "f.onnx", form)
    write_fp16(tmp_path / "f.onnx", tmp_path / "half.onnx")
    (first,) = (n for n in onnx.load(tmp_path / "half.onnx").graph.node if "pixels" in n.input)
    assert first.op_type == "Cast"
    assert first.attribute[0].i == TensorProto.FLOAT16
    pixels = np.random.default_rng(0).integers(0, 256, size=(4, 32, 32, 3), dtype=np.uint8)
    (half,) = run_graph(tmp_path / "half.onnx", pixels).values()
    (full,) = run_graph(tmp_path / "f.onnx", pixels).values()
    np.testing.assert_allclose(half, full, atol=5e-3)


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
    (found,) = run(emulate_fp16(model), x)
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
    assert fp16_values(model) == {"h", "third", "thirds", "sum", "gelu", "z"}
    (found,) = run(emulate_fp16(model), np.ones((2, 4), np.float32))
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
    assert fp16_values(model) == {"h", "ones", "n", "s", "z"}
    (found,) = run(emulate_fp16(model), np.arange(8, dtype=np.float32).reshape(2, 4))
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
    assert fp16_values(model) == halves
    emulated = emulate_fp16(model)
    onnx.checker.check_model(emulated, full_check=True)
    assert fp16_values(emulated) <= {v for n in emulated.graph.node for v in n.output}
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
    with emulated_fp16(graphs, cpu_device) as found:
        assert found == tuple(graphs)
    with emulated_fp16(graphs, load_device("jetson-orin-nano")) as (plain, shown):
        assert plain == graphs[0]
        assert (shown.tower, shown.precision, shown.pixels) == ("text", "fp16", None)
        assert shown.path.name == half.name
        assert load_graph(shown.path) == emulate_fp16(load_graph(half))
    assert not shown.path.exists()
    assert half.exists()
