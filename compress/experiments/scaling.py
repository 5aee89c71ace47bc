"""Train several sizes of a student, and fit how the lost quality falls with the size.

The law is a saturating power law, lost = a + b (N / N0)^-c with a, b >= 0 and c > 0, for the lost
share of the teacher's R@1 at N parameters (Kaplan et al., arXiv 2001.08361; Hoffmann et al., arXiv
2203.15556). N0 is the geometric mean of the sizes that were trained. For each c of a grid, a and b
are a least-squares problem with signs, so that the fit is the global one.

Intervals are by a parametric bootstrap over the seeds: the spread of the seeds at one size, pooled
over sizes, is drawn anew around the law. That spread also tells whether the law fits at all, by the
F test of lack of fit (Draper and Smith, Applied Regression Analysis). The pairs are taken as given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.experiments.spelling import spelled
from edgeclip.compress.experiments.trials import JUDGE, TrialResult, Trials
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.machine import Machine, detect_machine
from edgeclip.runtime.errors import ConfigError, EdgeClipError, InputError
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import MeanEstimate

Values = NDArray[np.float64]
Where = Literal["inside", "beyond", "below", "nowhere"]

_LEAST_SIZES = 4  # one more than the law has numbers
_MOST_SIZES = 6  # unless the user names them
_BEYOND = 2.0  # how far from the sizes that were trained an answer may lie
_DRAWS = 2000
_C = np.geomspace(0.05, 5.0, 160)
_DOUBT = 0.05  # a law that is right is refused with this probability
_SURE = 0.95  # one-sided: how surely an answer meets the bar
_GRID = 241  # sizes that are asked for an answer


def usual_sizes(teacher: DualEncoder, recipe: DistillRecipe) -> tuple[dict[str, int], ...]:
    """Return the sizes that are trained where nobody says them: both towers in proportion.

    Raises:
        InputError: a tower of the teacher's or of the students is no plain transformer, or the
            teacher's too small to be made smaller so often.
    """
    family = recipe.stage_recipes()[-1].student.family
    if family != "inherited":
        raise InputError(
            f"an image tower of {family} is no part of the teacher's: give sizes by --size"
        )
    image, text = teacher.model.config.vision_config, teacher.model.config.text_config
    names = ("num_attention_heads", "num_hidden_layers")
    if not all(
        isinstance(getattr(own, name, None), int) for own in (image, text) for name in names
    ):
        raise InputError("the teacher's towers are no plain transformers: give sizes by --size")
    (heads, layers), (text_heads, text_layers) = (
        tuple(int(getattr(own, name)) for name in names) for own in (image, text)
    )

    def part(whole: int, share: float) -> int:
        return max(1, round(whole * share))

    found = []
    for kept in range(1, heads):
        for share in ((kept - 0.5) / heads, kept / heads):
            size = {
                "image_heads": kept,
                "image_layers": part(layers, share),
                "text_heads": part(text_heads, kept / heads),
                "text_layers": part(text_layers, share),
            }
            if size not in found:
                found.append(size)
    if len(found) < _LEAST_SIZES:
        raise InputError(
            f"the teacher has only {heads} heads to take a part of: give {_LEAST_SIZES} sizes or "
            "more by --size"
        )
    places = np.unique(np.linspace(0, len(found) - 1, min(len(found), _MOST_SIZES)).round())
    return tuple(found[int(at)] for at in places)


def size_name(size: Mapping[str, Any]) -> str:
    """Return a size as `--size` spells it."""
    return ",".join(f"{name}={spelled(value)}" for name, value in size.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """What the students of a size reach.

    Attributes:
        name: the size.
        parameters: number of weights.
        share: of the teacher's number.
        kept: of the teacher's R@1, 95% over seeds, with the spread pooled over sizes.
        law: the same by the law; None where it does not fit.
        meets: whether the size surely meets the bar, by its own seeds (95%, one-sided).
        seconds: of a training, the median.
    """

    name: str
    parameters: int
    share: float
    kept: Interval
    law: Interval | None
    meets: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The smallest size that surely meets the bar, by the law.

    Attributes:
        where: `inside` the sizes that were trained, `beyond` or `below` them by at most a factor of
            two, which is extrapolation, or `nowhere` up to there.
        parameters: that size; None for `nowhere`.
    """

    where: Where
    parameters: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling(JsonRecord):
    """The table of sizes, the law through them, and the size that meets the bar.

    Attributes:
        recipe, command, machine: as `Ablation`.
        seeds, pairs: trials of each size, and pairs that they are judged on.
        teacher_parameters, teacher_r1: of the teacher.
        bar: the share of the teacher's R@1 that is asked for.
        rows: by the number of parameters.
        n0, a, b, c: the law; see the module.
        fit_chance: the chance of so much lack of fit if the law is right.
        fits: whether that is at least 5%.
        smallest_trained: the smallest size that meets the bar by its own seeds; None for none.
        answer: by the law; None where it does not fit.
        curve: (parameters, kept by the law) at some sizes, for the picture.
    """

    WHAT: ClassVar[str] = "a scaling table"
    HINT: ClassVar[str] = "run edgeclip scaling again"
    recipe: str
    command: str
    machine: Machine
    seeds: int
    pairs: int
    teacher_parameters: int
    teacher_r1: float
    bar: float
    rows: tuple[SizeRow, ...]
    n0: float
    a: Interval
    b: Interval
    c: Interval
    fit_chance: float
    fits: bool
    smallest_trained: str | None
    answer: Answer | None
    curve: tuple[tuple[float, Interval], ...]


