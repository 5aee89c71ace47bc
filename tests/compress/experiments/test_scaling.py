"""The law of scaling: numbers that are known, its answers, and a whole experiment in small."""

from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.experiments.scaling import Scaling, fit_law, scaling, usual_sizes
from edgeclip.compress.experiments.trials import Trials
from edgeclip.compress.students.student import StudentShape
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.errors import ConfigError, InputError

SIZES = np.geomspace(1e6, 16e6, 5)
N0 = 4e6


def _lost(a: float, b: float, c: float, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return a + b * (SIZES / N0)[:, None] ** -c + noise * rng.standard_normal((5, 3))


def test_a_law_without_noise_is_found() -> None:
    law = fit_law(SIZES, _lost(0.02, 0.1, 0.8, noise=1e-6))
    a, b, c = (law.number(place).value for place in range(3))
    assert (a, b, c) == pytest.approx((0.02, 0.1, 0.8), abs=0.02)
    assert law.n0 == pytest.approx(N0)
    assert law.kept(8e6).value == pytest.approx(1 - 0.02 - 0.1 * 2**-0.8, abs=2e-4)


def test_intervals_cover_the_truth_and_a_right_law_fits() -> None:
    covered, fits = 0, 0
    for seed in range(20):
        law = fit_law(SIZES, _lost(0.02, 0.1, 0.8, noise=0.01, seed=seed))
        found = law.kept(2e6)
        covered += found.low <= 1 - 0.02 - 0.1 * 2**0.8 <= found.high
        fits += law.fits
    # Of 95% each: fewer than 16 of 20 in one of some three thousand.
    assert covered >= 16
    assert fits >= 16


def test_a_wrong_law_is_refused() -> None:
    lost = np.array([0.3, 0.1, 0.3, 0.1, 0.3])[:, None] + np.array([0.0, 1e-3, -1e-3])
    assert not fit_law(SIZES, lost).fits
    assert not fit_law(SIZES, lost.mean(axis=1, keepdims=True) * np.ones((1, 2))).fits


def test_numbers_keep_their_signs() -> None:
    rising = 0.1 + 0.01 * np.arange(5)[:, None] + np.array([0.0, 1e-3])  # larger is worse
    assert fit_law(SIZES, rising).number(1).value == 0.0
    steep = _lost(-0.05, 0.2, 0.3, noise=1e-4)
    assert fit_law(SIZES, steep).number(0).value >= 0.0


@pytest.mark.parametrize(
    ("bar", "where"), [(0.90, "inside"), (0.96, "beyond"), (0.79, "inside"), (0.985, "nowhere")]
)
def test_the_size_that_meets_a_bar(bar: float, where: str) -> None:
    # Lost 0.1 (N / N0)^-0.8: 0.9 is kept at N0, and 0.96 at 3.14 N0, where 2 N0 is the largest.
    law = fit_law(SIZES[:4] if where == "beyond" else SIZES, _law_of(where))
    found = law.answer(bar)
    assert found.where == where
    if bar == 0.90:
        assert found.parameters == pytest.approx(4e6, rel=0.05)
    if where == "beyond":
        assert found.parameters == pytest.approx(4e6 * 2.5**1.25, rel=0.05)


def _law_of(where: str) -> np.ndarray:
    lost = _lost(0.0, 0.1, 0.8, noise=2e-4)
    return lost[:4] if where == "beyond" else lost


def test_what_is_below_all_sizes_says_so() -> None:
    law = fit_law(SIZES, _lost(0.0, 0.1, 0.8, noise=2e-4))
    found = law.answer(1 - 0.1 * 4**0.8 - 0.05)
    assert found.where == "below"
    assert found.parameters is not None
    assert 0.5e6 <= found.parameters < 1e6


def test_too_little_for_a_law() -> None:
    with pytest.raises(InputError, match="4 different sizes and 2 seeds"):
        fit_law(SIZES[:3], np.zeros((3, 2)))
    with pytest.raises(InputError, match="4 different sizes and 2 seeds"):
        fit_law(SIZES, np.zeros((5, 1)))


@pytest.mark.slow
def test_a_teacher_with_few_heads_needs_sizes(teacher: DualEncoder) -> None:
    with pytest.raises(InputError, match="only 2 heads"):
        usual_sizes(teacher, DistillRecipe())


def test_another_family_needs_sizes(teacher: DualEncoder) -> None:
    recipe = DistillRecipe(student=StudentShape(family="convnextv2"))
    with pytest.raises(InputError, match="convnextv2"):
        usual_sizes(teacher, recipe)


def test_mistakes_are_found_before_any_training(one_step: DistillRecipe, tmp_path: Path) -> None:
    trials = Trials(one_step, tmp_path, pairs=3)

    def run(recipe: DistillRecipe, *sizes: dict[str, int]) -> None:
        scaling(trials, recipe, sizes, name="own", seeds=2, bar=0.9, command="edgeclip scaling")

    different = [{"image_layers": number} for number in (1, 2, 3)]
    with pytest.raises(InputError, match="image_layers=3 and image_layers=3"):
        run(one_step, *different, different[-1])
    with pytest.raises(InputError, match="image_layers=1 and image_layers=1,image_heads=1"):
        run(one_step, *different, {"image_layers": 1, "image_heads": 1})
    sizes = {"stages": [{"student": {"image_layers": 2}}, {"student": {"image_layers": 1}}]}
    staged = one_step.replaced(sizes, source="the test")
    with pytest.raises(ConfigError, match="students of their own"):
        run(staged, *different, {"image_layers": 4})
    assert not list(tmp_path.glob("trials"))


@pytest.mark.slow
def test_a_scaling_experiment_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["scaling", "quick", "--out", str(out), "--seeds", "2", "--pairs", "24"]
    words += ["--count", "24", "--batch-size", "8", "--held-out", "4", "--workers", "0"]
    words += ["--warmup-steps", "1", "--steps", "2", "--text-layers", "1", "--bar", "0.999"]
    words += [f"--size=image_layers={n},image_heads={h}" for n, h in ((1, 1), (2, 1), (1, 2))]
    assert main(words) == 2
    assert "4 sizes" in capsys.readouterr().err
    assert main([*words, "--size", "image_layers=99", "--size", "image_heads=0"]) == 2
    found = capsys.readouterr().err
    assert "99 layers" in found
    assert "at least one attention head" in found
    assert main([*words, "--size", "image_layers=2,image_heads=2"]) == 0, capsys.readouterr().err
    table = Scaling.load(out / "scaling.json")
    assert [row.name for row in table.rows][-1] == "image_layers=2,image_heads=2"
    counts = [row.parameters for row in table.rows]
    assert counts == sorted(counts)
    assert table.rows[0].share == pytest.approx(counts[0] / table.teacher_parameters)
    assert table.smallest_trained is None
    printed = capsys.readouterr().out
    assert "no size that was trained surely keeps 99.9%" in printed
    assert "image_layers=1,image_heads=2" in (out / "scaling.html").read_text()
