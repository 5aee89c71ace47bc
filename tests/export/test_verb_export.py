import copy
from pathlib import Path

import pytest
import torch

from edgeclip.compress.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.build_bundle import BuiltBundle
from edgeclip.export.verb_export import gates_table, verdict
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.cli import main


def test_a_folder_of_photos_makes_a_bundle(
    clip: DualEncoder,
    pair_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip.save(tmp_path / "student")
    student, out = str(tmp_path / "student"), str(tmp_path / "bundle")
    command = ["export", student, "--teacher", student, "--data", str(pair_folder)]
    # With eight pairs and untrained weights, the R@1 gate of any other is a matter of luck.
    status = main([*command, "--precisions", "fp32", "--out", out])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "image fp32" in printed.out
    assert f"bundle written to {out}" in printed.out
    manifest = Bundle.open(out).manifest
    assert manifest.space == space_fingerprint(DualEncoder.load(student))
    assert manifest.tower("image").precisions == ("fp32",)
    assert manifest.provenance.command.startswith(f"edgeclip export {student} --teacher")
    assert "test, 8 pictures" in manifest.provenance.data
    assert main([*command, "--out", out]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_student_of_another_space_is_refused(
    clip: DualEncoder, pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "teacher")
    stranger = copy.deepcopy(clip)
    with torch.no_grad():
        stranger.model.get_parameter("visual_projection.weight").mul_(-1)
    stranger.save(tmp_path / "student")
    words = ["export", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    assert main([*words, "--data", str(pair_folder), "--out", str(tmp_path / "bundle")]) == 2
    assert "was made in the embedding space" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_student_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert main(["export", missing, "--teacher", missing, "--out", str(tmp_path / "b")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("edgeclip: error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_the_table_has_a_line_for_each_gate(built: BuiltBundle) -> None:
    lines = gates_table(built).splitlines()
    assert len(lines) == 1 + len(built.judged)
    assert lines[0].split() == ["what", "gate", "value", "95%", "interval", "bound"]
    assert all(line.endswith("pass") for line in lines[1:])


def test_the_verdict_says_what_each_tower_ships_in(built: BuiltBundle) -> None:
    text = verdict(built)
    for choice in built.choices:
        assert f"{choice.tower} tower: {choice.precision} (" in text


def test_the_list_needs_no_student(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    assert "jetson-orin-nano" in capsys.readouterr().out


def test_without_a_student_it_says_what_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--out", "x"]) == 2
    assert "name a student and --out" in capsys.readouterr().err
