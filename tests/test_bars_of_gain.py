"""Two benchmarks of distillation miss their bars where nothing was gained."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # scripts import each other by name

import ablation
import initialisation

from edgeclip.compress.experiments.ablate import AblationRow
from edgeclip.compress.students.inherit import Inherit
from edgeclip.runtime.stats.interval import Interval


def _row(name: str, difference: Interval | None) -> AblationRow:
    exact = Interval(0.5, 0.5, 0.5)
    return AblationRow(
        name=name,
        r1=exact,
        image_r1=0.5,
        text_r1=0.5,
        kept=exact,
        image_cosine=0.9,
        text_cosine=0.9,
        steps=1,
        seconds=1.0,
        parameters=1,
        difference=difference,
        over_pairs=difference,
        verdict=None,
    )


@pytest.mark.parametrize(("low", "passes"), [(0.0, False), (-0.01, False), (0.001, True)])
def test_a_default_must_be_above_the_recipe_before(low: float, passes: bool) -> None:
    rows = (_row("before", None), _row("default", Interval(max(low, 0.0), low, 0.1)))
    world = ablation.World(name="ink", teacher_r1=1.0, teacher_parameters=1, rows=rows)
    assert [bar.passed for bar in ablation.bars(world)] == [True, passes]


def test_what_the_default_gains_is_off_before() -> None:
    found = ablation.recipes_of({"relational": 1.0, "bank": 64, "inherit": "selected"})
    assert found["before"].losses.relational == 0.0
    assert found["before"].losses.bank == 0
    assert found["before"].student.inherit == "leading"
    assert found["default"].losses.relational == 1.0


def _runs(losses: dict[Inherit, list[float]]) -> list[initialisation.Run]:
    return [
        initialisation.Run(size=12, beginning=name, seed=seed, steps=[0, 6, 12], losses=own)
        for name, own in losses.items()
        for seed in range(2)
    ]


def test_a_beginning_must_take_fewer_steps_and_reach_the_loss() -> None:
    fast, slow, never = [4.0, 2.0, 1.0], [4.0, 3.0, 1.0], [4.0, 4.0, 4.0]
    sizes = initialisation.QUICK

    def passed(**losses: list[float]) -> list[bool]:
        runs = _runs({name: losses[name] for name in initialisation.BEGINNINGS})
        return [bar.passed for bar in initialisation.bars(runs, sizes)]

    assert passed(mapped=fast, selected=slow, leading=never, random=never) == [True] * 3
    # The same is no gain, and neither is what never reaches the loss.
    assert passed(mapped=slow, selected=slow, leading=slow, random=never) == [False, False, True]
    assert passed(mapped=never, selected=slow, leading=never, random=never) == [False, True, True]
    runs = _runs({"mapped": never, "selected": slow})
    assert initialisation.times(runs, "mapped", "selected", sizes).value == math.inf
