"""Quantization-aware fine-tune where int8 misses its gates."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgeclip.compress.data.sources import Pair, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.train.quantization_aware import fake_quantized, finetune_settings
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import Bounds, GateOutcome, describe_missed
from edgeclip.export.gates.judge_precisions import embed_test_pairs
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.embedders import TOWERS, TowerGraph
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.qat_finetune import (
    QatOptions,
    QatResult,
    QatTask,
    failing_towers,
    finetune_int8,
    is_better,
    layer_norm_names,
    product_grids,
    smooth_student,
    without_smoothing,
)
from edgeclip.export.quantizing.quantization_file import apply_passes
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.smoothquant import smoothable
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Precision, Tower
from tests.compress.teachers.teacher_factory import FAMILIES
from tests.export.quantizing.search_cases import cosine_record, loss_record

pytestmark = pytest.mark.slow

Make = Callable[..., Source]

CPU = StaticInt8(symmetric=False, reduce_range=True)
# Weights without training tell few pictures apart: rounding alone can cost a rank.
BOUNDS = Bounds(mean_cosine=0.995, p1_cosine=0.98, r1_loss=25.0)
FACTOR = 30.0


@dataclass(frozen=True, slots=True)
class Made:
    """A student quantized as it is: its graphs, and their embeddings of the test pairs."""

    task: QatTask
    graphs: tuple[TowerGraph, ...]
    embeddings: dict[tuple[Tower, Precision], FloatArray]

    def tuned(self, tuning: QatOptions) -> QatResult:
        return finetune_int8(self.task, self.graphs, self.embeddings, tuning)

    def files(self) -> dict[tuple[Tower, Precision], bytes]:
        return {(item.tower, item.precision): item.path.read_bytes() for item in self.graphs}


def quantized(task: QatTask, graphs: Sequence[TowerGraph], folder: Path) -> Made:
    """Quantize the towers of a task that have a config; `graphs` are both of them in fp32."""
    made = []
    spec, tokenizer = task.student.spec, task.student.text_tokenizer
    for graph in (item for item in graphs if item.tower in task.configs):
        path = folder / f"{graph.tower}_model_int8.onnx"
        data = (
            calibration_images(task.calibration, spec.image)
            if graph.tower == "image"
            else calibration_texts(task.calibration, tokenizer)
        )
        quantize_graph(graph.path, path, task.configs[graph.tower], data)
        made.append(replace(graph, precision="int8", path=path))
    found = (*graphs, *made)
    return Made(task, found, embed_test_pairs(task.student, found, task.test, task.judging_device))


def exported(student: DualEncoder, tower: Tower, folder: Path) -> TowerGraph:
    path = folder / f"{tower}_model.onnx"
    export_tower(student, tower, path)
    return TowerGraph(tower, "fp32", path, GraphForm().pixels if tower == "image" else None)


def short(student: DualEncoder, towers: Sequence[Tower] = TOWERS) -> DualEncoder:
    """A copy with one layer in some towers, which is soon exported."""
    made = copy.deepcopy(student)
    model: Any = made.model
    for tower in towers:
        part = model.vision_model if tower == "image" else model.text_model
        part.encoder.layers = part.encoder.layers[:1]
        part.config.num_hidden_layers = 1
    return made


def planted(student: DualEncoder, factor: float, towers: Sequence[Tower] = TOWERS) -> DualEncoder:
    """A copy that computes the same, but whose weights have outliers that int8 cannot hold.

    A channel of each norm is divided, and multiplied again by the weights behind it. Smoothing
    would undo that.
    """
    made = copy.deepcopy(student)
    model: Any = made.model
    with torch.no_grad():
        for tower in towers:
            part = model.vision_model if tower == "image" else model.text_model
            for layer in part.encoder.layers:
                seen = layer.self_attn
                _move(layer.layer_norm1, (seen.q_proj, seen.k_proj, seen.v_proj), factor)
                _move(layer.layer_norm2, (layer.mlp.fc1,), factor)
    return made


def _move(norm: nn.LayerNorm, readers: Sequence[nn.Linear], factor: float) -> None:
    norm.weight[5] /= factor
    norm.bias[5] /= factor
    for reader in readers:
        reader.weight[:, 5] *= factor


@pytest.fixture(scope="module")
def task(clip: DualEncoder, blobs: Make, cpu_device: DeviceProfile) -> QatTask:
    return QatTask(
        student=clip,
        configs={"image": CPU, "text": CPU},
        calibration=blobs(32, seed=1),
        test=blobs(60),
        accept_undecided=True,
        device=cpu_device,
        bounds=BOUNDS,
        form=GraphForm(),
    )


@pytest.fixture(scope="module")
def ruined(task: QatTask, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A student that int8 ruins; its files are read and never altered."""
    folder = tmp_path_factory.mktemp("ruined")
    student = planted(short(task.student), FACTOR)
    graphs = [exported(student, tower, folder) for tower in TOWERS]
    return quantized(replace(task, student=student), graphs, folder)


