"""Benchmark graph passes against the unchanged graph, and keep those that help."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_passes import PASSES, GraphPass
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.export.graph.tune_passes import (
    MAX_TIME_RATIO,
    TUNING_WORKLOAD,
    PassOutcome,
    tune_graph,
)
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.stats.interval import Interval

pytestmark = pytest.mark.slow

QUICK = replace(TUNING_WORKLOAD, repeats=20, max_warmup_seconds=0.1)
IDS = np.array([[1, 9, 8, 7, 6, 2], [1, 20, 30, 2, 0, 0]])


@pytest.fixture
def graph(clip_towers: TowerPaths, tmp_path: Path) -> Path:
    """A copy of a text tower."""
    path = tmp_path / "text.onnx"
    save_graph(load_graph(clip_towers.text), path)
    return path


def embed(path: Path, device: DeviceProfile) -> NDArray[Any]:
    return open_engine(path, device=device).run({"input_ids": IDS})["text_embeds"]


def scale_output(model: ir.Model, value: float) -> int:
    """Multiply the embedding by a number."""
    graph = model.graph
    (output,) = graph.outputs
    factor = ir.Value(name="factor", const_value=ir.tensor(np.float32(value), name="factor"))
    graph.register_initializer(factor)
    end = output.producer()
    assert end is not None
    inner = end.inputs[0]
    scaled = ir.node("Mul", [inner, factor])
    graph.insert_before(end, scaled)
    end.replace_input_with(0, scaled.outputs[0])
    return 1


def burden(model: ir.Model) -> int:
    """Add work whose result is always 0 to the embedding; the engine cannot know that."""
    graph = model.graph
    (output,) = graph.outputs
    end = output.producer()
    assert end is not None
    large = ir.Value(
        name="large", const_value=ir.tensor(np.full((16, 1 << 18), 1e-3, np.float32), name="large")
    )
    nought = ir.Value(name="nought", const_value=ir.tensor(np.float32(0), name="nought"))
    axes = ir.Value(name="last", const_value=ir.tensor(np.array([-1]), name="last"))
    for value in (large, nought, axes):
        graph.register_initializer(value)
    product = ir.node("MatMul", [end.inputs[0], large])
    total = ir.node("ReduceSum", [product.outputs[0], axes], {"keepdims": 1})
    nothing = ir.node("Mul", [total.outputs[0], nought])
    added = ir.node("Add", [end.inputs[0], nothing.outputs[0]])
    graph.insert_before(end, [product, total, nothing, added])
    end.replace_input_with(0, added.outputs[0])
    return 1


def relieve(model: ir.Model) -> int:
    """Undo `burden`."""
    (output,) = model.graph.outputs
    end = output.producer()
    assert end is not None
    added = end.inputs[0].producer() if end.inputs[0] is not None else None
    assert added is not None
    end.replace_input_with(0, added.inputs[0])
    return 1


def refuse(model: ir.Model) -> int:
    """Make a graph that is valid for the checker and that no engine can load."""
    (output,) = model.graph.outputs
    end = output.producer()
    assert end is not None
    node = ir.node("Unheard", [end.inputs[0]], domain="nobody")
    model.graph.insert_before(end, node)
    model.opset_imports["nobody"] = 1
    end.replace_input_with(0, node.outputs[0])
    return 1


def test_what_is_faster_is_kept(graph: Path, cpu_device: DeviceProfile) -> None:
    expected = embed(graph, cpu_device)
    slow, _ = GraphPass("burden", burden).apply(load_graph(graph))
    save_graph(slow, graph)
    (outcome,) = tune_graph(
        graph,
        cpu_device,
        {"input_ids": IDS},
        tower="text",
        workload=QUICK,
        passes=[GraphPass("relieve", relieve)],
    )
    assert outcome.kept
    assert outcome.ratio is not None
    assert outcome.ratio.high < MAX_TIME_RATIO
    assert "large" not in {item.name for item in load_graph(graph).graph.initializer}
    np.testing.assert_allclose(embed(graph, cpu_device), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (GraphPass("burden", burden), r"burden: left out, 1 places, \d+\.\d+ \["),
        (GraphPass("double", lambda model: scale_output(model, 2.0)), "not exact"),
        (GraphPass("refuse", refuse), "the engine cannot run it"),
        (GraphPass("idle", lambda model: 0), "idle: nothing to do"),
    ],
    ids=lambda item: item.name if isinstance(item, GraphPass) else "",
)
def test_what_is_slower_or_wrong_is_left_out(
    item: GraphPass, said: str, graph: Path, cpu_device: DeviceProfile
) -> None:
    before = graph.read_bytes()
    (outcome,) = tune_graph(
        graph, cpu_device, {"input_ids": IDS}, tower="text", workload=QUICK, passes=[item]
    )
    assert not outcome.kept
    assert graph.read_bytes() == before
    assert re.search(said, str(outcome))


def test_the_passes_that_suit_the_device_are_tried(graph: Path, cpu_device: DeviceProfile) -> None:
    expected = embed(graph, cpu_device)
    outcomes = tune_graph(graph, cpu_device, {"input_ids": IDS}, tower="text", workload=QUICK)
    assert [outcome.name for outcome in outcomes] == [item.name for item in PASSES]
    tried = [outcome for outcome in outcomes if outcome.places]
    assert {outcome.name for outcome in tried} >= {"merge projections", "fuse attention"}
    for outcome in tried:
        assert outcome.error is not None
        assert outcome.error < 1e-5
        assert outcome.ratio is not None
        assert outcome.kept == (outcome.ratio.high < MAX_TIME_RATIO)
    np.testing.assert_allclose(embed(graph, cpu_device), expected, atol=1e-5)


def test_standard_files_stay_standard(graph: Path, cpu_device: DeviceProfile) -> None:
    outcomes = tune_graph(
        graph, cpu_device, {"input_ids": IDS}, tower="text", workload=QUICK, standard=True
    )
    assert [outcome.name for outcome in outcomes] == ["simplify", "merge projections"]
    assert {node.domain for node in load_graph(graph).graph.node} == {""}


def test_a_graph_for_one_batch_size_is_tuned_too(
    convnext: DualEncoder, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    device = replace(cpu_device, batch_min=3, batch_best=3, batch_max=3)
    path = tmp_path / "image.onnx"
    export_tower(convnext, "image", path, GraphForm(batch=3))
    pixels = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    outcomes = tune_graph(path, device, {"pixel_values": pixels}, tower="image", workload=QUICK)
    (gelu,) = (item for item in outcomes if item.name == "fuse GELU")
    assert gelu.places == 2
    assert gelu.error is not None
    assert gelu.error < 1e-5


def test_two_inputs_are_refused(graph: Path, cpu_device: DeviceProfile) -> None:
    with pytest.raises(ExportError, match="one input, but 2"):
        tune_graph(graph, cpu_device, {"a": IDS, "b": IDS}, tower="text")


def test_the_line_says_what_happened() -> None:
    outcome = PassOutcome(
        name="merge", places=6, ratio=Interval(0.9, 0.85, 0.95), error=1e-7, kept=True
    )
    assert str(outcome) == "merge: kept, 6 places, 0.900 [0.850, 0.950] of the time"
