import copy
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeclip.compress.compute import ComputeType
from edgeclip.compress.data.augmentation import Augmentation
from edgeclip.compress.data.sources import EmojiSource, FolderSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import (
    CacheSettings,
    TeacherCache,
    build_cache,
)
from edgeclip.compress.train.distill import DistillationBatches, distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings, read_log
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
# The same as in killed_run.py, which saves after every step.
SETTINGS = TrainSettings(steps=12, batch_size=8, warmup_steps=3, compute="fp32")


@pytest.fixture(scope="module")
def cache_folder(
    teacher: DualEncoder, source: FolderSource, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build_cache(teacher, source, folder, views=2)
    return folder


@pytest.fixture(scope="module")
def cache(teacher: DualEncoder, source: FolderSource, cache_folder: Path) -> TeacherCache:
    return build_cache(teacher, source, cache_folder, views=2)


def _distilled(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: FolderSource,
    out: Path,
    settings: TrainSettings = SETTINGS,
    shape: StudentShape = SMALL,
) -> DualEncoder:
    student = new_student(teacher, shape)
    distill(student, cache, source, loss_weights=LossWeights(), settings=settings, out=out)
    return student


def _empty_cache(count: int, views: int) -> TeacherCache:
    """A cache of nothing, to look at the order of the batches."""
    held = CacheSettings(
        space="",
        source="",
        count=count,
        views=views,
        dim=1,
        captions=False,
        augmentation=Augmentation(),
        logit_scale=1.0,
    )
    return TeacherCache(held, np.zeros((count, views, 1), np.float16), None)


@given(
    count=st.integers(1, 30),
    size=st.integers(1, 40),
    views=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_epoch_shows_every_pair_once(
    teacher: DualEncoder, count: int, size: int, views: int, seed: int
) -> None:
    data = EmojiSource("train", count, size=8)
    how = TrainSettings(steps=1, batch_size=size, seed=seed)
    batches = DistillationBatches(teacher, _empty_cache(count, views), data, how)
    epochs = views + 1
    shown: list[tuple[int, int]] = []
    for step in range(-(-epochs * count // size)):
        pairs = batches.pairs_of_step(step)
        assert len(pairs[0]) == len(pairs[1]) == size
        assert pairs == batches.pairs_of_step(step)
        shown += zip(*pairs, strict=True)
    for epoch in range(epochs):
        part = shown[epoch * count : (epoch + 1) * count]
        assert Counter(part) == Counter((index, epoch % views) for index in range(count))


def test_each_epoch_shows_the_next_caption_of_a_picture(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    rows = ["file,caption"]
    for number, path in enumerate(sorted(few_pictures.glob("*.bmp"))[:6]):
        (folder / path.name).write_bytes(path.read_bytes())
        rows += [f"{path.name},{number} {k}" for k in range(1 + number % 3)]
    (folder / "captions.csv").write_text("\n".join(rows))
    source = FolderSource(folder)
    cache = build_cache(teacher, source, tmp_path / "cache")
    assert cache.text is not None
    how = TrainSettings(steps=1, batch_size=4)
    batches = DistillationBatches(teacher, cache, source, how)
    for step in range(9):  # six epochs
        batch = batches(step)
        indices, _ = batches.pairs_of_step(step)
        numbers = [(4 * step + place) // 6 % (1 + index % 3) for place, index in enumerate(indices)]
        captions = [f"{index} {number}" for index, number in zip(indices, numbers, strict=True)]
        assert batch.ids is not None
        assert batch.teacher_text is not None
        assert torch.equal(batch.ids, teacher.tokenize(captions))
        wanted = torch.from_numpy(cache.text[indices, numbers].astype(np.float32))
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
        torch.testing.assert_close(batch.teacher_text.cpu(), wanted)


def test_every_epoch_and_seed_has_an_order_of_its_own(teacher: DualEncoder) -> None:
    data = EmojiSource("train", 40, size=8)
    orders = {
        tuple(
            DistillationBatches(
                teacher,
                _empty_cache(40, 1),
                data,
                TrainSettings(steps=1, batch_size=40, seed=seed),
            ).pairs_of_step(epoch)[0]
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_a_batch_holds_what_belongs_together(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    # The cache was made by this very model, so its answers must be those in the batch.
    batches = DistillationBatches(teacher, cache, source, replace(SETTINGS, batch_size=15))
    for step in (0, 1, 2):  # the second one crosses from view 0 to view 1
        batch = batches(step)
        assert batch.ids is not None
        assert batch.teacher_text is not None
        with torch.inference_mode():
            image, text = teacher.embed_image(batch.pixels), teacher.embed_text(batch.ids)
        assert (image * batch.teacher_image).sum(dim=1).min() > 0.999
        assert (text * batch.teacher_text).sum(dim=1).min() > 0.999
        torch.testing.assert_close(batch.teacher_image.norm(dim=1), torch.ones(15))
    assert set(batches.pairs_of_step(1)[1]) == {0, 1}


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        StudentShape(
            family="convolutional",
            text_heads=1,
            text_layers=1,
            conv_widths=(16, 32),
            conv_depths=(1, 1),
        ),
    ],
    ids=["inherited", "convolutional"],
)
def test_the_loss_goes_down(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: FolderSource,
    tmp_path: Path,
    shape: StudentShape,
) -> None:
    before = space_fingerprint(teacher)
    longer = replace(SETTINGS, steps=60, batch_size=20, learning_rate=3e-3)
    student = _distilled(teacher, cache, source, tmp_path / "run", longer, shape)
    log = read_log(tmp_path / "run" / "log.jsonl")
    held_out = {"held_out_image_cosine", "held_out_text_cosine"}
    held_out |= {"held_out_r1", "held_out_teacher_r1"}
    plain = {"step", "seconds", "total", "affinity", "feature", "interactive"}
    assert set(log[0]) == set(log[-1]) == plain | held_out
    assert set(log[1]) == plain
    assert log[-1]["total"] < 0.8 * log[0]["total"]
    assert log[-1]["feature"] < 0.5 * log[0]["feature"]
    assert student.spec.logit_scale == teacher.spec.logit_scale
    assert space_fingerprint(teacher) == before
    student.save(tmp_path / "student")
    assert space_fingerprint(DualEncoder.load(tmp_path / "student")) == space_fingerprint(student)


def test_pictures_alone_leave_the_text_tower(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(few_pictures, folder, ignore=shutil.ignore_patterns("*.csv"))
    source = FolderSource(folder)
    cache = build_cache(teacher, source, tmp_path / "cache")
    shape = StudentShape(image_heads=1, image_layers=2, whole_text=True)
    student = _distilled(teacher, cache, source, tmp_path / "run", SETTINGS, shape)
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    text = [name for name in ours if name.startswith(("text_", "logit_scale"))]
    assert len(text) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in text)
    fresh = new_student(teacher, shape).model.state_dict()
    image = [name for name in ours if name.startswith("visi") or name.startswith("visual")]
    assert not any(torch.equal(ours[name], fresh[name]) for name in image)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert log[-1]["total"] < log[0]["total"]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_kill_and_resume_give_the_same_weights(
    teacher: DualEncoder,
    teacher_folder: Path,
    cache: TeacherCache,
    cache_folder: Path,
    few_pictures: Path,
    source: FolderSource,
    tmp_path: Path,
    compute: ComputeType,
) -> None:
    settings = replace(SETTINGS, compute=compute)
    whole = _distilled(teacher, cache, source, tmp_path / "whole", settings)
    script, out = Path(__file__).parents[1] / "killed_run.py", tmp_path / "killed"
    reads = "54"  # two are held out; in the middle of the seventh batch of eight
    done = subprocess.run(
        [sys.executable, script, compute, teacher_folder, few_pictures, out, cache_folder, reads],
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 5 <= saved <= 6
    resumed = _distilled(teacher, cache, source, out, settings)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    logs = [read_log(folder / "log.jsonl") for folder in (out, tmp_path / "whole")]
    assert [line["step"] for line in logs[0]] == list(range(1, 13))
    assert [line["total"] for line in logs[0]] == [line["total"] for line in logs[1]]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_a_cache_of_other_data_is_refused(
    teacher: DualEncoder, cache: TeacherCache, tmp_path: Path
) -> None:
    other = EmojiSource("train", 20, size=32)
    student = new_student(teacher, SMALL)
    with pytest.raises(ConfigError, match="was made from other data than EmojiScenes train, 20"):
        distill(
            student,
            cache,
            other,
            loss_weights=LossWeights(),
            settings=SETTINGS,
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_dimension_is_refused(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    narrow = replace(cache, settings=replace(cache.settings, dim=16))
    with pytest.raises(ConfigError, match="embeds to 16 numbers, the student to 32"):
        _distilled(teacher, narrow, source, tmp_path / "run")


def test_a_teacher_that_moved_resumes(
    teacher: DualEncoder,
    teacher_folder: Path,
    cache: TeacherCache,
    source: FolderSource,
    tmp_path: Path,
) -> None:
    first = _distilled(teacher, cache, source, tmp_path / "run")
    moved = DualEncoder.load(shutil.copytree(teacher_folder, tmp_path / "moved"))
    second = _distilled(moved, cache, source, tmp_path / "run")
    assert space_fingerprint(first) == space_fingerprint(second)


def test_another_teacher_or_student_does_not_resume(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    _distilled(teacher, cache, source, out)
    with pytest.raises(ConfigError, match="other settings or data"):
        _distilled(teacher, cache, source, out, shape=replace(SMALL, image_layers=1))
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.model.get_parameter("visual_projection.weight").mul_(-1)
    with pytest.raises(ConfigError, match="other settings or data"):
        _distilled(other, build_cache(other, source, tmp_path / "cache"), source, out)
