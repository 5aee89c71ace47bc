"""Say what each setting of a recipe buys: change one at a time, at several seeds.

The unit of the main interval is the seed: the differences to the base at the same seeds are a
paired sample, with Student's t bounds. A second interval is over the pairs that students are judged
on, for the students as they are. A change is better or worse only if both intervals are on that
side of 0, at a confidence that holds over all changes together (Holm, Scand. J. Statist. 6, 1979).
"""

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.experiments.spelling import (
    read_value,
    settings_of,
    spelled,
    split_values,
)
from edgeclip.compress.experiments.trials import CHOOSE, JUDGE, TrialResult, Trials
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.machine import Machine, detect_machine
from edgeclip.runtime.device.schema import did_you_mean
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.stats.interval import Estimate, Interval
from edgeclip.runtime.stats.shares import estimate_loss
from edgeclip.runtime.stats.student_t import estimate_mean

BASE, CHOSEN = "base", "chosen"
Verdict = Literal["better", "worse", "undecided"]
_EACH_END = 0.975
_VIEWS = 4  # augmented views that are tried where there is one
_AVERAGE = 0.99  # decay of the average of weights, likewise
# Choices of a number format or of an architecture are no matter of an ablation.
_NOT_TRIED = {"compute", "family", "text_tokenizer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting with another value.

    Attributes:
        setting: its name, without its section.
        value: plain data, as in YAML.
        refused: why it cannot be tried, where that is known.
    """

    setting: str
    value: Any
    refused: str = ""

    @property
    def name(self) -> str:
        """The change as `--vary` spells it."""
        return f"{self.setting}={spelled(self.value)}"

    def applied(self, recipe: DistillRecipe) -> DistillRecipe:
        """Return the recipe with the change, in all its stages.

        Raises:
            ConfigError: a value that the setting does not take.
        """
        return recipe.replaced({self.setting: self.value}, source=self.name)


def read_changes(given: Sequence[str], recipe: DistillRecipe) -> tuple[Change, ...]:
    """Read values of `--vary`: `SETTING=VALUE,VALUE`, with or without its section before it.

    A list is written in brackets, [24,48]; one item is a list of one.

    Raises:
        InputError: one message that names all that cannot be read.
    """
    known, found, wrong = settings_of(recipe), [], []
    for text in given:
        name, _, values = text.partition("=")
        section, _, setting = name.rpartition(".")
        if setting not in known or section not in ("", known[setting][0] or ""):
            hint = did_you_mean(setting, known)
            wrong.append(f"--vary {text}: there is no setting {name}{hint}")
            continue
        if not values:
            wrong.append(f"--vary {text}: write {name}=VALUE, or several with commas between")
            continue
        for value in split_values(values):
            try:
                change = Change(setting=setting, value=read_value(value, known[setting][1]))
                change.applied(recipe)
            except (ConfigError, InputError) as error:
                wrong.append(f"--vary {text}: {error}")
            else:
                found.append(change)
    if wrong:
        raise InputError("\n".join(wrong))
    return tuple(found)


def usual_changes(recipe: DistillRecipe) -> tuple[Change, ...]:
    """Return what is tried of a recipe where nobody says it.

    Each weight of a loss off, or on at 1 where it is off; each other choice of a setting that has
    named ones; other learning rates; the average of the weights and augmented views, on or off.
    What the recipe does not allow, or what would change more than one thing, is `refused`.
    """
    found = []
    for change in _candidates(recipe):
        refused = change.refused
        if not refused:
            try:
                change.applied(recipe)
            except ConfigError as error:
                refused = str(error)
        found.append(replace(change, refused=refused))
    return tuple(found)


def _candidates(recipe: DistillRecipe) -> Iterator[Change]:
    known = settings_of(recipe)
    for name, (section, hint, value) in known.items():
        bounds = getattr(hint, "__metadata__", ())
        plain = getattr(hint, "__origin__", hint) if bounds else hint
        if section == "losses" and plain is float and Ge(0) in bounds:
            yield Change(setting=name, value=0.0 if value else 1.0)
        elif typing.get_origin(plain) is Literal and name not in _NOT_TRIED:
            others = (one for one in typing.get_args(plain) if one != value)
            yield from (Change(setting=name, value=one) for one in others)
    training = recipe.training
    for name in ("learning_rate", "matrix_rate"):
        rate = getattr(training, name)
        of_stages = {getattr(own.training, name) for own in recipe.stage_recipes()}
        for factor in (0.5, 2.0):
            yield Change(
                setting=name,
                value=rate * factor,
                refused="the stages have rates of their own, which one rate would make equal"
                if of_stages != {rate}
                else "",
            )
    yield Change(setting="ema", value=0.0 if training.ema else _AVERAGE)
    yield Change(setting="views", value=1 if (recipe.views or 1) > 1 else _VIEWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationRow:
    """What a recipe reaches on a split, and its difference to the base.

    Attributes:
        name: the change, `base` or `chosen`.
        r1: R@1, the mean of both directions, over the seeds.
        image_r1, text_r1: of each direction.
        kept: the share of the teacher's R@1, which is given.
        image_cosine, text_cosine: to the teacher's embeddings.
        steps: of a training, those in which a map is learned among them.
        seconds: the same, the median.
        parameters: number of weights.
        difference: R@1 less that of the base, over seeds; None for the base.
        over_pairs: the same over the pairs, for the students as they are.
        verdict: whether the change is better than the base; None for the base.
    """

    name: str
    r1: Interval
    image_r1: float
    text_r1: float
    kept: Interval
    image_cosine: float
    text_cosine: float
    steps: int
    seconds: float
    parameters: int
    difference: Interval | None
    over_pairs: Interval | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation(JsonRecord):
    """The table of an ablation.

    Attributes:
        recipe: its name.
        command: what was typed.
        machine: where the trials ran.
        seeds: trials of each recipe.
        pairs: number of pairs of the split that is chosen on, and of the one that is judged on.
        teacher_r1: R@1 of the teacher on both.
        rows: the base and every change, on the split that is chosen on.
        left_out: changes that were not tried, with the reason.
        chosen: the changes that were better, one a setting, the best; together they are `chosen`.
        judged: the base and the chosen recipe on the other split; empty if nothing was better.
    """

    WHAT: ClassVar[str] = "an ablation"
    HINT: ClassVar[str] = "run edgeclip ablate again"
    recipe: str
    command: str
    machine: Machine
    seeds: int
    pairs: tuple[int, int]
    teacher_r1: tuple[float, float]
    rows: tuple[AblationRow, ...]
    left_out: tuple[str, ...]
    chosen: tuple[str, ...]
    judged: tuple[AblationRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationEnd:
    """An ablation, and the recipe that it chose."""

    table: Ablation
    chosen: DistillRecipe


def ablate(
    trials: Trials,
    recipe: DistillRecipe,
    changes: Sequence[Change],
    *,
    name: str,
    seeds: int,
    command: str,
) -> AblationEnd:
    """Train the base and every change at every seed; choose what is better, and judge the choice.

    Raises:
        ConfigError, InputError, KeyboardInterrupt: see `Trials.run`; the base cannot run, or fewer
            than two seeds.
    """
    if seeds < 2:
        raise InputError(f"a difference over seeds needs at least 2 of them, got {seeds}")
    if mistake := trials.mistake(recipe, BASE):
        raise ConfigError(mistake)
    recipes, left_out = {BASE: recipe}, []
    for change in changes:
        if change.refused:
            left_out.append(f"{change.name}: {change.refused}")
            continue
        changed = change.applied(recipe)
        if changed.stage_recipes() == recipe.stage_recipes():
            left_out.append(f"{change.name}: the base has it already")
        elif mistake := trials.mistake(changed, change.name):
            left_out.append(f"{change.name}: {mistake}")
        else:
            recipes[change.name] = changed
    found = trials.run(recipes, seeds=seeds, title="ablate")
    rows = compare(found, trials, CHOOSE)
    taken = _best(rows, changes)
    chosen, judged = recipe, tuple[AblationRow, ...]()
    if taken:
        for change in taken:
            chosen = change.applied(chosen)
        ours = trials.run({CHOSEN: chosen}, seeds=seeds, title="chosen")
        judged = compare({BASE: found[BASE], **ours}, trials, JUDGE)
    first = found[BASE][0]
    table = Ablation(
        recipe=name,
        command=command,
        machine=detect_machine(),
        seeds=seeds,
        pairs=(len(first.chosen_on.hits), len(first.judged_on.hits)),
        teacher_r1=(trials.teacher[CHOOSE].r1, trials.teacher[JUDGE].r1),
        rows=rows,
        left_out=tuple(left_out),
        chosen=tuple(change.name for change in taken),
        judged=judged,
    )
    return AblationEnd(table=table, chosen=chosen)


def _best(rows: Sequence[AblationRow], changes: Sequence[Change]) -> tuple[Change, ...]:
    """Return the changes that were better; of each setting the best."""
    by_name = {change.name: change for change in changes}
    gains = {
        row.name: row.difference.value
        for row in rows
        if row.verdict == "better" and row.difference is not None
    }
    best: dict[str, Change] = {}
    for name in sorted(gains, key=lambda name: gains[name]):
        best[by_name[name].setting] = by_name[name]
    return tuple(best.values())


def compare(
    found: Mapping[str, Sequence[TrialResult]], trials: Trials, split: Split
) -> tuple[AblationRow, ...]:
    """Compare the results of recipes at the same seeds with those of the first, on a split."""

    def judged(result: TrialResult) -> Any:
        return result.chosen_on if split == CHOOSE else result.judged_on

    own = {name: [judged(result) for result in results] for name, results in found.items()}
    base, *others = own
    r1 = {name: np.array([one.r1 for one in judged]) for name, judged in own.items()}
    hits = {name: np.mean([one.hits for one in judged], axis=0) for name, judged in own.items()}
    seeds = {name: estimate_mean(r1[name] - r1[base], least=-1.0, most=1.0) for name in others}
    pairs = {name: estimate_loss(hits[name], hits[base]) for name in others}
    verdicts = holm([(seeds[name], pairs[name]) for name in others])
    teacher = trials.teacher[split].r1
    rows = []
    for name, results in found.items():
        mean = estimate_mean(r1[name], least=0.0, most=1.0).interval
        is_base = name == base
        rows.append(
            AblationRow(
                name=name,
                r1=mean,
                image_r1=_mean(own[name], lambda one: one.image_r1),
                text_r1=_mean(own[name], lambda one: one.text_r1),
                kept=Interval(mean.value / teacher, mean.low / teacher, mean.high / teacher),
                image_cosine=_mean(own[name], lambda one: one.image_cosine),
                text_cosine=_mean(own[name], lambda one: one.text_cosine),
                steps=results[0].steps,
                seconds=float(np.median([result.seconds for result in results])),
                parameters=results[0].parameters,
                difference=None if is_base else seeds[name].interval,
                over_pairs=None if is_base else pairs[name].interval,
                verdict=None if is_base else verdicts[others.index(name)],
            )
        )
    return tuple(rows)


def _mean(judged: Sequence[Any], value: Callable[[Any], float]) -> float:
    return float(np.mean([value(one) for one in judged]))


def holm(differences: Sequence[Sequence[Estimate]]) -> tuple[Verdict, ...]:
    """Say which differences are above 0, which below, and which the data do not decide.

    Each is of one or more estimates, which must all agree (intersection-union). With 95%, none is
    called better or worse that is not, over all differences together (Holm's method).
    """
    verdicts: list[Verdict] = ["undecided"] * len(differences)
    left = list(range(len(differences)))
    while left:
        level = 1 - (1 - _EACH_END) / len(left)
        better = [at for at in left if all(e.lower_bound(level) > 0 for e in differences[at])]
        worse = [at for at in left if all(e.upper_bound(level) < 0 for e in differences[at])]
        if not better and not worse:
            break
        for at in better:
            verdicts[at] = "better"
        for at in worse:
            verdicts[at] = "worse"
        left = [at for at in left if at not in (*better, *worse)]
    return tuple(verdicts)
