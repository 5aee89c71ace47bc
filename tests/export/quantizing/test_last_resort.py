import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeclip.compress.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.quantization_aware import gentle_settings
from edgeclip.compress.sources import Pair, Source
from edgeclip.export.gates import Bounds, Judged
from edgeclip.export.graph import load_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.judge_precisions import Verdict
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.last_resort import (
    Attempt,
    Int8Task,
    Tuning,
    better,
    missed_towers,
    needs_qat,
    plainly,
    quantize,
    quantize_or_tune,
)
from edgeclip.export.quantizing.smooth import smoothable
from edgeclip.export.tower_graph import TOWERS
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.spec import Tower

pytestmark = pytest.mark.skip(reason="in work: no verb uses the last resort yet")


Make = Callable[..., Source]

CPU = StaticInt8(symmetric=False, reduce_range=True)
# Weights without training tell few pictures apart: rounding alone can cost a rank.
BOUNDS = Bounds(mean_cosine=0.995, p1_cosine=0.98, r1_loss=25.0)


FACTOR = 30.0


def planted(
    student: DualEncoder, factor: float, towers: Sequence[Tower] = ("image", "text")
) -> DualEncoder:
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
def task(clip: DualEncoder, blobs: Make, cpu_device: DeviceProfile) -> Int8Task:
    return Int8Task(
        student=clip,
        configs={"image": CPU, "text": CPU},
        calibration=blobs(32, seed=1),
        test=blobs(60),
        runner=cpu_device,
        bounds=BOUNDS,
        form=GraphForm(),
    )


@pytest.fixture(scope="module")
def failing(task: Int8Task) -> Int8Task:
    """The same with a student that int8 ruins."""
    return replace(task, student=planted(task.student, FACTOR))


