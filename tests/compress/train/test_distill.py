import copy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.compress.compute import ComputeType
from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import EmojiSource, FolderSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import (
    TeacherCache,
    build_cache,
)
from edgeclip.compress.train.batch_losses import embed_batch
from edgeclip.compress.train.distill import distill, switch_off_dropout
from edgeclip.compress.train.distillation_batches import DistillationBatches, caption_keys
from edgeclip.compress.train.held_out import IMAGE_COSINE, STUDENT_R1, TEACHER_R1, TEXT_COSINE
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.pretrain import new_teacher
from edgeclip.compress.train.train_loop import BatchPart, TrainSettings, read_log
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import MaxBad
from tests.compress.conftest import SHAPE
from tests.compress.teachers.teacher_factory import FAMILIES

pytestmark = pytest.mark.slow

SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
# The same as in killed_run.py, which saves after every step.
SETTINGS = TrainSettings(steps=12, batch_size=8, warmup_steps=3, compute="fp32", workers=0)


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
    sampling = Sampling(parts_of(source), held_out=0)
    how = TrainSettings(steps=1, batch_size=4)
    batches = DistillationBatches(teacher, [cache], source, sampling, how)
    shown: dict[int, list[int]] = {}
    for step in range(9):  # six epochs
        part = BatchPart(step, 0, 1)
        batch = batches(part)
        indices, epochs = (found.tolist() for found in batches.items(part))
        numbers = [epoch % (1 + i % 3) for i, epoch in zip(indices, epochs, strict=True)]
        for index, number in zip(indices, numbers, strict=True):
            shown.setdefault(index, []).append(number)
        captions = [f"{index} {number}" for index, number in zip(indices, numbers, strict=True)]
        assert torch.equal(batch.inputs["ids"], teacher.tokenize(captions))
        wanted = torch.from_numpy(cache.text(indices, numbers).astype(np.float32))
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
        torch.testing.assert_close(batch.targets["text 0"], wanted)
    assert shown == {i: [epoch % (1 + i % 3) for epoch in range(6)] for i in range(6)}