@pytest.fixture
def failing(ruined: Made, tmp_path: Path) -> Made:
    """The same, whose int8 files may be replaced."""
    graphs = []
    for graph in ruined.graphs:
        path = tmp_path / graph.path.name
        path.write_bytes(graph.path.read_bytes())
        graphs.append(replace(graph, path=path))
    return replace(ruined, graphs=tuple(graphs))


@pytest.fixture
def tuning(blobs: Make, tmp_path: Path) -> QatOptions:
    settings = replace(finetune_settings(40, batch_size=16), learning_rate=1e-3)
    return QatOptions(source=blobs(64, seed=2), settings=settings, folder=tmp_path / "run")


class Untouchable:
    """A source that must not be read."""

    name = identity = "nothing"
    has_captions = True
    split = None

    def __len__(self) -> int:
        raise AssertionError("training data were asked for")

    def __getitem__(self, index: int) -> Pair:
        raise AssertionError("training data were read")

    def caption(self, index: int) -> str | None:
        raise AssertionError("captions were read")

    def captions(self, index: int) -> tuple[str, ...]:
        raise AssertionError("captions were read")

    def content(self, index: int) -> str:
        raise AssertionError("training data were read")


def test_a_student_that_passes_is_never_tuned(
    task: QatTask, clip_towers: TowerPaths, tuning: QatOptions, tmp_path: Path
) -> None:
    made = quantized(task, [clip_towers.graph(tower) for tower in TOWERS], tmp_path)
    before = made.files()
    # fp16 is nothing to this: that its embeddings are no use at all changes nothing.
    broken = replace(
        made, embeddings=made.embeddings | {("image", "fp16"): -made.embeddings["image", "fp32"]}
    )
    outcome = broken.tuned(replace(tuning, source=Untouchable()))
    assert not describe_missed(outcome.judged, accept_undecided=True)
    assert not outcome.tuned
    assert (outcome.note, outcome.message) == ("", "")
    assert {item.subject for item in outcome.judged} == {"image int8", "text int8", "bundle"}
    assert made.files() == before
    assert not tuning.folder.exists()


def test_a_few_dozen_steps_bring_a_failing_student_inside_its_gates(
    failing: Made, tuning: QatOptions, caplog: pytest.LogCaptureFixture
) -> None:
    student, before = failing.task.student, failing.files()
    fingerprint = space_fingerprint(student)
    with caplog.at_level(logging.INFO, logger="edgeclip.export"):
        outcome = failing.tuned(tuning)
    assert outcome.tuned == ("image", "text")
    assert not describe_missed(outcome.judged, accept_undecided=True)
    assert outcome.note.startswith(
        "int8 fine-tuned for 40 steps of 16 on 64 blobs, because without that image int8: mean"
    )
    assert outcome.message == "fine-tuned for int8"
    assert caplog.messages[0].startswith(
        "fine-tuning for int8, because image int8: mean cosine is "
    )
    # What it was held against is the student that was given, which is still the same.
    assert space_fingerprint(student) == fingerprint
    after = failing.files()
    changed = {place for place, content in before.items() if after[place] != content}
    assert changed == {("image", "int8"), ("text", "int8")}
    # The files that are there now are those that were judged.
    embeddings = embed_test_pairs(
        student, failing.graphs, failing.task.test, failing.task.judging_device
    )
    again = finetune_int8(
        failing.task, failing.graphs, embeddings, replace(tuning, source=Untouchable())
    )
    assert again.judged == outcome.judged
    saved = DualEncoder.load(tuning.folder / "student")
    assert saved.space == student.space
    assert space_fingerprint(saved) != fingerprint
    assert {item.name for item in tuning.folder.iterdir()} == {"cache", "run", "student"}