@pytest.fixture(scope="module")
def missed(failing: Int8Task, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """What quantizing alone makes of that."""
    return quantize(failing, tmp_path_factory.mktemp("missed"))


@pytest.fixture
def tuning(blobs: Make, tmp_path: Path) -> Tuning:
    settings = replace(gentle_settings(40, batch_size=16), learning_rate=1e-3)
    return Tuning(source=blobs(64, seed=2), settings=settings, folder=tmp_path / "run")


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


def test_a_student_that_passes_is_never_tuned(
    task: Int8Task, tuning: Tuning, tmp_path: Path
) -> None:
    forbidden = replace(tuning, source=Untouchable())
    outcome = quantize_or_tune(task, tmp_path / "graphs", forbidden)
    assert outcome.plain.passed
    assert outcome.chosen is outcome.plain
    assert outcome.tuned is None
    assert (outcome.note, outcome.says) == ("", "")
    assert not tuning.folder.exists()


def test_a_student_that_fails_is_only_tuned_where_that_is_allowed(
    failing: Int8Task, missed: Attempt, tmp_path: Path
) -> None:
    outcome = quantize_or_tune(failing, tmp_path, plain=missed)
    assert outcome.chosen is missed
    assert not missed.passed
    assert outcome.tuned is None
    assert "image int8: mean cosine is 0.9" in outcome.says
    assert outcome.says.endswith(
        "--qat-steps 300 would fine-tune the student for int8 and try again"
    )
    assert outcome.note == ""
    assert list(tmp_path.iterdir()) == []


def test_a_few_dozen_steps_bring_a_failing_student_inside_its_gates(
    failing: Int8Task, missed: Attempt, tuning: Tuning, tmp_path: Path
) -> None:
    before = space_fingerprint(failing.student)
    lines: list[str] = []
    outcome = quantize_or_tune(
        failing, tmp_path / "graphs", tuning, plain=missed, progress=lines.append
    )
    assert not outcome.plain.passed
    assert outcome.tuned is not None
    assert outcome.tuned.passed
    assert outcome.chosen is outcome.tuned
    assert outcome.note.startswith(
        "int8 fine-tuned for 40 steps of 16 on 64 blobs, because without that image int8: mean"
    )
    assert outcome.says == "fine-tuned for int8"
    assert lines[0].startswith("fine-tuning for int8, because image int8: mean cosine is")
    # What it was held against is the student that was given, which is still the same.
    assert space_fingerprint(failing.student) == before
    for tower in TOWERS:
        assert outcome.tuned.graph(tower, "fp32") == missed.graph(tower, "fp32")
        assert outcome.tuned.graph(tower, "int8") != missed.graph(tower, "int8")
    saved = DualEncoder.load(tuning.folder / "student")
    assert saved.space == failing.student.space
    assert space_fingerprint(saved) != before


def test_a_tuning_that_makes_it_worse_is_left(
    failing: Int8Task, missed: Attempt, tuning: Tuning, tmp_path: Path
) -> None:
    wild = replace(tuning, settings=replace(tuning.settings, steps=2, learning_rate=1.0))
    outcome = quantize_or_tune(failing, tmp_path / "graphs", wild, plain=missed)
    assert outcome.tuned is not None
    assert outcome.chosen is missed
    assert outcome.note == ""
    assert outcome.says.endswith("made it no better, so it is left as it was")


def test_only_the_tower_that_missed_is_tuned_and_smoothed_as_its_config_says(
    task: Int8Task, tuning: Tuning, tmp_path: Path
) -> None:
    # Outliers of activations, which smoothing hands on to the weights.
    student = planted(task.student, 1 / FACTOR, towers=("image",))
    mine = replace(task, student=student, configs={"image": CPU})
    rough = quantize(mine, tmp_path / "rough")
    graph = rough.graph("image", "fp32")
    assert graph is not None
    norms = smoothable(load_graph(graph.path))
    smoothed = replace(CPU, smoothing=tuple((name, 0.5) for name in norms))
    few = replace(tuning, settings=replace(tuning.settings, steps=1, learning_rate=1e-9))
    outcome = quantize_or_tune(
        replace(mine, configs={"image": smoothed}), tmp_path / "smooth", few, plain=rough
    )
    assert outcome.tuned is not None
    assert mean_cosine(rough) < 0.995
    assert mean_cosine(outcome.tuned) > 0.997
    after = DualEncoder.load(few.folder / "student").state_dict()
    changed = {name for name, value in student.state_dict().items() if not after[name].equal(value)}
    assert changed
    assert all(name.startswith(("model.vision", "model.visual")) for name in changed)


def mean_cosine(found: Attempt) -> float:
    return next(item.record.value for item in found.judged if item.record.name == "mean cosine")


def record(name: str, value: float, bound: float, *, at_most: bool = False) -> GateRecord:
    return GateRecord(
        name=name,
        value=value,
        low=value,
        high=value,
        bound=bound,
        direction="<=" if at_most else ">=",
        unit="",
        passed=value <= bound if at_most else value >= bound,
    )


def attempt(*judged: Judged) -> Attempt:
    verdict = Verdict(judged=judged, kept=frozenset(), left_out=())
    return Attempt(graphs=(), embeddings={}, verdict=verdict)


def test_fewer_misses_are_better_then_smaller_ones() -> None:
    cosine = [Judged("image int8", record("mean cosine", value, 0.995)) for value in (0.99, 0.98)]
    loss = Judged("bundle", record("R@1 loss", 3.0, 1.0, at_most=True))
    good = attempt(Judged("image int8", record("mean cosine", 0.999, 0.995)))
    near, far, both = attempt(cosine[0]), attempt(cosine[1]), attempt(cosine[0], loss)
    assert good.passed
    assert not near.passed
    assert better(far, near) is near
    assert better(near, far) is near
    assert better(both, far) is far
    assert better(both, good) is good
    same = attempt(cosine[0])
    assert better(near, same) is near
    # Three points where one may be lost are worse than 1.6 times as much in cosine.
    third = attempt(Judged("image int8", record("mean cosine", 0.992, 0.995)))
    assert better(attempt(loss), third) is third


def test_a_missed_gate_asks_for_tuning() -> None:
    good, bad = record("mean cosine", 0.999, 0.995), record("R@1 loss", 2.0, 1.0, at_most=True)
    assert not needs_qat([])
    assert not needs_qat([good])
    assert needs_qat([good, bad])


def test_if_only_both_towers_together_miss_both_are_tuned() -> None:
    together = attempt(Judged("bundle", record("R@1 loss", 2.0, 1.0, at_most=True)))
    assert missed_towers(together, ("image", "text")) == ("image", "text")
    assert missed_towers(together, ("image",)) == ("image",)


def test_what_would_move_trained_weights_is_left_out_of_a_config() -> None:
    config = replace(
        CPU,
        kept=("node_1",),
        smoothing=(("node_2", 0.5),),
        equalised=True,
        bias_corrected=True,
    )
    assert plainly(config) == replace(CPU, kept=("node_1",))
