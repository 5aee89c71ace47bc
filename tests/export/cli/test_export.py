import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.bundle import bundle_plan
from edgeclip.export.bundle.build_bundle import BuiltBundle
from edgeclip.export.cli.export import describe_build
from edgeclip.export.gates.zero_shot import bake_labels_with_teacher
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.main import main
from tests.export.conftest import LOOSE

pytestmark = pytest.mark.slow
# Nothing is timed, and so few pictures decide nothing.
ELSEWHERE = ("--device", "x86-avx2", "--precisions", "fp32", "--accept-undecided")


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
    status = main([*command, *ELSEWHERE, "--out", out])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "image fp32" in printed.out
    assert f"bundle written to {out}" in printed.out
    manifest = Bundle.open(out).manifest
    assert manifest.space == space_fingerprint(DualEncoder.load(student))
    assert manifest.tower("image").precisions == ("fp32",)
    assert manifest.provenance.command.startswith("edgeclip export student --teacher student")
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


def test_a_student_that_left_its_teachers_space_is_not_exported_into_it(
    clip: DualEncoder, pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "teacher")
    space = DualEncoder.load(tmp_path / "teacher").space
    left = copy.deepcopy(clip)
    with torch.no_grad():
        left.model.get_parameter("visual_projection.weight").mul_(-1)
    DualEncoder(left.model, left.image_spec, left.tokenizer, space=space).save(tmp_path / "student")
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    out = tmp_path / "bundle"
    command = ["export", student, "--data", str(pair_folder), *ELSEWHERE, "--out", str(out)]
    command += ["--labels", "red,teal"]
    assert main([*command, "--teacher", teacher]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "no bundle was written: image fp32: mean cosine to the teacher is -1" in error
    assert not out.exists()

    assert main([*command, "--teacher", teacher, "--own-space"]) == 2
    assert "--own-space holds the student against no teacher" in capsys.readouterr().err
    assert main([*command, "--own-space"]) == 0, capsys.readouterr().err
    bundle = Bundle.open(out)
    assert bundle.manifest.space == space_fingerprint(DualEncoder.load(student)) != space
    assert bundle.labels("labels").space == bundle.manifest.space
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    assert f"embedding space {bundle.manifest.space[:12]}, not held" in capsys.readouterr().out

    picture = str(next((pair_folder / "test").glob("*.png")))
    index = str(tmp_path / "index.npz")
    assert main(["embed", str(pair_folder), "--bundle", str(out), "--out", index]) == 0
    assert main(["search", "--image", picture, "--bundle", str(out), "--index", index]) == 0
    whole = str(tmp_path / "whole")
    command = ["export", teacher, "--teacher", teacher, "--data", str(pair_folder), *ELSEWHERE]
    assert main([*command, "--out", whole]) == 0
    capsys.readouterr()
    assert main(["verify", whole]) == 0
    assert f"embedding space {space[:12]}, held against" in capsys.readouterr().out
    assert main(["search", "--image", picture, "--bundle", whole, "--index", index]) == 2
    assert "was made in the embedding space" in capsys.readouterr().err


def test_a_student_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert main(["export", missing, "--teacher", missing, "--out", str(tmp_path / "b")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("edgeclip: error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_a_classifier_has_labels_and_no_text_tower(
    clip: DualEncoder, pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "student")
    student, out = str(tmp_path / "student"), str(tmp_path / "bundle")
    (tmp_path / "colours.txt").write_text("red\nteal\n")
    command = ["export", student, "--teacher", student, "--data", str(pair_folder), "--no-text"]
    command += [*ELSEWHERE, "--out", out, "--label-head", "colours"]
    command += ["--labels", str(tmp_path / "colours.txt"), "--labels", "pets=cat,dog"]
    assert main([*command, "--template", "a {}", "--template", "{} picture"]) == 0
    capsys.readouterr()
    bundle = Bundle.open(out)
    assert bundle.label_names == ("colours", "pets")
    assert bundle.manifest.label_head == "colours"
    assert not bundle.manifest.has("text")
    labels = bundle.labels("colours")
    assert (labels.names, labels.templates) == (("red", "teal"), ("a {}", "{} picture"))
    teacher = DualEncoder.load(student)
    expected = bake_labels_with_teacher(teacher, labels.names, labels.templates)
    np.testing.assert_allclose(labels.embeddings, expected.embeddings, atol=1e-6)
    assert main(["verify", out]) == 0
    picture = str(next((pair_folder / "test").glob("*.png")))
    assert main(["classify", picture, "--bundle", out, "--top", "1"]) == 0
    assert capsys.readouterr().out.split()[-1] in ("red", "teal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cat", "--labels", "dog"], "two label sets are called 'labels'"),
        (["--labels", "head=cat", "--label-head", "dog"], "two label sets are called 'head'"),
        (["--labels", "missing.txt"], "missing.txt does not exist"),
    ],
)
def test_labels_that_cannot_be_told_apart(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "student", "--out", "out", *options]) == 2
    assert message in capsys.readouterr().err


def test_few_pictures_are_warned_of(
    clip: DualEncoder,
    pair_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundle_plan, "DEFAULT_BOUNDS", LOOSE)  # eight pairs decide nothing
    clip.save(tmp_path / "student")
    student, out = str(tmp_path / "student"), str(tmp_path / "bundle")
    command = ["export", student, "--teacher", student, "--data", str(pair_folder)]
    command += ["--device", "x86-avx2", "--precisions", "int8", "--out", out, "--accept-undecided"]
    assert main(command) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "so a loss of 25 points cannot show" in warnings.pop()  # the student is not trained
    found = warnings[0].split("finds ")[1].split()[0]
    assert warnings == [
        "warning: bundle: R@1 kept of the teacher's: not judged: the teacher itself finds "
        f"{found} of 8 pairs, so only cosines tell whether the student is in its space: give more "
        "test pairs",
        "warning: image int8: zero-shot top-1 loss: not judged: no labels",
    ]
    assert len(Bundle.open(out).manifest.remarks) == 3


def test_the_verdict_says_what_each_tower_ships_in(built: BuiltBundle) -> None:
    text = describe_build(built)
    for choice in built.selected:
        assert f"{choice.tower} tower: {choice.precision} (" in text


def test_the_list_needs_no_student(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    assert "jetson-orin-nano" in capsys.readouterr().out


def test_without_a_student_it_says_what_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--out", "x"]) == 2
    assert "name a student and --out" in capsys.readouterr().err


def test_pictures_that_all_belong_together_are_refused(
    clip: DualEncoder, pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "student")
    student, out = str(tmp_path / "student"), str(tmp_path / "bundle")
    command = ["export", student, "--teacher", student, "--data", str(pair_folder), *ELSEWHERE]
    assert main([*command, "--out", out, "--cluster-by", "folder"]) == 2
    error = capsys.readouterr().err
    assert "belong together by folder, so they are one observation" in error
    assert "another --cluster-by" in error
    assert not Path(out).exists()
