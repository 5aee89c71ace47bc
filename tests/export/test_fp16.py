from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.embed_pairs import graph_embedder
from edgeclip.export.fp16 import write_fp16
from edgeclip.export.to_onnx import TowerPaths
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.spec import Tower


def inputs_of(tower: Tower, dual: DualEncoder) -> np.ndarray:
    if tower == "text":
        return dual.text_tokenizer.encode(["red", "a picture of a white blob, perhaps"])
    return np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("family", ["clip", "convnext"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_fp16_is_half_as_large_and_nearly_the_same(
    family: str,
    tower: Tower,
    cpu_device: DeviceProfile,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    source = paths.image if tower == "image" else paths.text
    write_fp16(source, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.75 * source.stat().st_size
    values = inputs_of(tower, dual)
    half = graph_embedder(tmp_path / "half.onnx", tower, cpu_device)(values)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, graph_embedder(source, tower, cpu_device)(values), atol=5e-3)
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


def test_huge_masks_and_large_norms_survive_fp16(cpu_device: DeviceProfile, tmp_path: Path) -> None:
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
    graph = helper.make_graph(
        nodes,
        "masked",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [2, 3, 4, 4])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, [2, 16])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "f.onnx")
    write_fp16(tmp_path / "f.onnx", tmp_path / "half.onnx")
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    half = graph_embedder(tmp_path / "half.onnx", "image", cpu_device)(values)
    full = graph_embedder(tmp_path / "f.onnx", "image", cpu_device)(values)
    assert np.isfinite(half).all()
    np.testing.assert_allclose(half, full, atol=2e-3)
