"""Is the default recipe better than the one before it, where it was chosen and in another world?

The first world is EmojiScenes with the built-in teacher: the default was chosen there by `edgeclip
ablate`, on other pairs than it is judged on here. The second had no part in the choice: the same
scenes drawn in lines alone, with a smaller teacher that is trained for it here. Both recipes have
the same data, steps and seeds, so that their differences are paired. The default is better if the
95% interval of the difference over the seeds lies above 0; where both are the same, nothing was
gained, which is told before any training and is a miss.

`--work` keeps teacher, caches and trials, so that a run that was stopped goes on.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bars import Bar, Rule, finish, hold, options, say, span

from edgeclip.compress.built_in import BUILT_IN
from edgeclip.compress.data.sources import EMOJI, INK_EMOJI
from edgeclip.compress.experiments.ablate import AblationRow, compare
from edgeclip.compress.experiments.trials import JUDGE, Trials
from edgeclip.compress.train.losses import TERMS
from edgeclip.compress.train.pretrain import TeacherShape, pretrain
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "*_teacher_r1": (">=", 0.5, ""),
    "*_gain_above_0": (">=", 1.0, ""),  # 1 for an interval that lies above 0, else 0
}
KEPT_MODELS = ("compress/emoji_teacher",)

# All settings of the default before that change a weight, and that the default now may change. A
# loss that came later is off; another setting that came later is to be added with the value that
# switches it off.
BEFORE: dict[str, Any] = {
    **dict.fromkeys(TERMS, 0.0),
    "affinity": 1.0,
    "feature": 1.0,
    "interactive": 1.0,
    "affinity_scale": [1.0],
    "row_weights": "known",
    "row_focus": 0.0,
    "bank": 0,
    "selection": "none",
    "family": "inherited",
    "inherit": "leading",
    "merge_after": [],
    "text_tokenizer": "teacher",
    "token_rank": None,
    "dims": [],
    "views": None,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "schedule": "cosine",
    "final_rate": 0.02,
    "weight_decay": 0.05,
    "clip_norm": 1.0,
    "ema": 0.0,
}
SIZES = {"image_heads": 2, "image_layers": 4, "text_heads": 2, "text_layers": 2}
SECOND = TeacherShape(image_width=192, image_layers=5, text_width=192, text_layers=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of everything."""

    steps: int
    count: int
    pairs: int
    seeds: int
    teacher_steps: int
    batch_size: int


FULL = Budget(steps=120, count=12_288, pairs=1000, seeds=3, teacher_steps=1000, batch_size=128)
QUICK = Budget(steps=6, count=128, pairs=32, seeds=2, teacher_steps=24, batch_size=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What was found in a world: the teacher's R@1, and both recipes by name."""

    name: str
    teacher_r1: float
    teacher_parameters: int
    rows: tuple[AblationRow, ...]

    @property
    def gain(self) -> Interval:
        """R@1 of the default less that of the recipe before, in points."""
        found = self.rows[1].difference
        assert found is not None
        return found.scaled(100)


def second_teacher(folder: Path, budget: Budget) -> Path:
    """Train the teacher of the second world, or take the one that is there."""
    teacher = folder / "teacher"
    if not teacher.exists():
        settings = TrainSettings(
            steps=budget.teacher_steps,
            batch_size=budget.batch_size,
            learning_rate=8e-4,
            warmup_steps=budget.teacher_steps // 20,
            seed=1,
        )
        pretrain(SECOND, settings, folder / "teacher-run", drawing="ink").save(teacher)
    return teacher


def recipes_of(given: Mapping[str, object]) -> dict[str, DistillRecipe]:
    """The recipe before and the default, with the same data, sizes and steps."""
    now = DistillRecipe().replaced(given, source="the benchmark")
    return {"before": now.replaced(BEFORE, source="the benchmark"), "default": now}


def world(name: str, teacher: str, data: str, folder: Path, budget: Budget) -> World:
    """Train and judge both recipes at every seed."""
    given = {
        **SIZES,
        "teacher": [teacher],
        "data": [data],
        "count": budget.count,
        "steps": budget.steps,
        "batch_size": budget.batch_size,
        "warmup_steps": min(60, budget.steps // 4),
        "validations": 1,
    }
    recipes = recipes_of(given)
    trials = Trials(recipes["before"], folder, pairs=budget.pairs)
    found = trials.run(recipes, seeds=budget.seeds, title=name)
    return World(
        name=name,
        teacher_r1=trials.teacher[JUDGE].r1,
        teacher_parameters=trials.teacher_parameters,
        rows=compare(found, trials, JUDGE),
    )


def bars(found: World) -> list[Bar]:
    return [
        hold(BARS, f"{found.name}_teacher_r1", found.teacher_r1),
        hold(BARS, f"{found.name}_gain_above_0", float(found.gain.low > 0)),
    ]


def tell(found: World) -> None:
    print(
        f"{found.name}: teacher {found.teacher_parameters / 1e6:.2f} M, R@1 {found.teacher_r1:.3f}"
    )
    for row in found.rows:
        print(f"  {row.name:<8} R@1 {span(row.r1)}, kept {span(row.kept)}, {row.seconds:.0f} s")
    print(f"  gain {span(found.gain, 2)} points ({found.rows[1].verdict})")


def measure(args: argparse.Namespace, work: Path) -> int:
    budget = QUICK if args.quick else FULL
    same = recipes_of({})
    if same["before"] == same["default"]:
        say("the default is the recipe before it, so both bars of a gain will be missed")
    say("the second world's teacher")
    second = str(second_teacher(work / "second", budget))
    worlds = [
        world("emoji", BUILT_IN, EMOJI, work / "first", budget),
        world("ink", second, INK_EMOJI, work / "second", budget),
    ]
    for found in worlds:
        tell(found)
    every = [bar for found in worlds for bar in bars(found)]
    return finish(every, args.out, worlds=worlds, budget=budget)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, help="folder that keeps what was computed")
    args = parser.parse_args()
    if args.work is not None:
        return measure(args, args.work)
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