def scaling(
    trials: Trials,
    recipe: DistillRecipe,
    sizes: Sequence[Mapping[str, Any]],
    *,
    name: str,
    seeds: int,
    bar: float,
    command: str,
) -> Scaling:
    """Train every size at every seed, fit the law, and find the size that meets the bar.

    Raises:
        InputError: fewer than four sizes or two seeds, or sizes of the same number of weights.
        ConfigError: stages with students of their own, or a size that cannot be made; one message
            names all.
    """
    if any(stage.get("student") for stage in recipe.stages):
        raise ConfigError(
            f"the stages of {name} have students of their own, which one size would make equal: "
            "choose a recipe whose stages share the sizes of a student"
        )
    if seeds < 2 or len(sizes) < _LEAST_SIZES:
        raise InputError(
            f"a law needs {_LEAST_SIZES} sizes and 2 seeds at least, got {len(sizes)} and {seeds}"
        )
    recipes = _recipes(trials, recipe, sizes)
    found = trials.run(recipes, seeds=seeds, title="scaling")
    found = dict(sorted(found.items(), key=lambda item: item[1][0].parameters))
    teacher = trials.teacher[JUDGE].r1
    kept = np.array([[one.judged_on.r1 / teacher for one in own] for own in found.values()])
    parameters = np.array([own[0].parameters for own in found.values()], float)
    law = fit_law(parameters, 1 - kept)
    rows = tuple(
        _row(own, result, kept[at], law, bar, trials.teacher_parameters)
        for at, (own, result) in enumerate(found.items())
    )
    grid = np.geomspace(parameters.min(), parameters.max(), 12)
    return Scaling(
        recipe=name,
        command=command,
        machine=detect_machine(),
        seeds=seeds,
        pairs=len(next(iter(found.values()))[0].judged_on.hits),
        teacher_parameters=trials.teacher_parameters,
        teacher_r1=teacher,
        bar=bar,
        rows=rows,
        n0=law.n0,
        a=law.number(0),
        b=law.number(1),
        c=law.number(2),
        fit_chance=law.fit_chance,
        fits=law.fits,
        smallest_trained=next((row.name for row in rows if row.meets), None),
        answer=law.answer(bar) if law.fits else None,
        curve=tuple((float(at), law.kept(float(at))) for at in grid) if law.fits else (),
    )


