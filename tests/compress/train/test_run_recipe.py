"""Recipes of several stages: what each goes on from, resuming, caches, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_basis import teacher_basis
from edgeclip.compress.train import run_recipe
from edgeclip.compress.train.recipe import DistillRecipe, load_recipe, recipe_names
from edgeclip.compress.train.run_recipe import RunEnd, prepare_run
from edgeclip.compress.train.train_loop import read_log
from edgeclip.runtime.bundle.reduction import Basis
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

Settings = dict[str, object]
SMALL: Settings = {"image_heads": 1, "image_layers": 2, "text_heads": 1, "text_layers": 1}
# So low a rate that weights stay what they were, but for zeros.
STILL: Settings = {"learning_rate": 1e-30, "matrix_rate": 1e-30}


def _recipe(teacher: Path, stages: list[Settings], **more: object) -> DistillRecipe:
    training = {"steps": 2, "batch_size": 4, "workers": 0}
    data = {"teacher": [str(teacher)], "count": 8, "student": SMALL, "training": training}
    return parse(DistillRecipe, {**data, "stages": stages, **more}, source="the test")


def _run(recipe: DistillRecipe, run: Path) -> RunEnd:
    return prepare_run(recipe, run=run).train()


def _weights(model: DualEncoder) -> dict[str, Tensor]:
    return dict(model.model.state_dict())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-20)


def _sizes(model: DualEncoder) -> tuple[int, int]:
    vision = model.model.config.vision_config
    return vision.num_attention_heads, vision.num_hidden_layers


def test_a_stage_goes_on_with_the_weights_of_the_one_before(
    teacher_folder: Path, tmp_path: Path
) -> None:
    recipe = _recipe(teacher_folder, [{"losses": {"affinity": 0}}, {"training": STILL}])
    end = _run(recipe, tmp_path)
    before = DualEncoder.load(tmp_path / "stage-1" / "student")
    after, teacher = end.student, DualEncoder.load(teacher_folder)
    assert before.space == after.space == teacher.space
    found = _weights(before)
    assert all(_is_same(value, found[name]) for name, value in _weights(after).items())
    name = "text_projection.weight"
    assert not _is_same(found[name], _weights(teacher)[name][:, :32])  # it has learned
    first, second = (read_log(tmp_path / f"stage-{n}" / "log.jsonl") for n in (1, 2))
    assert "affinity" not in first[0]
    assert "affinity" in second[0]
    assert [line["step"] for line in second] == [1, 2]
    assert (tmp_path / "cache" / "image.rows").is_file()
    assert not list((tmp_path / "cache").glob("stage-*"))  # one cache for both


def test_a_smaller_stage_inherits_from_the_student_before(
    teacher_folder: Path, tmp_path: Path
) -> None:
    wide = {"image_heads": 2, "image_layers": 4, "text_heads": 2, "text_layers": 2}
    # Without numbers: half of the teacher's, which is not half of the student's before.
    none = dict.fromkeys(SMALL)
    stages: list[Settings] = [{"student": wide}, {"student": none, "training": STILL}]
    end = _run(_recipe(teacher_folder, stages), tmp_path)
    before = DualEncoder.load(tmp_path / "stage-1" / "student")
    assert (_sizes(before), _sizes(end.student)) == ((2, 4), (1, 2))
    name = "vision_model.encoder.layers.{}.mlp.fc1.bias"  # layer 1 is from layer 2 of 4
    found, whole = _weights(end.student), _weights(before)
    assert _is_same(found[name.format(1)], whole[name.format(2)][:128])
    assert not torch.equal(whole[name.format(2)], torch.zeros(256))


def test_a_proxy_between(teacher_folder: Path, tmp_path: Path) -> None:
    stages: list[Settings] = [
        {"student": {"image_layers": 4}},
        {"teacher": ["stage-1"]},
        {"teacher": ["stage-1", str(teacher_folder)]},
    ]
    end = _run(_recipe(teacher_folder, stages), tmp_path)
    teacher = DualEncoder.load(teacher_folder)
    assert end.student.space == teacher.space
    proxy = json.loads((tmp_path / "stage-1" / "student" / "edgeclip-model.json").read_text())
    cached = json.loads((tmp_path / "cache" / "stage-2" / "cache.json").read_text())
    assert cached["space"] == proxy["model"] != teacher.space
    assert not (tmp_path / "cache" / "teacher-2").exists()
    assert (tmp_path / "cache" / "stage-3" / "teacher-2" / "image.rows").is_file()


def test_a_stopped_run_goes_on_in_its_stage(teacher_folder: Path, tmp_path: Path) -> None:
    stages: list[Settings] = [{"losses": {"affinity": 0}}, {"training": {"steps": 3}}, {}]
    recipe = _recipe(teacher_folder, stages)
    whole = _run(recipe, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    run = tmp_path / "parts"
    prepared = prepare_run(recipe, run=run)
    save = DualEncoder.save

    def stop_after_two(model: DualEncoder, directory: Path) -> None:
        if directory.parent.name == "stage-2":
            raise StoppedError
        save(model, directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualEncoder, "save", stop_after_two)
        with pytest.raises(StoppedError):
            prepared.train()
    assert not (run / "stage-3").exists()
    logs = [run / f"stage-{number}" / "log.jsonl" for number in (1, 2)]
    before = [path.read_bytes() for path in logs]
    again = _run(recipe, run)
    assert [path.read_bytes() for path in logs] == before  # with the times of the steps
    found = _weights(again.student)
    assert all(torch.equal(value, found[name]) for name, value in _weights(whole.student).items())


def test_another_layout_or_other_steps_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    recipe = _recipe(teacher_folder, [{}, {}])
    _run(recipe, tmp_path / "staged")
    _run(_recipe(teacher_folder, []), tmp_path / "plain")
    kept = (tmp_path / "staged" / "recipe.yaml").read_bytes()
    for other, run, message in (
        (recipe, "plain", "holds a run without stages"),
        (_recipe(teacher_folder, []), "staged", "holds a run with stages"),
        (_recipe(teacher_folder, [{"training": {"steps": 5}}, {}]), "staged", "went on from there"),
        (_recipe(teacher_folder, [{}, {"training": {"ema": 0.5}}]), "staged", "other settings"),
    ):
        with pytest.raises(ConfigError, match=message):
            _run(other, tmp_path / run)
    assert (tmp_path / "staged" / "recipe.yaml").read_bytes() == kept
    assert load_recipe(str(tmp_path / "staged" / "recipe.yaml")) == recipe
    raised = _recipe(teacher_folder, [{}, {"training": {"steps": 4}}])
    _run(raised, tmp_path / "staged")
    assert len(read_log(tmp_path / "staged" / "stage-2" / "log.jsonl")) == 4


def test_mistakes_of_all_stages_come_at_once(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(stages: str) -> str:
        (tmp_path / "r.yaml").write_text(stages)
        words = ["distill", "--teacher", str(teacher_folder), "--recipe", str(tmp_path / "r.yaml")]
        assert main([*words, "--out", str(tmp_path / "s")]) == 2
        return capsys.readouterr().err

    found = wrong("stages: [{losses: {afinity: 1}, steps: 3}, {training: {ema: 1}, start: x}]")
    for part in ("0.losses.afinity", "0.steps", "1.training.ema: must be below 1", "1.start"):
        assert f"stages.{part}" in found
    off = "{affinity: 0, feature: 0, interactive: 0}"
    found = wrong(f"stages: [{{losses: {off}}}, {{teacher: [stage-2]}}]")
    assert "stages.0: the weights of all losses are 0" in found
    assert "stages.1: teacher: stage-2 is no stage before this one" in found
    found = wrong(
        "count: 8\nstages: [{student: {image_layers: 2}}, {student: {image_layers: 3}}, "
        "{held_out: 9}, {training: {track: [nothing]}}]"
    )
    assert "stage 2: a student of 3 layers cannot inherit from a teacher of 2" in found
    assert "stage 3: cannot hold 9 of 8" in found
    assert "stage 4: " in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]


def test_a_teacher_of_another_space_is_refused(
    teacher: DualEncoder, teacher_folder: Path, tmp_path: Path
) -> None:
    weights = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    other = DualEncoder.load(teacher_folder)
    other.model.load_state_dict(
        {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}
    )
    DualEncoder(other.model, other.image_spec, other.tokenizer).save(tmp_path / "other")
    recipe = _recipe(teacher_folder, [{}, {"teacher": [str(tmp_path / "other")]}])
    with pytest.raises(ConfigError, match=r"stage 2: its first teacher .* another embedding space"):
        prepare_run(recipe, run=tmp_path / "run")


@pytest.mark.parametrize("name", ["translations", "vocabulary"])
def test_a_run_goes_on_with_files_of_the_same_contents_alone(
    name: str, teacher_folder: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"{number}.csv" for number in range(3)]
    scenes = open_source(["emoji"], split="train", count=8, size=32)
    for file, last in zip(files, "aab", strict=True):
        lines = [f'"{scenes.caption(number)}",{last}' for number in range(8)]
        file.write_text("\n".join(["caption,translation", *lines]))
    prepared = []
    for file in files:
        recipe = _recipe(teacher_folder, []).replaced({name: str(file)}, source="the test")
        prepared.append(prepare_run(recipe, run=tmp_path / "run"))
    same, other = prepared[1].identity, prepared[2].identity
    assert prepared[0].identity == same != other
    prepared[0].train()
    prepared[1].train()
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        prepared[2].train()


def test_a_start_or_a_teacher_that_is_not_there(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, recipe = tmp_path / "empty", tmp_path / "r.yaml"
    empty.mkdir()
    recipe.write_text(f"count: 8\nstart: {empty}\nstages: [{{}}, {{held_out: 9}}]")
    words = ["distill", "--teacher", str(teacher_folder), "--out", str(tmp_path / "s")]
    for more, said, not_said in (
        (["--start", str(empty), "--count", "8"], f"edgeclip: error: {empty}", "stage"),
        (["--teacher", str(empty), "--count", "8"], f"edgeclip: error: {empty}", "stage"),
        (["--recipe", str(recipe)], f"stage 1: {empty}", "stage 3"),
        (["--recipe", str(recipe)], "stage 2: cannot hold 9 of 8", "stage 3"),
    ):
        assert main([*words, *more]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert not_said not in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmoid": 1}, "--sigmoid needs a teacher with a logit bias"),
        ({"selection": "learnable", "bank": 4}, "do not go together"),
        ({"affinity_scale": [1, 2]}, "2 factors for 1 teachers"),
        ({"accumulate": 2}, "leave out --accumulate"),
        ({"masked": 1}, "leave out --masked"),
    ],
)
def test_what_teachers_or_student_cannot_do_is_refused_first(
    changes: Settings, message: str, teacher_folder: Path, tmp_path: Path
) -> None:
    student = {"family": "mobilevitv2", "conv_widths": [64], "conv_depths": [1, 1, 1]}
    recipe = _recipe(teacher_folder, [], student={**student, "image_size": 64, "whole_text": True})
    prepare_run(recipe, run=tmp_path)
    with pytest.raises(ConfigError, match=message):
        prepare_run(recipe.replaced(changes, source="the test"), run=tmp_path)


def test_tokens_are_changed_once(teacher_folder: Path, tmp_path: Path) -> None:
    student = {**SMALL, "text_tokenizer": "bytes", "token_rank": 16, "image_layers": 3}
    small: Settings = {"image_layers": 2, "merge_after": []}
    convolutional = {
        **dict.fromkeys(("image_heads", "image_layers")),
        "family": "convolutional",
        "conv_widths": [8],
        "conv_depths": [1],
        "merge_after": [],
    }
    recipe = _recipe(
        teacher_folder,
        [{}, {"student": small}, {"student": convolutional}],
        student={**student, "merge_after": [1]},
        training={"steps": 1, "batch_size": 4, "workers": 0},
    )
    _run(recipe, tmp_path)
    teacher = DualEncoder.load(teacher_folder)
    for number, after in enumerate(([1], [], None), 1):
        model = DualEncoder.load(tmp_path / f"stage-{number}" / "student")
        assert model.spec.text.context_length == 4 * teacher.spec.text.context_length
        assert model.model.config.text_config.token_rank == 16
        assert getattr(model.model.config.vision_config, "merge_after", None) == after
    for name, value in (("token_rank", 8), ("token_rank", None), ("text_tokenizer", "teacher")):
        other = _recipe(teacher_folder, [{}, {"student": {**small, name: value}}], student=student)
        with pytest.raises(ConfigError, match=rf"stage 2: {name} is .* in the stage before"):
            prepare_run(other, run=tmp_path / "other")


def test_merging_elsewhere_is_another_run(teacher_folder: Path, tmp_path: Path) -> None:
    student = {**SMALL, "image_layers": 3}
    _run(_recipe(teacher_folder, [], student={**student, "merge_after": [1]}), tmp_path)
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        _run(_recipe(teacher_folder, [], student={**student, "merge_after": [2]}), tmp_path)


def test_a_run_goes_on_with_the_axes_it_began_with(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(teacher_folder, [], dims=[8])
    before = _run(recipe, tmp_path).student.basis

    def computed_by_other_threads(*args: Any, **named: Any) -> Basis:
        made = teacher_basis(*args, **named)
        return replace(made, axes=np.nextafter(made.axes, np.float32(1)))

    monkeypatch.setattr(run_recipe, "teacher_basis", computed_by_other_threads)
    after = _run(recipe.replaced({"steps": 3}, source="the test"), tmp_path).student.basis
    assert before is not None
    assert after is not None
    assert np.array_equal(before.axes, after.axes)


def test_an_option_leaves_a_proxy_its_student() -> None:
    recipe = load_recipe("proxy").replaced({"teacher": ["other"]}, source="the test")
    taught_by = [own.teacher for own in recipe.stage_recipes()]
    assert taught_by == [("other",), ("stage-1",), ("other",)]


def test_every_recipe_with_stages_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    staged = [name for name in recipe_names() if load_recipe(name).stages]
    assert len(staged) >= 3
    cache = str(tmp_path / "cache")
    more = ["--count", "8", "--held-out", "2", "--steps", "1", "--batch-size", "4"]
    more += ["--warmup-steps", "1"]
    for name in staged:
        out = tmp_path / name
        words = ["distill", "--recipe", name, "--out", str(out), "--cache", cache, *more]
        assert main(words) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        stages = load_recipe(name).stages
        assert f"stage {len(stages)}: held-out pictures" in printed
        for number in range(1, len(stages) + 1):
            log = read_log(tmp_path / f"{name}-run" / f"stage-{number}" / "log.jsonl")
            assert [line["step"] for line in log] == [1]  # the option holds in every stage
        DualEncoder.load(out)
