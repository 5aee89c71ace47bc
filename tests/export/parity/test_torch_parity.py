from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder, tower_inputs
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphValues, relative_error
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, capture, export_tower
from edgeclip.export.parity import torch_parity as explain
from edgeclip.export.parity.torch_parity import TorchValues, check_parity, explain_parity
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

pytestmark = pytest.mark.slow

STANDARD = GraphForm()
BOUNDS = DEFAULT_BOUNDS["fp32"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_exported_tower_agrees_with_torch(
    tower: Tower,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
) -> None:
    embed = graph_embedder(clip_towers.graph(tower), clip.spec.image, cpu_device)
    records = check_parity(clip, tower, embed, blobs(6), BOUNDS)
    assert len(records) == 3
    assert all(record.passed for record in records)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_that_is_wrong_alone_only_is_found(
    tower: Tower,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
) -> None:
    embed = graph_embedder(clip_towers.graph(tower), clip.spec.image, cpu_device)

    def fails_alone(values: NDArray[Any]) -> FloatArray:
        found = embed(values)
        return np.roll(found, 1, axis=1) if len(values) == 1 else found

    records = check_parity(clip, tower, fails_alone, blobs(6), BOUNDS)
    assert not all(record.passed for record in records)


def break_product(path: Path, number: int) -> str:
    """Give a product the wrong sign in its constant weights; return what must be said of it."""
    model = load_graph(path)
    constants = {item.name: item for item in model.graph.initializer}
    nodes = [
        node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants
    ]
    node = nodes[number]
    weight = constants[node.input[1]]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    save_graph(model, path)
    return f"{node.name} ({node.op_type})"


def copied(paths: TowerPaths, tower: Tower, folder: Path) -> TowerGraph:
    source = paths.graph(tower)
    path = folder / source.path.name
    path.write_bytes(source.path.read_bytes())
    return replace(source, path=path)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("student", ["clip", "convnext"])
def test_torch_and_a_sound_graph_agree_in_every_value_of_the_same_name(
    tower: Tower,
    student: str,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(student)
    paths: TowerPaths = request.getfixturevalue(f"{student}_towers")
    values = next(tower_inputs(dual, tower, blobs(3)))
    feed = tower_feed(values, tower, "float32-nchw", dual.spec.image)
    (given,) = map(torch.from_numpy, feed.values())
    in_torch = TorchValues(capture(dual, tower, STANDARD), (given,))
    on_engine = GraphValues(
        load_graph(paths.graph(tower).path), feed, partial(open_engine, device=cpu_device)
    )
    shared = [name for name in on_engine.names if name in in_torch.names]
    assert len(shared) > 0.5 * len(on_engine.names)
    right, found = in_torch.values(shared), on_engine.values(shared)
    assert max(relative_error(right[name], found[name]) for name in shared) < 1e-5
    with torch.no_grad():
        expected = tower_module(dual, tower)(given)
    np.testing.assert_allclose(in_torch.results[0], expected, atol=1e-6)


@pytest.mark.parametrize(("tower", "number"), [("image", 0), ("text", 9)])
def test_a_broken_graph_is_explained_by_its_node(
    tower: Tower,
    number: int,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
    tmp_path: Path,
) -> None:
    graph = copied(clip_towers, tower, tmp_path)
    model = load_graph(graph.path)
    broken = break_product(graph.path, number)
    line = explain_parity(clip, graph, blobs(8), cpu_device, STANDARD)
    # The product by itself is unknown to torch, where it is one operator with its bias.
    name = broken.split()[0]
    (product,) = (node for node in model.graph.node if node.name == name)
    (bias,) = (node for node in model.graph.node if product.output[0] in node.input)
    assert line.startswith(
        f"the first node that differs is {bias.name} (Add) with {name} before it: {bias.output[0]} "
    )


def test_the_device_form_is_explained_too(
    convnext: DualEncoder, blobs: Callable[..., Any], cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    form = GraphForm(pixels="uint8-nhwc", batch=3)
    device = replace(cpu_device, batch_min=3, batch_best=3, batch_max=3, pixels=form.pixels)
    graph = TowerGraph("image", "fp32", tmp_path / "device.onnx", form.pixels)
    export_tower(convnext, "image", graph.path, form)
    broken = break_product(graph.path, -1)  # the projection
    line = explain_parity(convnext, graph, blobs(7), device, form)
    assert line.startswith(f"the first node that differs is {broken}")


def test_a_sound_graph_is_said_to_be_sound(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Callable[..., Any], cpu_device: DeviceProfile
) -> None:
    line = explain_parity(clip, clip_towers.graph("text"), blobs(8), cpu_device, STANDARD)
    assert line.startswith("no value differs")


class Forgetful(nn.Module):
    """An image tower that leaves out the second layer."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.model: Any = dual.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        vision = self.model.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
        hidden = vision.encoder.layers[0](hidden, None)
        embeddings = self.model.visual_projection(vision.post_layernorm(hidden[:, 0]))
        return nn.functional.normalize(embeddings, dim=-1)


def test_a_tower_unlike_the_student_is_told_before_any_export(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explain, "tower_module", lambda dual, tower, **_: Forgetful(dual))
    line = explain_parity(clip, clip_towers.graph("image"), blobs(8), cpu_device, STANDARD)
    assert line == (
        "before any export, Forgetful differs from the student from "
        "vision_model.post_layernorm (LayerNorm) on"
    )
