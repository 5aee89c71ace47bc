"""What an ablation varies, how it judges differences, and a whole one in small."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeclip.compress.experiments.ablate import (
    Ablation,
    Change,
    ablate,
    holm,
    read_changes,
    usual_changes,
)
from edgeclip.compress.experiments.trials import Trials
from edgeclip.compress.students.student import StudentShape
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.recipe import DistillRecipe, load_recipe
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Estimate
from edgeclip.runtime.stats.student_t import normal_quantile


@dataclass(frozen=True)
class _Normal(Estimate):
    """A normal estimate so many standard errors from 0."""

    value: float

    def lower_bound(self, confidence: float) -> float:
        return self.value - normal_quantile(confidence)

    def upper_bound(self, confidence: float) -> float:
        return self.value + normal_quantile(confidence)


def _holm(*values: float) -> tuple[str, ...]:
    return holm([(_Normal(value),) for value in values])


def test_holm_by_hand() -> None:
    # Two-sided levels: 5% of one is 1.960 standard errors, of two 2.241, of three 2.394.
    assert _holm(1.97) == ("better",)
    assert _holm(1.95) == ("undecided",)
    assert _holm(2.2, 2.2) == ("undecided", "undecided")
    assert _holm(2.25, -1.97) == ("better", "worse")  # the second is one of one that is left
    assert _holm(2.39, 2.3, 2.0) == ("undecided",) * 3
    assert _holm(2.4, 2.3, 2.0) == ("better",) * 3
    assert holm([]) == ()
    # Where two estimates must agree, the weaker one decides.
    assert holm([(_Normal(9.0), _Normal(1.0))]) == ("undecided",)
    assert holm([(_Normal(9.0), _Normal(-9.0))]) == ("undecided",)


def test_changes_as_they_are_spelled() -> None:
    recipe = DistillRecipe()
    spelled = ["losses.affinity=0,2", "views=3", "student.whole_text=true", "keep=null"]
    changes = read_changes(spelled, recipe)
    assert [change.name for change in changes] == [
        "affinity=0",
        "affinity=2",
        "views=3",
        "whole_text=True",
        "keep=None",
    ]
    assert changes[1].applied(recipe).losses.affinity == 2.0
    assert changes[3].applied(recipe).student.whole_text is True
    wrong = ["losses.steps=3", "nothing=1", "ema", "affinity=-1,many", "conv_widths=[24,48"]
    with pytest.raises(InputError) as found:
        read_changes(wrong, recipe)
    for words in ("losses.steps", "setting nothing", "--vary ema", "at least 0", "many", "[24 "):
        assert words in str(found.value)


def test_lists_are_written_in_brackets_and_one_item_alone() -> None:
    recipe = DistillRecipe(student=StudentShape(family="convnextv2"))
    spelled = ["conv_widths=[24,48,96]", "dims=64,[32,16]", "merge_after=[]", "data=emoji"]
    changes = read_changes(spelled, recipe)
    values = [[24, 48, 96], [64], [32, 16], [], ["emoji"]]
    assert [change.value for change in changes] == values
    assert changes[0].name == "conv_widths=[24,48,96]"
    again = read_changes([change.name for change in changes], recipe)
    assert again == changes


def test_a_change_holds_in_every_stage() -> None:
    recipe = load_recipe("staged")
    (change,) = read_changes(["affinity=3"], recipe)
    assert [own.losses.affinity for own in change.applied(recipe).stage_recipes()] == [3.0, 3.0]


def test_what_is_tried_of_a_recipe() -> None:
    names = {change.name for change in usual_changes(DistillRecipe())}
    assert {"affinity=0.0", "feature=0.0", "interactive=0.0", "contrastive=1.0"} <= names
    assert {"learning_rate=0.0005", "learning_rate=0.002", "ema=0.99", "views=4"} <= names
    assert "schedule=cosine" in names
    architecture = ("family", "compute", "seed", "text_tokenizer")
    assert not any(name.startswith(architecture) for name in names)
    alone = DistillRecipe(losses=LossWeights(affinity=0, interactive=0))
    refused = {change.name: change.refused for change in usual_changes(alone)}
    assert "nothing to learn" in refused["feature=0.0"]
    assert not refused["affinity=1.0"]


def test_no_usual_change_makes_the_rates_of_stages_equal() -> None:
    refused = {change.name: change.refused for change in usual_changes(load_recipe("staged"))}
    rates = [name for name in refused if name.startswith(("learning_rate", "matrix_rate"))]
    assert len(rates) == 4
    assert all("rates of their own" in refused[name] for name in rates)
    assert not refused["ema=0.99"]


def test_what_is_not_tried_is_in_the_table(one_step: DistillRecipe, tmp_path: Path) -> None:
    changes = (
        Change(setting="affinity", value=1.0),
        Change(setting="image_layers", value=99),
        Change(setting="ema", value=0.9, refused="for a reason"),
    )
    end = ablate(
        Trials(one_step, tmp_path, pairs=3),
        one_step,
        changes,
        name="one step",
        seeds=2,
        command="edgeclip ablate",
    )
    assert [row.name for row in end.table.rows] == ["base"]
    same, large, given = end.table.left_out
    assert same == "affinity=1.0: the base has it already"
    assert large.startswith("image_layers=99: ")
    assert given == "ema=0.9: for a reason"


@pytest.mark.parametrize("command", ["ablate", "scaling", "diagnose --student no-model"])
def test_what_a_page_needs_is_looked_for_first(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *more = command.split()
    words = [name, *(more or ["quick"]), "--teacher", "no-model", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(words) == 2
    assert "edgeclip[report]" in capsys.readouterr().err


@pytest.mark.slow
def test_an_ablation_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["ablate", "quick", "--out", str(out), "--seeds", "2", "--pairs", "24"]
    words += ["--count", "24", "--batch-size", "8", "--held-out", "4", "--workers", "0"]
    words += ["--image-layers", "1", "--text-layers", "1", "--warmup-steps", "1", "--steps", "2"]
    words += ["--vary", "learning_rate=0.5", "--vary", "image_layers=99"]
    assert main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "left out: image_layers=99: a student of 99 layers" in printed
    table = Ablation.load(out / "ablation.json")
    base, changed = table.rows
    assert (base.name, changed.name) == ("base", "learning_rate=0.5")
    assert base.difference is None
    assert changed.difference is not None
    assert changed.difference.value == pytest.approx(changed.r1.value - base.r1.value)
    assert base.kept.value == pytest.approx(base.r1.value / table.teacher_r1[0])
    assert changed.image_cosine < base.image_cosine  # such a rate destroys a student
    assert table.chosen == ()
    assert load_recipe(str(out / "chosen.yaml")).training.steps == 2
    assert "learning_rate=0.5" in (out / "ablation.html").read_text()
    results = sorted(out.glob("trials/*/seed-*/result.json"))
    assert len(results) == 4
    assert len({json.loads(path.read_text())["identity"] for path in results}) == 4
    assert not list(out.glob("trials/*/seed-*/checkpoint-*"))
    # What has ended is not repeated; what is missing is trained again, to the same result.
    kept = [(path, path.stat().st_mtime_ns) for path in results[1:]]
    results[0].unlink()
    assert main(words) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept)
    again = Ablation.load(out / "ablation.json")
    assert [row.r1 for row in again.rows] == [row.r1 for row in table.rows]
    assert main([*words, "--seeds", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
