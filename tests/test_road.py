"""The whole road at tiny size, through the command line: teacher, student, bundle, answers."""

import csv
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime import Encoder
from edgeclip.runtime.cli.main import main

pytestmark = pytest.mark.slow

_TEACHER = (
    *("--steps", "8", "--batch-size", "16", "--image-size", "32", "--patch-size", "8"),
    *("--image-width", "64", "--image-layers", "2", "--text-width", "64", "--text-layers", "2"),
    *("--head-size", "32", "--dim", "32", "--vocab-size", "400"),
)
# Six steps bring no student near its teacher.
_BOUNDS = ("--teacher-mean-cosine=-1", "--teacher-p1-cosine=-1", "--teacher-r1-kept=0")
_STUDENT = (
    *("--count", "48", "--steps", "6", "--batch-size", "16"),
    *("--image-heads", "1", "--image-layers", "1", "--text-heads", "1", "--text-layers", "1"),
)


def _run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student, a bundle, and scenes to look at."""
    folder = tmp_path_factory.mktemp("road")
    teacher, student = folder / "teacher", folder / "student"
    _run("pretrain", "--out", teacher, "--run", folder / "teacher-run", *_TEACHER)
    _run("distill", "--teacher", teacher, "--out", student, *_STUDENT)
    counts = ("--test-count", 40, "--calibration-count", 16, "--accept-undecided")
    _run("export", student, "--teacher", teacher, "--out", folder / "bundle", *counts, *_BOUNDS)
    _run("scenes", folder / "photos", "--count", 6, "--size", 80)
    return folder


def test_the_bundle_verifies(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("verify", road / "bundle")
    assert "fp32" in capsys.readouterr().out


def test_student_and_teacher_share_one_space(road: Path) -> None:
    # The bundle carries the fingerprint of the teacher, not one of its own.
    from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint

    encoder = Encoder.open(road / "bundle")
    teacher = DualEncoder.load(road / "teacher")
    assert encoder.space == teacher.space
    assert encoder.spec.dim == teacher.spec.dim
    # So does the student's directory, which is another's work by its own weights.
    student = DualEncoder.load(road / "student")
    assert student.space == teacher.space
    assert space_fingerprint(student) != student.space


def test_pictures_are_found_by_what_they_are(
    road: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = road / "photos.npz"
    _run("embed", road / "photos", "--bundle", road / "bundle", "--out", index)
    picture = road / "photos" / "00003.png"
    _run("search", "--bundle", road / "bundle", "--index", index, "--image", picture)
    best = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  +"))
    assert best == f"  +1.000  {picture.as_posix()}"  # keys are the paths as embedded


def test_classify_and_eval_answer(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (road / "photos" / "captions.csv").open(encoding="utf-8") as stream:
        caption = next(csv.DictReader(stream))["caption"]
    picture = road / "photos" / "00000.png"
    _run("classify", picture, "--bundle", road / "bundle", "--labels", f"{caption},nothing at all")
    _run("eval", road / "photos", "--bundle", road / "bundle")
    assert "R@1" in capsys.readouterr().out


def test_precisions_agree(road: Path) -> None:
    fp32 = Encoder.open(road / "bundle", precision="fp32")
    held = fp32.bundle.manifest.tower("image").precisions
    photos = sorted((road / "photos").glob("*.png"))
    reference = fp32.encode_image(photos)
    for precision in held:
        other = Encoder(fp32.bundle, fp32.device, precision).encode_image(photos)
        assert np.sum(other * reference, axis=1).min() > 0.97
