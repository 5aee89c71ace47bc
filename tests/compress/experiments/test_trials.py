"""What a trial is kept for, and what is counted of its training."""

from pathlib import Path

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.experiments.trials import TrialResult, Trials
from edgeclip.compress.train.recipe import DistillRecipe


def _run(recipe: DistillRecipe, out: Path) -> TrialResult:
    found = Trials(recipe, out, pairs=3).run({"base": recipe}, seeds=1, title="trials")
    return found["base"][0]


def test_a_file_with_other_contents_is_another_trial(
    one_step: DistillRecipe, tmp_path: Path
) -> None:
    table = tmp_path / "words.csv"
    recipe = one_step.replaced({"translations": str(table)}, source="the test")
    caption = EmojiSource("train", recipe.count, size=32).caption(0)
    table.write_text(f"caption,translation\n{caption},ein Apfel\n", encoding="utf-8")
    first = _run(recipe, tmp_path / "out")
    result = next(tmp_path.glob("out/trials/*/seed-0/result.json"))
    written = result.stat().st_mtime_ns
    assert _run(recipe, tmp_path / "out") == first
    assert result.stat().st_mtime_ns == written
    table.write_text(f"caption,translation\n{caption},une pomme\n", encoding="utf-8")
    assert _run(recipe, tmp_path / "out").identity != first.identity
    assert result.stat().st_mtime_ns != written


def test_the_steps_of_a_learned_map_count(one_step: DistillRecipe, tmp_path: Path) -> None:
    mapped = {"inherit": "mapped", "mapping_steps": 2}
    recipes = {"base": one_step, "mapped": one_step.replaced(mapped, source="the test")}
    found = Trials(one_step, tmp_path, pairs=3).run(recipes, seeds=1, title="trials")
    assert [found[name][0].steps for name in ("base", "mapped")] == [1, 3]
