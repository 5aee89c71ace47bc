"""Students whose embeddings can be cut: the basis, the losses at each length, what is saved."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_basis import teacher_basis
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings, read_log
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Form
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

SMALL = StudentShape(image_heads=1, image_layers=1, text_heads=1, text_layers=1)
SETTINGS = TrainSettings(steps=2, batch_size=8, warmup_steps=1, compute="fp32", workers=0)


@pytest.fixture(scope="module")
def cache(
    teacher: DualEncoder, source: FolderSource, tmp_path_factory: pytest.TempPathFactory
) -> TeacherCache:
    return build_cache(teacher, source, tmp_path_factory.mktemp("cache") / "cache")


def test_the_first_axes_hold_most(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    basis = teacher_basis(cache, source, (4, 8), space=teacher.space)
    assert basis.lengths == (32, 8, 4)
    every = list(range(len(source)))
    rows = np.concatenate([cache.image(every), cache.text(every)]).astype(np.float64)
    held = ((rows @ basis.axes.T) ** 2).sum(axis=0)
    assert (np.diff(held) < 1e-3).all()
    kept = teacher_basis(cache, source, (8,), space=teacher.space, without=range(5, len(source)))
    few = np.concatenate([cache.image(every[:5]), cache.text(every[:5])]).astype(np.float64)
    assert ((few @ kept.axes[10:].T) ** 2).sum() < 1e-6  # ten rows have ten directions
    best = np.sort(np.linalg.eigvalsh(rows.T @ rows))[::-1]
    assert held[:4].sum() == pytest.approx(best[:4].sum(), rel=1e-3)


def test_losses_count_at_each_length(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    # The first step of both sees the same weights and the same batch.
    found = {}
    for name, dims in (("full", ()), ("cut", (8, 4))):
        student = new_student(teacher, SMALL)
        if dims:
            student.basis = teacher_basis(cache, source, dims, space=student.space)
        weights = LossWeights()
        distill(
            student, cache, source, loss_weights=weights, settings=SETTINGS, out=tmp_path / name
        )
        found[name] = read_log(tmp_path / name / "log.jsonl")[0]
    assert found["full"]["feature"] != pytest.approx(found["cut"]["feature"], rel=1e-3)
    student.basis = None
    more = replace(SETTINGS, steps=3)
    with pytest.raises(ConfigError):  # its losses are others
        distill(student, cache, source, loss_weights=weights, settings=more, out=tmp_path / "cut")


def test_a_student_keeps_its_basis(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    student = new_student(teacher, SMALL)
    student.basis = teacher_basis(cache, source, (8,), space=student.space)
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.basis is not None
    form = Form(8, "binary")
    assert loaded.basis.reducer(form).digest == student.basis.reducer(form).digest
    student.basis = None
    student.save(tmp_path / "student")  # replaces it with one that was not trained so
    assert not (tmp_path / "student" / BASIS_NAME).exists()
    assert DualEncoder.load(tmp_path / "student").basis is None


@pytest.mark.parametrize("dims", ["512", "8,8"])
def test_dims_that_cannot_be(
    dims: str, teacher_folder: Path, few_pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    words = ["distill", "--dims", dims, "--teacher", str(teacher_folder), "--out", str(out)]
    assert main([*words, "--data", str(few_pictures), "--steps", "1"]) == 2
    assert not out.exists()