def test_a_tuning_that_makes_it_worse_is_left(failing: Made, tuning: QatOptions) -> None:
    task = replace(failing.task, configs={"image": CPU})
    graphs = tuple(
        item for item in failing.graphs if (item.tower, item.precision) != ("text", "int8")
    )
    embeddings = {
        place: failing.embeddings[place]
        for place in failing.embeddings
        if place != ("text", "int8")
    }
    alone = Made(task, graphs, embeddings)
    before = alone.files()
    wild = replace(tuning, settings=replace(tuning.settings, steps=2, learning_rate=1.0))
    outcome = alone.tuned(wild)
    assert not outcome.tuned
    assert describe_missed(outcome.judged, accept_undecided=True)
    assert outcome.note == ""
    assert outcome.message.startswith("image int8: mean cosine is ")
    assert outcome.message.endswith("made it no better, so it is left as it was")
    assert alone.files() == before


def test_what_is_not_static_int8_cannot_be_tuned(failing: Made, tuning: QatOptions) -> None:
    weight_only = replace(failing, task=replace(failing.task, configs={}))
    outcome = weight_only.tuned(replace(tuning, source=Untouchable()))
    assert describe_missed(outcome.judged, accept_undecided=True)
    assert outcome.message.endswith("Only static int8 can be fine-tuned")


