import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeclip.compress.data.sources import EmojiSource, FolderSource, Pair
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, embed_source
from edgeclip.compress.train.pretrain import new_teacher
from edgeclip.compress.train.quantization_aware import (
    InputGrid,
    ProductGrid,
    ProductGrids,
    WeightGrid,
    fake_quantized,
    fine_tune,
    finetune_settings,
    quantized_towers,
)
from edgeclip.compress.train.train_loop import read_log
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Tower
from tests.compress.conftest import SHAPE

SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
SETTINGS = replace(finetune_settings(10, batch_size=8), checkpoint_seconds=1e-6, workers=0)


def new(teacher: DualEncoder) -> DualEncoder:
    """The student of every test: the same weights each time."""
    return new_student(teacher, SMALL)


@pytest.fixture(scope="module")
def cache(
    teacher: DualEncoder, source: FolderSource, tmp_path_factory: pytest.TempPathFactory
) -> TeacherCache:
    """What the student itself embeds to in float."""
    return build_cache(new(teacher), source, tmp_path_factory.mktemp("cache") / "cache")


def rounding(student: DualEncoder, *parts: str, largest: int = 127) -> ProductGrids:
    """Round the inputs of all linear layers of some parts to 255 steps from -4 to 4."""
    grid = InputGrid(scale=8 / 255, zero=128, lowest=0, highest=255)
    names = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(parts or "model.")
    ]
    both = ProductGrid(input=grid, weight=WeightGrid(largest=largest))
    return dict.fromkeys(names, both)


def loss_in_int8(
    student: DualEncoder, before: DualEncoder, source: FolderSource, grids: ProductGrids
) -> float:
    """Mean of 1 - cos between a student's rounded embeddings and another's in float."""
    wanted = embed_source(before, source)
    with fake_quantized(student, grids):
        found = embed_source(student, source)
    pairs = zip(found, wanted, strict=True)
    return float(torch.stack([1 - (mine * right).sum(dim=1) for mine, right in pairs]).mean())


def test_few_levels_lose_less_after_a_few_steps(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    student = new(teacher)
    grids = rounding(student, largest=3)
    damage = loss_in_int8(student, new(teacher), source, grids)
    settings = replace(finetune_settings(60, batch_size=20), learning_rate=1e-3)
    fine_tune(student, cache, source, grids=grids, settings=settings, out=tmp_path / "run")
    assert damage > 0.002
    assert loss_in_int8(student, new(teacher), source, grids) < 0.5 * damage
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert set(log[0]) == {"step", "seconds", "total", "image", "text"}
    assert log[-1]["total"] < 0.6 * log[0]["total"]


def test_the_result_is_an_ordinary_float_student(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    student, fresh = new(teacher), new(teacher)
    trainable = [weight.requires_grad for weight in student.parameters()]
    grids = rounding(student)
    fine_tune(student, cache, source, grids=grids, settings=SETTINGS, out=tmp_path / "run")
    assert [weight.requires_grad for weight in student.parameters()] == trainable
    assert not student.training
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == teacher.space
    assert space_fingerprint(loaded) == space_fingerprint(student) != space_fingerprint(fresh)
    assert list(loaded.state_dict()) == list(fresh.state_dict())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_only_the_tower_that_is_quantized_learns(
    tower: Tower, teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    student = new(teacher)
    parts = {"image": ("model.vision", "model.visual"), "text": ("model.text",)}[tower]
    grids = rounding(student, *parts)
    assert quantized_towers(student, grids) == (tower,)
    fine_tune(student, cache, source, grids=grids, settings=SETTINGS, out=tmp_path / "run")
    before = new(teacher).state_dict()
    changed = [
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(changed) > 10
    assert all(name.startswith(parts) for name in changed)
    assert set(read_log(tmp_path / "run" / "log.jsonl")[0]) == {"step", "seconds", "total", tower}


class Interrupted(FolderSource):
    """A folder at whose picture number `reads` somebody presses Ctrl-C."""

    def __init__(self, folder: Path, reads: int) -> None:
        super().__init__(folder)
        self._reads = reads

    def __getitem__(self, index: int) -> Pair:
        self._reads -= 1
        if self._reads == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_a_run_that_was_stopped_goes_on_where_it_was(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: FolderSource,
    few_pictures: Path,
    tmp_path: Path,
) -> None:
    def run(out: str, data: FolderSource) -> DualEncoder:
        student = new(teacher)
        grids = rounding(student)
        fine_tune(student, cache, data, grids=grids, settings=SETTINGS, out=tmp_path / out)
        return student

    whole = run("whole", source)
    with pytest.raises(KeyboardInterrupt, match="run it again to go on"):
        run("stopped", Interrupted(few_pictures, reads=30))
    done = len(read_log(tmp_path / "stopped" / "log.jsonl"))
    assert 0 < done < 10
    resumed = run("stopped", source)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert len(read_log(tmp_path / "stopped" / "log.jsonl")) == 10


def test_other_grids_or_another_student_do_not_resume(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    student, out = new(teacher), tmp_path / "run"
    grids = rounding(student)
    fine_tune(student, cache, source, grids=grids, settings=SETTINGS, out=out)
    with pytest.raises(
        ConfigError, match="other data, teacher or student"
    ):  # it is another one now
        fine_tune(student, cache, source, grids=grids, settings=SETTINGS, out=out)
    other = rounding(student, largest=64)
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        fine_tune(new(teacher), cache, source, grids=other, settings=SETTINGS, out=out)


def test_what_does_not_belong_together_is_refused(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: FolderSource,
    few_pictures: Path,
    tmp_path: Path,
) -> None:
    student, out = new(teacher), tmp_path / "run"
    grids = rounding(student)

    def refuse(match: str, cached: TeacherCache, data: FolderSource | EmojiSource) -> None:
        with pytest.raises(ConfigError, match=match):
            fine_tune(student, cached, data, grids=grids, settings=SETTINGS, out=out)

    refuse("of other data than EmojiScenes", cache, EmojiSource("train", 20, size=32))
    other = new_teacher(replace(SHAPE, dim=16), seed=3).eval()
    narrow = build_cache(other, source, tmp_path / "narrow")
    refuse("have 16 numbers, those of the student 32", narrow, source)
    bare = FolderSource(
        shutil.copytree(few_pictures, tmp_path / "bare", ignore=shutil.ignore_patterns("*.csv"))
    )
    refuse("needs captions", build_cache(student, bare, tmp_path / "cache"), bare)
    grids = {}
    refuse("nothing to fine-tune", cache, source)
    assert not out.exists()
