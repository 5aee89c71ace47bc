"""pretrain, cache and distill as a person runs them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from edgeclip.compress.cli import pretrain
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import EmojiSource, FolderSource, subset
from edgeclip.compress.teachers.dual_encoder import DualEncoder, read_record, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import build_cache, embed_source
from edgeclip.compress.train.pretrain import new_teacher
from edgeclip.compress.train.recipe import load_recipe, recipe_names
from edgeclip.compress.train.train_loop import read_log
from edgeclip.runtime.cli.main import main
from tests.compress.conftest import SHAPE

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]
SMALL = ["--image-heads", "1", "--image-layers", "2", "--text-heads", "1", "--text-layers", "1"]


def _distill(teacher: Path, out: Path, *more: object) -> list[str]:
    given = ["distill", "--teacher", teacher, "--out", out, *SMALL, "--batch-size", 4, *more]
    return [str(item) for item in given]


def test_pretrain_writes_a_teacher(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "package" / "teacher"
    sizes = "--image-size 32 --image-width 32 --image-layers 1 --text-width 32 --text-layers 1"
    more = "--head-size 16 --dim 16 --vocab-size 400 --steps 4 --batch-size 8"
    command = ["pretrain", "--out", str(out), *sizes.split(), *more.split()]
    assert main(command) == 0
    assert f"teacher written to {out}" in capsys.readouterr().out
    teacher = DualEncoder.load(out)
    assert (teacher.spec.dim, teacher.spec.image.size) == (16, 32)
    record = read_record(out)
    assert record is not None
    assert record.space == space_fingerprint(teacher)  # of the weights in fp16
    image, text = embed_source(teacher, EmojiSource("test", 3, size=32))
    assert image.shape == text.shape == (3, 16)
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "runs" / "teacher-run" / "checkpoint-4").is_dir()
    assert [path.name for path in out.parent.iterdir()] == ["teacher"]
    first = (out / "model.safetensors").read_bytes()
    assert main(command) == 0  # a finished run only writes its teacher again
    assert (out / "model.safetensors").read_bytes() == first
    # Weights and log are replaced together or not at all.
    weights = out / "model.safetensors"
    weights.write_bytes(b"of before")
    log = tmp_path / "runs" / "teacher-run" / "log.jsonl"
    log.unlink()
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: teacher)
    assert main(command) == 2
    assert weights.read_bytes() == b"of before"
    assert (out / "log.jsonl").exists()


def test_cache_and_distill(teacher_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    cache = tmp_path / "student-run" / "cache"
    given = ["--teacher", str(teacher_folder), "--count", "12", "--views", "2"]
    assert main(["cache", *given, "--out", str(cache)]) == 0
    assert f"12 pictures in 2 views are in {cache}" in capsys.readouterr().out
    teacher = DualEncoder.load(teacher_folder)
    source = EmojiSource("train", 12, size=teacher.image_spec.size)
    assert build_cache(teacher, source, cache).image(range(12), 1).shape == (12, 32)
    made = (cache / "image.rows").stat().st_mtime_ns
    out = tmp_path / "student"
    more = ["--count", 12, "--views", 2, "--steps", 8, "--contrastive", 0.5]
    assert main(_distill(teacher_folder, out, *more)) == 0
    assert (cache / "image.rows").stat().st_mtime_ns == made
    student = DualEncoder.load(out)
    assert student.model.config.vision_config.hidden_size == 32
    log = read_log(tmp_path / "student-run" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert {"affinity", "feature", "interactive", "contrastive"} <= set(log[0])


def test_distill_a_mapped_student(teacher_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out, run = tmp_path / "student", tmp_path / "student-run"
    more = ["--count", 24, "--held-out", 4, "--mapping-steps", 3, "--steps", 2]
    command = _distill(teacher_folder, out, *more, "--inherit", "mapped")
    assert main(command) == 0, capsys.readouterr().err
    first = (out / "model.safetensors").read_bytes()
    assert len(read_log(run / "mapping" / "log.jsonl")) == 3
    assert len(read_log(run / "log.jsonl")) == 2
    assert "inherit: mapped" in (run / "recipe.yaml").read_text()
    assert main(command) == 0, capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == first
    assert main(_distill(teacher_folder, out, *more, "--inherit", "selected")) == 2
    assert "holds a run with other" in capsys.readouterr().err
    other = _distill(teacher_folder, tmp_path / "other", *more, "--inherit", "selected")
    assert main(other) == 0, capsys.readouterr().err
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != first
    assert not (tmp_path / "other-run" / "mapping").exists()


def test_distill_takes_a_cache_as_it_is(
    teacher_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "student"
    given = ["--teacher", str(teacher_folder), "--count", "8", "--views", "3", "--seed", "5"]
    assert main(["cache", *given, "--out", str(cache)]) == 0
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    more = ["--count", 8, "--steps", 2, "--cache", cache]
    assert main(_distill(teacher_folder, out, *more)) == 0, capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == made
    assert not (tmp_path / "student-run" / "cache").exists()
    student = DualEncoder.load(out)
    assert student.space == space_fingerprint(DualEncoder.load(teacher_folder))
    assert main(_distill(teacher_folder, out, *more, "--views", 2)) == 2
    assert "is a cache with another views" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["teacher", "other/../teacher", "."])
def test_distill_does_not_replace_its_teacher(
    teacher: DualEncoder,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
) -> None:
    teacher.save(tmp_path / "teacher")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(_distill(Path("teacher"), Path(out))) == 2
    assert "would replace the teacher teacher: choose another" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "other"}
    DualEncoder.load("teacher")


@pytest.mark.parametrize("change", ["added", "changed", "removed"])
def test_scenes_that_somebody_changed_are_not_replaced(
    tmp_path: Path, capsys: Capture, change: str
) -> None:
    folder = tmp_path / "scenes"
    words = ["scenes", str(folder), "--size", "16", "--count"]
    assert main([*words, "4"]) == 0
    assert main([*words, "3"]) == 0
    assert len(list(folder.glob("*.png"))) == 3
    if change == "added":
        shutil.copy(folder / "00000.png", folder / "holiday.png")
    elif change == "changed":
        (folder / "captions.csv").write_text("file,caption\n", encoding="utf-8")
    else:
        (folder / "00001.png").unlink()
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert main([*words, "2"]) == 2
    assert "were added or changed since" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("command", ["pretrain", "distill"])
def test_a_model_of_others_is_not_replaced(
    teacher_folder: Path, tmp_path: Path, capsys: Capture, command: str
) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    more = ["--teacher", str(teacher_folder)] if command == "distill" else []
    assert main([command, "--out", str(tmp_path), *more]) == 2
    assert "holds no edgeclip-model.json, so it is not replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_too_many_held_out_are_refused_before_the_teachers_work(
    teacher_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ["--count", 8, "--held-out", 8]
    assert main(_distill(teacher_folder, tmp_path / "student", *more)) == 2
    assert "cannot hold 8 of 8 pictures out of training" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_distill_a_convolutional_student(teacher_folder: Path, tmp_path: Path) -> None:
    words = ["distill", "--teacher", str(teacher_folder), "--out", str(tmp_path / "student")]
    words += ["--family", "convolutional", *SMALL[4:]]
    assert main([*words, "--batch-size", "4", "--count", "8", "--steps", "2"]) == 0
    assert DualEncoder.load(tmp_path / "student").model.config.vision_config.model_type == (
        "convnext"
    )


def test_distill_on_pictures_without_captions(
    teacher: DualEncoder,
    teacher_folder: Path,
    few_pictures: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in few_pictures.glob("*.bmp"):
        (folder / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "student"
    assert main(_distill(teacher_folder, out, "--data", folder, "--steps", 3)) == 0
    assert "no captions, so the teacher's text tower is kept" in capsys.readouterr().err
    ours, theirs = DualEncoder.load(out).model.state_dict(), teacher.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("text"))


def test_interrupted_distill_goes_on(
    teacher_folder: Path, few_pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    steps = 160  # the log comes to the disk in pieces of some 60
    more = ["--data", few_pictures, "--steps", steps]
    command = _distill(teacher_folder, tmp_path / "student", *more)
    log = tmp_path / "student-run" / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeclip.runtime.cli.main", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert last.startswith("edgeclip: stopped at step ")
    assert last.endswith("; run it again to go on")
    assert "Traceback" not in errors
    stopped = int(last.split()[4].rstrip(";"))
    assert log.with_name(f"checkpoint-{stopped}").is_dir()
    assert [line["step"] for line in read_log(log)] == list(range(1, stopped + 1))
    assert not (tmp_path / "student").exists()
    assert main(command) == 0, capsys.readouterr().err
    assert [line["step"] for line in read_log(log)] == list(range(1, steps + 1))
    DualEncoder.load(tmp_path / "student")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--count", "0"], "a part of the training data has 0 items: give some"),
        (["--image-layers", "9"], "a student of 9 layers cannot inherit from a teacher of 4"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
    ],
)
def test_mistakes_are_one_line(
    teacher_folder: Path, tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    command = _distill(teacher_folder, tmp_path / "student", "--count", 4, "--steps", 1, *more)
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("edgeclip: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "student-run").exists()


def test_every_wrong_setting_is_named(
    teacher_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    wrong = ["--affinity", "-1", "--steps", 0, "--views", 0, "--count", -5, "--ema", 1]
    assert main(_distill(teacher_folder, tmp_path / "student", *wrong)) == 2
    assert capsys.readouterr().err.splitlines() == [
        "edgeclip: error: edgeclip distill: the command line is not valid:",
        "  count: must be at least 0, got -5",
        "  views: must be at least 1, got 0",
        "  losses.affinity: must be at least 0, got -1.0",
        "  training.steps: must be at least 1, got 0",
        "  training.ema: must be below 1, got 1.0",
    ]
    assert not list(tmp_path.iterdir())


def test_a_run_is_repeated_from_its_recipe(
    teacher_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("count: 8\ntraining: {steps: 5, batch_size: 4, ema: 0.5}\n")
    words = ["distill", "--teacher", str(teacher_folder), "--recipe", str(given)]
    words += ["--steps", "3", "--no-compile", *SMALL]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0, capsys.readouterr().err
    log = read_log(tmp_path / "a-run" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3]
    written = tmp_path / "a-run" / "recipe.yaml"
    assert load_recipe(str(written)).training.ema == 0.5
    assert main(["distill", "--recipe", str(written), "--out", str(tmp_path / "b")]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    # A run that is refused changes nothing of the one that is there.
    before = written.read_bytes()
    again = ["distill", "--recipe", str(written), "--batch-size", "2", "--out", str(tmp_path / "a")]
    assert main(again) == 2
    assert "other settings (batch-size)" in capsys.readouterr().err
    assert written.read_bytes() == before


def test_mistakes_in_a_recipe(teacher_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("training: {steps: many, epochs: 3}\nstudent: {family: resnet}\n")
    command = _distill(teacher_folder, tmp_path / "student", "--recipe", given)
    assert main(command) == 2
    errors = capsys.readouterr().err
    for wrong in ("training.steps", "training.epochs: unknown key", "student.family"):
        assert wrong in errors
    assert main(_distill(teacher_folder, tmp_path / "student", "--recipe", "photograph")) == 2
    assert "did you mean 'photographs'?" in capsys.readouterr().err


def test_recipes_that_come_with_it(capsys: Capture) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in recipe_names():
        load_recipe(name)
        assert f"{name}\n    " in printed
        assert main(["recipes", name]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["training"]
    assert main(["recipes", "demos"]) == 2


def test_keep_trains_on_the_pictures_of_a_list(
    teacher_folder: Path, few_pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    source = open_source(str(few_pictures), split="train", count=0, size=32)
    rows = [source.content(index) for index in range(6)]
    keep = tmp_path / "keep.txt"
    keep.write_text("\n".join(rows))
    more = ["--data", few_pictures, "--keep", keep, "--steps", 2]
    assert main(_distill(teacher_folder, tmp_path / "student", *more)) == 0
    cache = build_cache(
        DualEncoder.load(teacher_folder),
        subset(source, range(6), name="six"),
        tmp_path / "student-run" / "cache",
    )
    assert cache.settings.count == 6
    keep.write_text("0" * 64)
    assert main(_distill(teacher_folder, tmp_path / "other", *more)) == 2
    assert "is on the list" in capsys.readouterr().err


def test_two_teachers_and_two_sources(
    teacher: DualEncoder, teacher_folder: Path, few_pictures: Path, tmp_path: Path
) -> None:
    more = ["--teacher", teacher_folder, "--data", f"{few_pictures}=0.5", "--data", "emoji=0.5"]
    command = _distill(teacher_folder, tmp_path / "s", *more, "--count", 10, "--steps", 3)
    assert main(command) == 0
    assert DualEncoder.load(tmp_path / "s").space == teacher.space
    assert (tmp_path / "s-run" / "cache" / "teacher-2" / "image.rows").is_file()


def test_a_tracker_that_is_not_there_is_told_before_the_teachers_work(
    teacher_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = _distill(teacher_folder, tmp_path / "student", "--track", "comet_ml")
    assert main(command) == 2
    assert "the tracker comet_ml is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_start_from_a_small_model(teacher_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    small = new_teacher(replace(SHAPE, image_layers=1, text_layers=1, dim=16), seed=4)
    small.save(tmp_path / "small")
    words = ["distill", "--teacher", str(teacher_folder), "--start", str(tmp_path / "small")]
    words += ["--count", "8", "--steps", "2", "--batch-size", "4", "--out"]
    assert main([*words, str(tmp_path / "student")]) == 0, capsys.readouterr().err
    student = DualEncoder.load(tmp_path / "student")
    assert student.spec.dim == 32
    assert student.model.config.vision_config.num_hidden_layers == 1
    assert main([*words, str(tmp_path / "other"), "--image-layers", "1"]) == 2
    assert "leave out the sizes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache", "--out", "made", "--count", "-5"],
        ["cache", "--out", "made", "--count", "3", "--seed", "-1", "--views", "2"],
        ["scenes", "made", "--seed", "-1"],
    ],
)
def test_numbers_below_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "is below 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _with_damage(few_pictures: Path, folder: Path) -> Path:
    """The 20 pictures: one truncated, one empty, one that is a web page."""
    shutil.copytree(few_pictures, folder)
    taken = FolderSource(folder, split="train").paths[:3]
    taken[0].write_bytes(taken[0].read_bytes()[:100])
    taken[1].write_bytes(b"")
    taken[2].write_bytes(b"<html>404</html>")
    return folder


def test_damaged_pictures_are_skipped_and_named(
    teacher_folder: Path, few_pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = _with_damage(few_pictures, tmp_path / "data")
    cache = tmp_path / "cache"
    given = ["--teacher", str(teacher_folder), "--data", str(data)]
    count = len(FolderSource(data, split="train"))
    assert main(["cache", *given, "--out", str(cache), "--max-bad", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"3 of {count} images cannot be read, and 2 are allowed" in error
    assert all(f"/{path.name} " in error for path in FolderSource(data, split="train").paths[:3])
    kept = (cache / "image.rows").stat().st_mtime_ns
    assert main(["cache", *given, "--out", str(cache), "--strict"]) == 2
    assert "and 0 are allowed" in capsys.readouterr().err

    assert main(["cache", *given, "--out", str(cache)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{count - 3} pictures in 1 views are in {cache}\n"
    assert printed.err.count("skipped: ") == 3
    assert f"skipped 3 of {count} images" in printed.err
    assert (cache / "image.rows").stat().st_mtime_ns == kept  # nothing is embedded twice
    more = ["--data", data, "--steps", 3, "--cache", cache]
    assert main(_distill(teacher_folder, tmp_path / "student", *more)) == 0
    assert f"skipped 3 of {count} images" in capsys.readouterr().err
    more = ["--data", data, "--steps", 3, "--cache", cache, "--max-bad", "1%"]
    assert main(_distill(teacher_folder, tmp_path / "another", *more)) == 2
    assert not (tmp_path / "another").exists()


def test_steps_of_a_finished_run_may_be_raised(
    teacher_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for steps in (4, 7):
        command = _distill(teacher_folder, tmp_path / "s", "--count", 8, "--steps", steps)
        assert main(command) == 0, capsys.readouterr().err
        log = read_log(tmp_path / "s-run" / "log.jsonl")
        assert [line["step"] for line in log] == list(range(1, steps + 1))
    assert "the run was of 4 steps and is of 7 now" in capsys.readouterr().err


def test_no_such_teacher(tmp_path: Path, capsys: Capture) -> None:
    assert main(_distill(tmp_path / "nowhere", tmp_path / "student")) == 2
    assert "nowhere is not a directory with a Hugging Face dual" in capsys.readouterr().err
