import html
from pathlib import Path

import pytest

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.diagnose.diagnose import Inputs
from edgeclip.compress.diagnose.diagnosis import Diagnosis, not_compared
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.errors import ConfigError


@pytest.mark.slow
def test_a_model_beside_itself_has_no_fault(teacher_folder: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        words = ["--teacher", str(teacher_folder), "--student", str(teacher_folder)]
        words += ["--count", "40", "--group-by", "objects", "--out", str(tmp_path / name)]
        assert main(["diagnose", *words]) == 0
        found.append((tmp_path / name / "diagnosis.json").read_text(encoding="utf-8"))
    assert found[0] == found[1]  # by the seed alone
    diagnosis = Diagnosis.load(tmp_path / "one" / "diagnosis.json")
    assert {item.kind for item in diagnosis.findings} <= {"too few pictures"}
    teacher, student = diagnosis.models
    assert student.image is not None
    assert student.image.cosine is not None
    assert student.image.cosine.value == pytest.approx(1)
    assert student.image.neighbours.value == 1
    assert student.gap == teacher.gap
    for tower in diagnosis.towers:
        for number, row in enumerate(tower.cka):
            assert row[number] == pytest.approx(1)
        assert tower.entropy == tower.teacher_entropy
    page = (tmp_path / "one" / "diagnosis.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert 'src="http' not in page


@pytest.mark.slow
def test_a_student_of_another_space_is_not_called_healthy(
    teacher: DualEncoder,
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = (teacher.model, teacher.image_spec, teacher.tokenizer)
    DualEncoder(*parts, space="7" * 64).save(tmp_path / "other")
    words = ["--teacher", str(teacher_folder), "--student", str(tmp_path / "other")]
    words += ["--count", "40", "--group-by", "objects", "--out", str(tmp_path / "out")]
    assert main(["diagnose", *words]) == 0
    told = capsys.readouterr().out
    found = Diagnosis.load(tmp_path / "out" / "diagnosis.json")
    page = (tmp_path / "out" / "diagnosis.html").read_text(encoding="utf-8")
    (sentence,) = not_compared(found)
    assert sentence in told
    assert sentence in html.unescape(page)
    assert "no fault was found in what could be compared" in told


@pytest.mark.slow
def test_scenes_from_outside_are_of_the_same_drawing(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Inputs] = []

    def refuse(given: Inputs) -> None:
        seen.append(given)
        raise ConfigError("seen")

    monkeypatch.setattr("edgeclip.compress.cli.diagnose.diagnose", refuse)
    words = ["--teacher", str(teacher_folder), "--student", str(teacher_folder)]
    words += ["--data", "emoji-ink", "--count", "40", "--group-by", "objects"]
    assert main(["diagnose", *words, "--out", str(tmp_path / "out")]) == 2
    assert isinstance(seen[0].outside, EmojiSource)
    assert seen[0].outside.drawing == "ink"


def test_mistakes_are_named(
    teacher_folder: Path,
    few_pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["diagnose", *out]) == 2
    assert "--student" in capsys.readouterr().err
    student = ["--teacher", str(teacher_folder), "--student", str(teacher_folder)]
    assert main(["diagnose", *student, "--data", str(few_pictures), *out]) == 2
    assert "at least 40" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
