"""Image towers of every family: exported, quantized and cut, they compute what torch does."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.image_families import ImageFamilyName
from edgeclip.compress.students.student import new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.pretrain import new_teacher
from edgeclip.export.cuts.cut_points import find_cuts
from edgeclip.export.cuts.cut_tower import cut_head, cut_tail, prepare_for_cutting
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.export.graph.fold_norms import fold_batch_norms
from edgeclip.export.graph.graph_io import load_graph, write_unchecked
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.quantizing.config import default_config
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.inputs.preprocess import crop_batch
from tests.compress.conftest import SHAPE
from tests.compress.students.image_shapes import SHAPES


@pytest.fixture(scope="module")
def base() -> DualEncoder:
    return new_teacher(SHAPE, seed=0)


def _settled(student: DualEncoder, pixels: NDArray[np.uint8]) -> DualEncoder:
    """Give batch normalisations statistics of these pictures, and weights that do something."""
    torch.manual_seed(0)
    norms = [
        part for part in student.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
            norm.momentum = 1.0
        student.train()
        student.embed_image(student.normalise(pixels))
    return student.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_tower_is_exported_quantized_and_cut(
    name: ImageFamilyName, base: DualEncoder, tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    student = new_student(base, SHAPES[name])
    source = EmojiSource("test", 8, size=64)
    pixels = crop_batch([source[index].image for index in range(8)], student.image_spec)
    _settled(student, pixels)
    wanted = torch_embedder(student, "image")(pixels)
    whole = tmp_path / "fp32.onnx"
    export_tower(student, "image", whole, GraphForm(pixels="uint8-nhwc"))
    opener = partial(open_engine, device=cpu_device)

    def run(path: Path, count: int = 8) -> NDArray[np.float32]:
        found: dict[str, Any] = opener(path).run({"pixels": pixels[:count]})
        return np.asarray(found["image_embeds"])

    for count in (1, 8):
        np.testing.assert_allclose(run(whole, count), wanted[:count], atol=2e-5)
    graph = load_graph(whole).graph
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) <= (name == "swiftformer")  # the one before its mean
    int8 = tmp_path / "int8.onnx"
    write_int8(
        whole, int8, CalibrationData(1, lambda _: pixels), default_config("int8", cpu_device)
    )
    quantized = load_graph(int8).graph
    assert any(item.data_type == TensorProto.INT8 for item in quantized.initializer)
    assert (run(int8) * wanted).sum(-1).mean() > 0.8  # random weights lose more than taught ones
    feed = {"pixels": pixels[:3]}
    prepared = prepare_for_cutting(load_graph(whole), "image_embeds", feed, opener)
    cuts = find_cuts(prepared, feed, 64, opener)
    assert len(cuts) > 3
    assert len({cut.point.name for cut in cuts}) == len(cuts)
    for cut in (cuts[1], cuts[-1]):
        write_unchecked(cut_head(prepared, cut), tmp_path / "head.onnx")
        write_unchecked(cut_tail(prepared, cut), tmp_path / "tail.onnx")
        sent = opener(tmp_path / "head.onnx").run({"pixels": pixels[:2]})
        (found,) = opener(tmp_path / "tail.onnx").run(sent).values()
        np.testing.assert_allclose(found, wanted[:2], atol=2e-5)


def _norm(given: str, made: str, number: int) -> onnx.NodeProto:
    names = [f"{part}_{number}" for part in ("scale", "offset", "mean", "variance")]
    return helper.make_node("BatchNormalization", [given, *names], [made], f"norm_{number}")


def _random(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.normal(size=shape).astype(np.float32)


def _model() -> onnx.ModelProto:
    """Conv, norm, its sum with the pixels, norm, Conv of 1 x 1, norm read twice."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "conv_0", pads=[1, 1, 1, 1]),
        _norm("a", "b", 0),
        helper.make_node("Add", ["x", "b"], ["c"], "sum"),
        _norm("c", "d", 1),
        helper.make_node("Conv", ["d", "w1", "bias"], ["e"], "conv_1"),
        helper.make_node("Relu", ["e"], ["f"], "relu"),
        _norm("f", "g", 2),
        helper.make_node("Add", ["g", "f"], ["y"], "last"),
    ]
    values = {"w0": _random(rng, 3, 3, 3, 3), "w1": _random(rng, 3, 3, 1, 1)}
    values["bias"] = _random(rng, 3)
    for number in range(3):
        for part in ("scale", "offset", "mean"):
            values[f"{part}_{number}"] = _random(rng, 3)
        values[f"variance_{number}"] = (np.abs(_random(rng, 3)) + 0.1).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 5, 5])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_folded_norms_compute_the_same() -> None:
    model, given = _model(), {"x": _random(np.random.default_rng(1), 2, 3, 5, 5)}
    wanted = np.asarray(next(iter(ReferenceEvaluator(model).run(None, given))), np.float32)
    assert fold_batch_norms(model) == 2  # behind a Conv, and before one of 1 x 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 1
    found = np.asarray(next(iter(ReferenceEvaluator(model).run(None, given))), np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not {item.name for item in model.graph.initializer} & {"scale_0", "mean_1"}


def test_what_is_read_elsewhere_is_not_folded() -> None:
    model = _model()
    model.graph.node[2].input[0] = "a"  # the convolution's result, beside its norm
    model.graph.node[4].input[0] = "c"  # and nothing behind the second norm
    model.graph.node[7].input[1] = "d"
    given = {"x": _random(np.random.default_rng(1), 2, 3, 5, 5)}
    (wanted,) = ReferenceEvaluator(model).run(None, given)
    assert fold_batch_norms(model) == 0
    (found,) = ReferenceEvaluator(model).run(None, given)
    np.testing.assert_array_equal(found, wanted)


def test_a_reshape_that_makes_no_rows_is_not_folded_through() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("Reshape", ["a", "shape"], ["b"], "reshape"),
        _norm("b", "y", 0),
    ]
    values: dict[str, NDArray[Any]] = {"w": _random(rng, 4, 6), "shape": np.array([2, 6, 6])}
    for part in ("scale", "offset", "mean"):
        values[f"{part}_0"] = _random(rng, 6)
    values["variance_0"] = np.ones(6, np.float32)
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6, 6])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert fold_batch_norms(model) == 0
