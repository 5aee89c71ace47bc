"""A student that is compared with its teacher on pictures held out of training."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.held_out import (
    IMAGE_COSINE,
    STUDENT_R1,
    TEACHER_R1,
    TEXT_COSINE,
    HeldOut,
)
from edgeclip.compress.train.kept_weights import BestStep
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings, read_log
from edgeclip.runtime.errors import InputError
from tests.compress.conftest import write_pictures

SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
Run = Callable[[LossWeights], tuple[DualEncoder, BestStep, list[dict[str, float]]]]


def held_out(source: FolderSource) -> NDArray[np.int64]:
    return Sampling(parts_of(source)).held_out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """160 pictures of which the untrained teacher knows nothing."""
    return FolderSource(write_pictures(tmp_path_factory.mktemp("pictures") / "some", 160))


@pytest.fixture(scope="module")
def cache(
    teacher: DualEncoder, source: FolderSource, tmp_path_factory: pytest.TempPathFactory
) -> TeacherCache:
    return build_cache(teacher, source, tmp_path_factory.mktemp("cache") / "cache", views=2)


def test_a_teacher_agrees_with_itself(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    rows = held_out(source)
    values = HeldOut(teacher, cache, source, rows, compute="fp32")().values
    assert values[IMAGE_COSINE] == pytest.approx(1, abs=1e-3)
    assert values[TEXT_COSINE] == pytest.approx(1, abs=1e-3)
    for ours, theirs in zip(STUDENT_R1, TEACHER_R1, strict=True):
        assert 0 <= values[theirs] < 0.3
        assert abs(values[ours] - values[theirs]) < 0.1  # the cache is rounded to float16


def test_pictures_alone_are_compared_without_texts(
    teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    folder = shutil.copytree(
        source.paths[0].parent, tmp_path / "bare", ignore=shutil.ignore_patterns("*.csv")
    )
    bare = FolderSource(folder)
    cache = build_cache(teacher, bare, tmp_path / "cache")
    found = HeldOut(teacher, cache, bare, np.arange(70), compute="fp32")()
    assert set(found.values) == {IMAGE_COSINE}
    assert found.score == found.values[IMAGE_COSINE] > 0.99


def test_a_picture_that_broke_after_it_was_cached_is_left_out(
    teacher: DualEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pictures(tmp_path / "pictures", 12)
    source = FolderSource(folder)
    cache = build_cache(teacher, source, tmp_path / "cache", views=1)
    first, *others = sorted(folder.glob("*.bmp"))
    first.write_bytes(b"")
    caplog.set_level(logging.WARNING, logger="edgeclip.compress")
    values = HeldOut(teacher, cache, source, np.arange(6), compute="fp32")().values
    assert values[IMAGE_COSINE] == pytest.approx(1, abs=1e-3)
    assert first.name in caplog.text
    for path in others:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 6 held-out pictures"):
        HeldOut(teacher, cache, source, np.arange(6), compute="fp32")


@pytest.fixture
def run(teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path) -> Run:
    settings = TrainSettings(
        steps=80, batch_size=32, learning_rate=3e-3, warmup_steps=8, compute="fp32"
    )

    def run(weights: LossWeights) -> tuple[DualEncoder, BestStep, list[dict[str, float]]]:
        student = new_student(teacher, SMALL)
        out = tmp_path / "run"
        best = distill(student, cache, source, loss_weights=weights, settings=settings, out=out)
        assert best is not None
        lines = [line for line in read_log(out / "log.jsonl") if IMAGE_COSINE in line]
        return student, best, lines

    return run


@pytest.mark.slow
def test_by_default_agreement_grows_where_the_teacher_knows_nothing(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    _, best, lines = run(LossWeights())
    for name in (IMAGE_COSINE, TEXT_COSINE):
        assert lines[-1][name] > lines[0][name] + 0.2
        assert lines[-1][name] > 0.8
    assert best.step > 60
    assert caplog.messages == []


@pytest.mark.slow
def test_losses_that_pull_away_are_warned_of_and_the_best_student_is_kept(
    run: Run,
    cache: TeacherCache,
    source: FolderSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="edgeclip.compress")
    student, best, lines = run(LossWeights(affinity=0, feature=0, interactive=0, contrastive=1))
    assert lines[-1][IMAGE_COSINE] + lines[-1][TEXT_COSINE] < 2 * best.validation.score - 0.04
    assert "was better than step" in caplog.text
    with torch.inference_mode():
        now = HeldOut(student, cache, source, held_out(source), compute="fp32")()
    assert now.score == pytest.approx(best.validation.score, abs=1e-5)