def _recipes(
    trials: Trials, recipe: DistillRecipe, sizes: Sequence[Mapping[str, Any]]
) -> dict[str, DistillRecipe]:
    """Return the recipe of each size by its name; all mistakes are found before any training."""
    recipes: dict[str, DistillRecipe] = {}
    by_bytes: dict[int, list[str]] = {}
    wrong = []
    for size in sizes:
        own = size_name(size)
        try:
            recipes[own] = recipe.replaced(size, source="the size")
            by_bytes.setdefault(trials.weight_bytes(recipes[own], own), []).append(own)
        except EdgeClipError as error:
            wrong.append(f"--size {own}: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    if same := [" and ".join(names) for names in by_bytes.values() if len(names) > 1]:
        raise InputError(
            "a law needs sizes of different numbers of weights; the same have "
            f"{'; '.join(same)}: leave out one, or change it"
        )
    return recipes


def _row(
    name: str,
    results: Sequence[TrialResult],
    kept: Values,
    law: "Law",
    bar: float,
    teacher_parameters: int,
) -> SizeRow:
    count = results[0].parameters
    error = law.spread / math.sqrt(len(kept))
    own = MeanEstimate(float(kept.mean()), error, law.degrees, least=0.0)
    return SizeRow(
        name=name,
        parameters=count,
        share=count / teacher_parameters,
        kept=own.interval,
        law=law.kept(count) if law.fits else None,
        meets=own.lower_bound(_SURE) >= bar,
        seconds=float(np.median([result.seconds for result in results])),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Law:
    """A fitted law with draws of its numbers; see the module.

    Attributes:
        n0: geometric mean of the sizes.
        smallest, largest: the sizes that were trained.
        best: a, b and c [3].
        draws: the same of each draw [draws, 3].
        spread, degrees: standard deviation of a seed, pooled over sizes, and its degrees of
            freedom.
        fit_chance: see `Scaling`.
    """

    n0: float
    smallest: float
    largest: float
    best: Values
    draws: Values
    spread: float
    degrees: int
    fit_chance: float

    @property
    def fits(self) -> bool:
        """Whether the data do not speak against the law."""
        return self.fit_chance >= _DOUBT

    def number(self, place: int) -> Interval:
        """Return a (0), b (1) or c (2) with its 95% interval."""
        return _interval(float(self.best[place]), self.draws[:, place])

    def kept(self, parameters: float) -> Interval:
        """Return the kept share at a size with its 95% interval."""
        return _interval(
            1 - float(self._lost(self.best[None], parameters)[0]),
            1 - self._lost(self.draws, parameters),
        )

    def _lost(self, numbers: Values, parameters: float) -> Values:
        a, b, c = numbers.T
        lost: Values = a + b * (parameters / self.n0) ** -c
        return lost

    def answer(self, bar: float) -> Answer:
        """Return the smallest size whose kept share is at least `bar` with 95%, one-sided."""
        for parameters in np.geomspace(self.smallest / _BEYOND, self.largest * _BEYOND, _GRID):
            if np.quantile(1 - self._lost(self.draws, parameters), 1 - _SURE) >= bar:
                break
        else:
            return Answer(where="nowhere", parameters=None)
        where: Where = "inside"
        if parameters > self.largest * (1 + 1e-9):
            where = "beyond"
        elif parameters < self.smallest * (1 - 1e-9):
            where = "below"
        return Answer(where=where, parameters=round(parameters))


def fit_law(parameters: Values, lost: Values) -> Law:
    """Fit the law to the lost shares [sizes, seeds] at numbers of parameters [sizes].

    Raises:
        InputError: fewer than four different sizes or two seeds.
    """
    sizes, seeds = lost.shape
    if len(set(parameters.tolist())) < _LEAST_SIZES or seeds < 2:
        raise InputError(f"a law needs {_LEAST_SIZES} different sizes and 2 seeds at least")
    n0 = float(np.exp(np.log(parameters).mean()))
    means = lost.mean(axis=1)
    best = _fits(parameters / n0, means[None])[0]
    fitted = best[0] + best[1] * (parameters / n0) ** -best[2]
    degrees = sizes * (seeds - 1)
    spread = math.sqrt(float(((lost - means[:, None]) ** 2).sum()) / degrees)
    rng = np.random.default_rng(0)
    # The spread is itself known from few seeds only.
    scale = spread * np.sqrt(degrees / rng.chisquare(degrees, (_DRAWS, 1)) / seeds)
    draws = _fits(parameters / n0, fitted + scale * rng.standard_normal((_DRAWS, sizes)))
    free = sizes - len(best)
    lack = seeds * float(((means - fitted) ** 2).sum()) / free
    if spread:
        ratios = rng.chisquare(free, 100_000) / free
        ratios /= rng.chisquare(degrees, 100_000) / degrees
        chance = float((ratios >= lack / spread**2).mean())
    else:
        chance = float(lack < 1e-18)
    return Law(
        n0=n0,
        smallest=float(parameters.min()),
        largest=float(parameters.max()),
        best=best,
        draws=draws,
        spread=spread,
        degrees=degrees,
        fit_chance=chance,
    )


def _fits(size: Values, lost: Values) -> Values:
    """Return a, b and c of the best law through each row of `lost` [rows, sizes]: [rows, 3]."""
    best = np.full(len(lost), math.inf)
    found = np.zeros((len(lost), 3))
    for c in _C:
        x = size**-c
        a, b = _line(x, lost)
        squares = ((lost - a[:, None] - b[:, None] * x) ** 2).sum(axis=1)
        is_better = squares < best
        best[is_better] = squares[is_better]
        found[is_better] = np.stack([a, b, np.full_like(a, c)], axis=1)[is_better]
    return found


def _line(x: Values, y: Values) -> tuple[Values, Values]:
    """Return the least-squares a and b, neither below 0, of y [rows, N] = a + b x [N]."""
    mean, means = x.mean(), y.mean(axis=1)
    b = (y - means[:, None]) @ (x - mean) / ((x - mean) ** 2).sum()
    a = means - b * mean
    # The optimum of a convex function lies on the edge that the free one is beyond.
    through = np.maximum(y @ x / (x @ x), 0.0)
    b = np.where(a < 0, through, b)
    a = np.where(a < 0, 0.0, a)
    a = np.where(b < 0, np.maximum(means, 0.0), a)
    return a, np.maximum(b, 0.0)


def _interval(value: float, draws: Values) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(value, min(float(low), value), max(float(high), value))
