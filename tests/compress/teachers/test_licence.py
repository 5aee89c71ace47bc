"""The licence of a teacher is read, said and carried on."""

import json
import logging
from pathlib import Path

import pytest

from edgeclip.compress.students.student import StudentShape, adopt_student, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, read_record
from edgeclip.compress.teachers.licence import is_restricted, joined, read_licence
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.hub.model_card import render_card
from tests.compress.teachers.teacher_factory import FAMILIES


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Model", "mit"),
        ("---\nlicense: other\nlicense_name: apple-amlr\n---\n", "apple-amlr"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- cc-by-nc-4.0\n---\n", "cc-by-nc-4.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("# license: mit", None),
        ("", None),
    ],
)
def test_the_front_matter_of_a_card_tells_it(
    tmp_path: Path, card: str, licence: str | None
) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_licence(tmp_path, "someone/model") == licence


def test_a_known_text_or_name_tells_it_where_no_card_does(tmp_path: Path) -> None:
    assert read_licence(tmp_path, "someone/model") is None
    assert read_licence(tmp_path, "apple/MobileCLIP-S2-OpenCLIP") == "apple-amlr"
    assert read_licence(tmp_path, "runs/mobileclip-trials/small") is None
    (tmp_path / "LICENSE").write_text("\n   Apache License\n  Version 2.0")
    assert read_licence(tmp_path, "apple/MobileCLIP-S2-OpenCLIP") == "apache-2.0"
    (tmp_path / "LICENSE").write_text("Do what you like")
    assert read_licence(tmp_path, "jinaai/jina-clip-v2") == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("licence", "restricted"),
    [
        ("apple-amlr", True),
        ("apple-ascl", True),
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("fair-noncommercial-research-license", True),
        ("non-commercial use", True),
        ("mit", False),
        ("apache-2.0", False),
        ("cc-by-sa-4.0", False),
        ("ncsa", False),
        ("openrail", False),
    ],
)
def test_what_is_not_free(licence: str, restricted: bool) -> None:
    assert is_restricted(licence) is restricted


def test_weights_of_two_models_are_under_both_licences() -> None:
    assert joined("mit", None) == joined(None, "mit") == joined("mit", "MIT") == "mit"
    assert joined("mit", "apache-2.0") == "mit AND apache-2.0"
    assert joined(None, None) is None


@pytest.mark.slow
def test_a_restricted_teacher_is_loud_and_its_students_keep_its_licence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    made = FAMILIES["clip"](tmp_path / "teacher")
    (made.folder / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n")
    with caplog.at_level(logging.WARNING, logger="edgeclip"):
        teacher = DualEncoder.load(made.folder)
    assert "its licence is apple-amlr, for research or non-commercial use only" in caplog.text
    student = new_student(teacher, StudentShape())
    student.save(tmp_path / "student")
    record = read_record(tmp_path / "student")
    assert record is not None
    assert record.licence == "apple-amlr"
    assert DualEncoder.load(tmp_path / "student").licence == "apple-amlr"
    free = DualEncoder.load(FAMILIES["siglip"](tmp_path / "free").folder)
    assert free.licence is None
    assert adopt_student(free, teacher).licence == "apple-amlr"

    words = ["export", str(tmp_path / "student"), "--own-space", "--device", "x86-avx2"]
    words += ["--precisions", "fp32", "--test-count", "24", "--calibration-count", "8"]
    words += ["--accept-undecided"]
    assert main([*words, "--out", str(tmp_path / "bundle")]) == 0, capsys.readouterr().err
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.licence == "apple-amlr"
    assert "license: apple-amlr" in render_card(bundle, "someone/small", base_model=None)


@pytest.mark.slow
def test_the_card_lies_beside_the_modules_and_an_adapter_has_both_licences(tmp_path: Path) -> None:
    made = FAMILIES["sentence_transformers"](tmp_path / "sentences")
    (made.folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert DualEncoder.load(made.folder).licence == "mit"
    adapter = FAMILIES["lora"](tmp_path / "adapter").folder
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert DualEncoder.load(adapter).licence == "apache-2.0 AND cc-by-nc-4.0"


@pytest.mark.slow
def test_a_record_says_nothing_of_a_licence_that_is_unknown(tmp_path: Path) -> None:
    DualEncoder.load(FAMILIES["clip"](tmp_path / "teacher").folder).save(tmp_path / "again")
    record = json.loads((tmp_path / "again" / "edgeclip-model.json").read_text())
    assert sorted(record) == ["model", "schema_version", "space"]