def test_a_batch_holds_what_belongs_together(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    # The cache was made by this very model, so its answers must be those in the batch.
    sampling = Sampling(parts_of(source), held_out=0)
    batches = DistillationBatches(
        teacher, [cache], source, sampling, replace(SETTINGS, batch_size=15)
    )
    for step in (0, 1, 2):  # the second one crosses from view 0 to view 1
        batch = batches(BatchPart(step, 0, 1))
        assert all(batch.targets[name].all() for name in ("readable", "captioned"))
        with torch.inference_mode():
            found = embed_batch(teacher, batch.inputs)
        for name in ("image", "text"):
            wanted = batch.targets[f"{name} 0"]
            assert (found[name] * wanted).sum(dim=1).min() > 0.999
            torch.testing.assert_close(wanted.norm(dim=1), torch.ones(15))
        thirds = [batches(BatchPart(step, number, 3)) for number in range(3)]
        for name, rows in batch.targets.items():
            assert torch.equal(rows, torch.cat([third.targets[name] for third in thirds])), name
        pixels = torch.cat([third.inputs["pixels"] for third in thirds])
        assert torch.equal(pixels, batch.inputs["pixels"])
    assert set((batches.items(BatchPart(1, 0, 1))[1] % 2).tolist()) == {0, 1}


def test_captions_are_equal_whatever_padding_follows() -> None:
    ids = np.array([[1, 5, 2, 0, 0], [1, 5, 2, 0, 0], [1, 5, 6, 2, 0]])
    keys = caption_keys(ids, pad_id=0)
    assert keys[0] == keys[1] != keys[2]
    assert caption_keys(ids[:, :4], pad_id=0).tolist() == keys.tolist()
    ends = np.array([[1, 5, 2, 2], [1, 5, 2, 2]])  # where the end token pads
    assert caption_keys(ends, pad_id=2)[0] == caption_keys(ends[:, :3], pad_id=2)[0]


def test_some_pictures_without_captions(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few_pictures, tmp_path / "mixed")
    table = folder / "captions.csv"
    table.unlink()
    for number in range(0, 20, 2):
        (folder / f"{number:04d}.txt").write_text(f"picture {number}")
    source = FolderSource(folder)
    cache = build_cache(teacher, source, tmp_path / "cache")
    batches = DistillationBatches(
        teacher, [cache], source, Sampling(parts_of(source), held_out=0), SETTINGS
    )
    part = BatchPart(0, 0, 1)
    batch, (indices, _) = batches(part), batches.items(part)
    assert batch.targets["captioned"].tolist() == [index % 2 == 0 for index in indices]
    assert batch.targets["readable"].all()
    student = _distilled(teacher, cache, source, tmp_path / "run")
    assert not torch.equal(
        student.get_parameter("model.text_projection.weight"),
        new_student(teacher, SMALL).get_parameter("model.text_projection.weight"),
    )


def test_a_picture_that_cannot_be_read_counts_for_nothing(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(few_pictures, tmp_path / "broken")
    (folder / "0003.bmp").write_bytes(b"BM")
    source = FolderSource(folder)
    cache = build_cache(teacher, source, tmp_path / "cache")
    (folder / "0007.bmp").write_bytes(b"BM")  # after it was cached
    _distilled(teacher, cache, source, tmp_path / "run")
    assert [message for message in caplog.messages if "left out of training" in message] == [
        message for message in caplog.messages if "0007.bmp" in message
    ]
    for path in folder.glob("*.bmp"):
        path.write_bytes(b"BM")
    with pytest.raises(InputError, match=r"can(not)? be read"):
        _distilled(teacher, cache, source, tmp_path / "other", replace(SETTINGS, seed=1))


def test_no_activation_is_left_to_chance(tmp_path: Path) -> None:
    # Its text tower is a BERT, whose dropout is on by default.
    teacher = DualEncoder.load(FAMILIES["chinese_clip"](tmp_path / "teacher").folder)
    student = new_student(teacher, SMALL).train()
    ids = student.tokenize(["a red apple", "tree"])
    chances = [module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)]
    assert any(chances)
    switch_off_dropout(student)
    first, second = student.embed_text(ids), student.embed_text(ids)
    assert torch.equal(first, second)


def test_several_teachers(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    other = new_teacher(replace(SHAPE, dim=16), seed=3).eval()
    caches = [cache, build_cache(other, source, tmp_path / "cache", views=2)]
    student = new_student(teacher, SMALL)
    distill(
        student,
        caches,
        source,
        loss_weights=LossWeights(),
        settings=SETTINGS,
        out=tmp_path / "run",
    )
    assert student.space == teacher.space
    assert read_log(tmp_path / "run" / "log.jsonl") != ()
    alone = _distilled(teacher, cache, source, tmp_path / "alone")
    assert space_fingerprint(student) != space_fingerprint(alone)
    views = build_cache(other, source, tmp_path / "views", views=1)
    with pytest.raises(ConfigError, match="other views of the pictures"):
        distill(
            new_student(teacher, SMALL),
            [cache, views],
            source,
            loss_weights=LossWeights(),
            settings=SETTINGS,
            out=tmp_path / "other",
        )


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
    held_out = {IMAGE_COSINE, TEXT_COSINE, *STUDENT_R1, *TEACHER_R1}
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
    with pytest.raises(ConfigError, match="by --feature alone"):
        distill(
            student,
            cache,
            source,
            loss_weights=LossWeights(feature=0),
            settings=SETTINGS,
            out=tmp_path / "nothing",
        )


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
    assert (out / "checkpoint-6").is_dir()
    resumed = _distilled(teacher, cache, source, out, settings)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    logs = [read_log(folder / "log.jsonl") for folder in (out, tmp_path / "whole")]
    assert [line["step"] for line in logs[0]] == list(range(1, 13))
    assert [line["total"] for line in logs[0]] == [line["total"] for line in logs[1]]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-12", "log.jsonl"]


def test_a_batch_of_more_than_all_pictures_is_warned_of(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: FolderSource,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    large = replace(SETTINGS, steps=1, batch_size=19)
    _distilled(teacher, cache, source, tmp_path / "run", large)
    assert "a batch of 19 is more than the 18 pictures to train on" in caplog.text


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
    other = new_teacher(replace(SHAPE, dim=16), seed=3).eval()
    narrow = build_cache(other, source, tmp_path / "cache")
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


def test_pictures_of_another_size_do_not_resume(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    # A convolutional tower has weights of the same sizes for both.
    small = StudentShape(
        family="convolutional", whole_text=True, conv_widths=(8,), conv_depths=(1,), image_size=16
    )
    settings = replace(SETTINGS, steps=2)
    _distilled(teacher, cache, source, tmp_path / "run", settings, small)
    large = replace(small, image_size=24)
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        _distilled(teacher, cache, source, tmp_path / "run", settings, large)


def test_a_picture_that_the_second_teacher_could_not_read_is_left_out(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few_pictures, tmp_path / "pictures")
    source = FolderSource(folder)
    first = build_cache(teacher, source, tmp_path / "first")
    whole = source.paths[3].read_bytes()
    source.paths[3].write_bytes(whole[:40])
    limit = MaxBad(share=0.5, count=5)
    second = build_cache(teacher, source, tmp_path / "second", max_bad=limit)
    source.paths[3].write_bytes(whole)
    assert (first.unreadable, second.unreadable) == ((), (3,))
    how = replace(SETTINGS, batch_size=len(source))
    sampling = Sampling(parts_of(source), held_out=0)
    part = BatchPart(0, 0, 1)
    batches = DistillationBatches(teacher, [first, second], source, sampling, how)
    left_out = batches.items(part)[0][~batches(part).targets["readable"].numpy()]
    assert left_out.tolist() == [3]


def test_another_teacher_or_student_does_not_resume(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    _distilled(teacher, cache, source, out)
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        _distilled(teacher, cache, source, out, shape=replace(SMALL, image_layers=1))
    begun = []
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        distill(
            new_student(teacher, SMALL),
            cache,
            source,
            loss_weights=LossWeights(),
            settings=SETTINGS,
            out=out,
            start="another model",
            begin=lambda: begun.append(True),
        )
    assert not begun
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.model.get_parameter("visual_projection.weight").mul_(-1)
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        _distilled(other, build_cache(other, source, tmp_path / "cache"), source, out)
