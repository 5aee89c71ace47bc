"""From a teacher of each family to a student, a verified bundle and the runtime, as a person goes.

Teachers are random and tiny, so nothing is said about quality: the bounds to the teacher are wide.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.encoder import Encoder
from tests.compress.teachers.teacher_factory import FAMILIES, Teacher

pytestmark = pytest.mark.slow

SOURCE = EmojiSource("test", 4, size=57)
TEXTS = ["", "an eagle, left of a RED apple!", "一只狗 🦅", "red apple " * 40]
SMALL = ["--image-heads", "1", "--image-layers", "1", "--text-heads", "1", "--text-layers", "1"]
CONVOLUTIONAL = ["--family", "convolutional", "--conv-widths", "8", "16", "--conv-depths", "1", "1"]
STEPS = ["--count", "12", "--steps", "3", "--batch-size", "4", "--held-out", "2"]
WIDE = ["--teacher-mean-cosine", "-1", "--teacher-p1-cosine", "-1", "--teacher-r1-kept", "0"]
ELSEWHERE = [
    "--device",
    "x86-avx2",
    "--precisions",
    "fp32",
    "--test-count",
    "24",
    "--calibration-count",
    "8",
    "--accept-undecided",
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return FAMILIES[request.param](tmp_path_factory.mktemp("teacher") / str(request.param))


def bundle_answers_as(bundle: Path, model: DualEncoder) -> None:
    pictures = [SOURCE[index].image for index in range(len(SOURCE))]
    with torch.inference_mode():
        image = model.embed_image(model.preprocess(pictures)).numpy()
        text = model.embed_text(model.tokenize(TEXTS)).numpy()
    encoder = Encoder.open(bundle)
    assert encoder.spec == model.spec
    np.testing.assert_allclose(encoder.encode_image(pictures), image, atol=1e-4)
    np.testing.assert_allclose(encoder.encode_text(TEXTS, truncate=True), text, atol=1e-4)


def test_a_teacher_becomes_a_student_and_a_bundle(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, bundle = tmp_path / "student", tmp_path / "bundle"
    named = ["--teacher", str(teacher.folder)]
    inherits = teacher.folder.name != "convnext_and_roberta"
    shape = SMALL if inherits else [*CONVOLUTIONAL, *SMALL[4:]]
    status = main(["distill", *named, "--out", str(student), *shape, *STEPS])
    assert status == 0, capsys.readouterr().err
    status = main(["export", str(student), *named, "--out", str(bundle), *ELSEWHERE, *WIDE])
    assert status == 0, capsys.readouterr().err
    assert main(["verify", str(bundle)]) == 0, capsys.readouterr()
    model = DualEncoder.load(student)
    assert Encoder.open(bundle).space == model.space == DualEncoder.load(teacher.folder).space
    bundle_answers_as(bundle, model)