def test_only_the_tower_that_missed_is_tuned_and_smoothed_as_its_config_says(
    task: QatTask,
    clip_towers: TowerPaths,
    tuning: QatOptions,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Outliers of activations, which smoothing hands on to the weights.
    student = planted(short(task.student, ("image",)), 0.01, towers=("image",))
    graphs = [exported(student, "image", tmp_path), clip_towers.graph("text")]
    rough = quantized(replace(task, student=student), graphs, tmp_path)
    norms = smoothable(load_graph(graphs[0].path))
    smoothed = replace(CPU, smoothing=tuple((name, 0.5) for name in norms))
    made = replace(rough, task=replace(rough.task, configs={"image": smoothed, "text": CPU}))
    before = made.files()
    few = replace(tuning, settings=replace(tuning.settings, steps=1, learning_rate=1e-9))
    with caplog.at_level(logging.INFO, logger="edgeclip.export"):
        outcome = made.tuned(few)
    steps = [item.getMessage() for item in caplog.records if item.name.startswith("edgeclip")]
    assert "image int8: mean cosine is 0.9" in steps[0]
    assert "text int8" not in steps[0]
    assert outcome.tuned == ("image",)
    cosines = {
        item.subject: item.record.value
        for item in outcome.judged
        if item.record.name == "mean cosine"
    }
    assert cosines["image int8"] > 0.997
    after = made.files()
    assert {place for place in before if before[place] != after[place]} == {("image", "int8")}
    saved = DualEncoder.load(few.folder / "student").state_dict()
    changed = {name for name, value in student.state_dict().items() if not saved[name].equal(value)}
    assert changed
    assert all(name.startswith(("model.vision", "model.visual")) for name in changed)


def cosine(value: float, tower: Tower = "image") -> GateOutcome:
    return GateOutcome(f"{tower} int8", cosine_record(value))


LOSS = GateOutcome("bundle", loss_record("R@1 loss", 3.0, 1.0))


def test_fewer_misses_are_better_then_smaller_ones() -> None:
    good, near, far = ([cosine(value)] for value in (0.999, 0.99, 0.98))
    both = [*near, LOSS]
    assert describe_missed(good) == []
    assert is_better(near, far)
    assert not is_better(far, near)
    assert is_better(far, both)
    assert is_better(good, both)
    assert not is_better(near, [cosine(0.99)])
    # Three points where one may be lost are worse than 1.6 times as much in cosine.
    assert is_better([cosine(0.992)], [LOSS])


def test_if_only_both_towers_together_miss_both_are_tuned() -> None:
    assert failing_towers([LOSS], ("image", "text")) == ("image", "text")
    assert failing_towers([LOSS], ("image",)) == ("image",)
    assert failing_towers([cosine(0.9)], ("image", "text")) == ("image",)
    assert failing_towers([cosine(0.9), LOSS], ("image", "text")) == ("image",)
    assert failing_towers([cosine(0.9)], ("text",)) == ()


def test_what_would_move_trained_weights_is_left_out_of_a_config() -> None:
    config = replace(
        CPU,
        kept=("node_1",),
        smoothing=(("node_2", 0.5),),
    )
    assert without_smoothing(config) == replace(CPU, kept=("node_1",))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_smoothed_student_computes_what_it_did(
    tower: Tower, clip: DualEncoder, blobs: Make
) -> None:
    student = copy.deepcopy(clip)
    part = "vision" if tower == "image" else "text"
    layer = f"model.{part}_model.encoder.layers.1"
    norms = [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    with torch.no_grad():  # outliers, which alpha = 1 takes out altogether
        for name in norms:
            student.get_submodule(name).get_parameter("weight")[3] *= 50
    data = (
        calibration_images(blobs(20), clip.spec.image)
        if tower == "image"
        else calibration_texts(blobs(20), clip.text_tokenizer)
    )
    embed = getattr(student, f"embed_{tower}")
    values = torch.from_numpy(data.batch(0))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.inference_mode():
        wanted = embed(values)
        smooth_student(student, tower, dict.fromkeys(norms, 1.0), data)
        torch.testing.assert_close(embed(values), wanted, atol=1e-5, rtol=1e-4)
    after = student.state_dict()
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    assert changed == {
        *(f"{name}.{item}" for name in norms for item in ("weight", "bias")),
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"),
        f"{layer}.mlp.fc1.weight",
    }
    seen: list[torch.Tensor] = []
    norm = student.get_submodule(norms[0])
    assert isinstance(norm, nn.LayerNorm)
    handle = norm.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.inference_mode():
        for index in range(data.count):
            embed(torch.from_numpy(data.batch(index)))
    handle.remove()
    largest = torch.stack([item.abs().flatten(0, -2).amax(dim=0) for item in seen]).amax(dim=0)
    torch.testing.assert_close(largest, torch.ones_like(largest), atol=1e-4, rtol=0)


def test_a_norm_that_no_linear_layer_reads_is_refused(clip: DualEncoder, blobs: Make) -> None:
    data = calibration_images(blobs(4), clip.spec.image)
    student = copy.deepcopy(clip)
    with pytest.raises(ExportError, match=r"no linear layer reads model.*pre_layrnorm"):
        smooth_student(student, "image", {"model.vision_model.pre_layrnorm": 0.5}, data)


RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]
CONFIGS = {
    "cpu": CPU,
    "symmetric": StaticInt8(symmetric=True),
    "one scale for each weight": replace(CPU, per_channel=False),
}


def batches(dual: DualEncoder, tower: Tower, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, dual.spec.image)
    return calibration_texts(source, dual.text_tokenizer)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("family", ["clip", "convnext"])
def test_a_fake_quantized_student_gives_what_its_int8_graph_gives(
    family: str,
    tower: Tower,
    config: StaticInt8,
    blobs: Make,
    run_graph: RunGraph,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    source = paths.image if tower == "image" else paths.text
    quantize_graph(source, tmp_path / "int8.onnx", config, batches(dual, tower, blobs(32, seed=1)))
    grids = product_grids(dual, tower, source, tmp_path / "int8.onnx", config)
    data = batches(dual, tower, blobs(40))
    module, embed = tower_module(dual, tower), getattr(dual, f"embed_{tower}")
    for index in range(data.count):
        values = data.batch(index)
        (in_int8,) = run_graph(tmp_path / "int8.onnx", values).values()
        (in_float,) = run_graph(source, values).values()
        with torch.inference_mode(), fake_quantized(dual, grids):
            as_exported = module(torch.from_numpy(values)).numpy()
            as_trained = embed(torch.from_numpy(values)).numpy()
        for imitated in (as_exported, as_trained):
            found = cosines(imitated, in_int8)
            assert found.min() > 0.999
            assert 1 - found.mean() < 0.1 * (1 - cosines(in_int8, in_float).mean())


def test_layers_are_named_whatever_became_of_their_nodes(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    data = batches(clip, "image", blobs(16))
    plain, merged = clip_towers.image, tmp_path / "merged.onnx"
    save_graph(load_graph(plain), merged)
    apply_passes(merged, ["simplify", "merge projections"])
    grids = []
    for source in (plain, merged):
        quantized = tmp_path / f"{source.stem}_int8.onnx"
        quantize_graph(source, quantized, CPU, data)
        grids.append(product_grids(clip, "image", source, quantized, CPU))
    assert len(grids[0]) == 13
    assert grids[0].keys() == grids[1].keys()
    for name, grid in grids[0].items():
        assert grids[1][name].input.scale == pytest.approx(grid.input.scale, rel=1e-3)
        assert grid.weight.largest == 64


def test_a_siglips_pooling_is_left_out(blobs: Make, tmp_path: Path) -> None:
    siglip = DualEncoder.load(FAMILIES["siglip"](tmp_path / "siglip").folder)
    source = tmp_path / "image.onnx"
    export_tower(siglip, "image", source)
    merged = tmp_path / "merged.onnx"
    save_graph(load_graph(source), merged)
    apply_passes(merged, ["simplify", "merge projections"])
    for graph in (source, merged):
        int8 = tmp_path / f"{graph.stem}_int8.onnx"
        quantize_graph(graph, int8, CPU, batches(siglip, "image", blobs(16)))
        grids = product_grids(siglip, "image", graph, int8, CPU)
        assert len(grids) == 2 * 6 + 3  # two layers, and what follows the pooling


def test_what_stays_in_float_is_not_rounded(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    config = replace(CPU, kept=("node_MatMul_18", "node_linear_12"))
    quantize_graph(
        clip_towers.image, tmp_path / "a.onnx", config, batches(clip, "image", blobs(16))
    )
    grids = product_grids(clip, "image", clip_towers.image, tmp_path / "a.onnx", config)
    assert len(grids) == 11
    assert "model.visual_projection" not in grids
    assert "model.vision_model.encoder.layers.0.self_attn.q_proj" not in grids
    assert "model.vision_model.encoder.layers.0.self_attn.k_proj" in grids


def test_a_graph_of_another_student_is_refused(
    clip: DualEncoder,
    legacy_clip: DualEncoder,
    convnext: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    data = batches(clip, "image", blobs(8))
    quantize_graph(clip_towers.image, tmp_path / "int8.onnx", CPU, data)
    with pytest.raises(ExportError, match="is no layer of the student"):
        product_grids(convnext, "image", clip_towers.image, tmp_path / "int8.onnx", CPU)
    with pytest.raises(ExportError, match="no quantized product of the image tower"):
        product_grids(clip, "image", clip_towers.image, clip_towers.image, CPU)


def test_norms_are_named_too(clip: DualEncoder, clip_towers: TowerPaths) -> None:
    # The last layer's first norm is there twice: for all tokens, and for the class token.
    nodes = [f"node_layer_norm_{number}" for number in (1, 2, 3, 4, 6)]
    layers = "model.vision_model.encoder.layers"
    assert layer_norm_names(clip, "image", clip_towers.image, nodes) == {
        "node_layer_norm_1": f"{layers}.0.layer_norm1",
        "node_layer_norm_2": f"{layers}.0.layer_norm2",
        "node_layer_norm_3": f"{layers}.1.layer_norm1",
        "node_layer_norm_4": f"{layers}.1.layer_norm1",
        "node_layer_norm_6": "model.vision_model.post_layernorm",
    }
    with pytest.raises(ExportError, match="node_matmul is no LayerNorm"):
        layer_norm_names(clip, "image", clip_towers.image, ["node_matmul"])
