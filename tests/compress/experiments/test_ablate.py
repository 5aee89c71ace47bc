"""What an ablation varies, how it judges differences, and a whole one in small."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeclip.compress.experiments.ablate import Ablation, holm, read_changes, usual_changes
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
    with pytest.raises(InputError) as found:
        read_changes(["losses.steps=3", "nothing=1", "ema", "affinity=-1,many"], recipe)
    for wrong in ("losses.steps", "setting nothing", "--vary ema", "at least 0", "many"):
        assert wrong in str(found.value)


def test_a_change_holds_in_every_stage() -> None:
    recipe = load_recipe("staged")
    (change,) = read_changes(["affinity=3"], recipe)
    assert [own.losses.affinity for own in change.applied(recipe).stage_recipes()] == [3.0, 3.0]


def test_what_is_tried_of_a_recipe() -> None:
    names = {change.name for change in usual_changes(DistillRecipe())}
    assert {"affinity=0.0", "feature=0.0", "interactive=0.0", "contrastive=1.0"} <= names
    assert {"learning_rate=0.0005", "learning_rate=0.002", "ema=0.99", "views=4"} <= names
    assert "schedule=linear" in names
    assert not any(name.startswith(("family", "compute", "seed")) for name in names)
    alone = DistillRecipe(losses=LossWeights(affinity=0, interactive=0))
    assert "feature=0.0" not in {change.name for change in usual_changes(alone)}


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
