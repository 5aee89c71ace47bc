"""How many steps a student needs from random, leading, selected and mapped weights of its teacher.

The same students of the built-in teacher, at some 12% of its weights, learn from the same
EmojiScenes in the same order, once from each beginning and several times with other seeds. The
held-out loss is the feature loss on pictures that are not trained on, 5 (1 - cosine), the mean of
both towers. The steps in which a map is learned count as steps. Losses to reach are those that the
selected students have after 30% and 60% of their steps; where a run does not reach one, its steps
count as all that it took, and the table says of how many runs that is so.

With `--out FILE.json`, FILE.html shows the steps and the curves.
"""

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from _bars import Bar, Rule, finish, hold, options, say, span

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import EmojiSource, Source
from edgeclip.compress.students.importance import measure_importance
from edgeclip.compress.students.inherit import Inherit
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.held_out import IMAGE_COSINE, TEXT_COSINE, HeldOut
from edgeclip.compress.train.learn_mapping import learn_mapping
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings, read_log
from edgeclip.profiles.report.charts import Dot, DotRow, RowChart, TrainingCurve
from edgeclip.profiles.report.sections import Figure, FigureGrid, Note, Page, PageSummary, Section
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.console import percent
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import estimate_mean

BARS: dict[str, Rule] = {
    # Below 1: fewer steps. A map that is not worth its steps is a miss, and stays one.
    "mapped_steps_by_selected_12": ("<=", 0.999, "times"),
    "selected_steps_by_leading_12": ("<=", 0.999, "times"),
    "selected_steps_by_random_12": ("<=", 0.999, "times"),
}
KEPT_MODELS = ("compress/emoji_teacher",)

SHAPES = {
    12: StudentShape(image_heads=2, image_layers=4, text_heads=1, text_layers=2),
}
BEGINNINGS: tuple[Inherit, ...] = ("random", "leading", "selected", "mapped")
assert set(BEGINNINGS) == set(get_args(Inherit))
PLACES = (0.3, 0.6)  # of the selected students' steps


class Sizes(NamedTuple):
    """How much is trained and measured."""

    pictures: int = 8192
    held_out: int = 256
    steps: int = 160
    mapping: int = 40
    batch_size: int = 64
    validations: int = 8
    seeds: int = 3
    inputs: int = 256


QUICK = Sizes(
    pictures=192,
    held_out=32,
    steps=12,
    mapping=4,
    batch_size=24,
    validations=4,
    seeds=2,
    inputs=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run: its held-out losses.

    Attributes:
        size: about what percentage of the teacher's weights the student has.
        beginning: what it began with.
        seed: of the data's order, of the selection and of random weights.
        steps, losses: of each validation; 0 is before the first step.
    """

    size: int
    beginning: Inherit
    seed: int
    steps: list[int]
    losses: list[float]

    def loss_at(self, step: float) -> float:
        """The loss after some steps, between two validations on a line."""
        return float(np.interp(step, self.steps, self.losses))

    def steps_to(self, loss: float) -> float:
        """The steps until a loss is reached; infinite if it is not."""
        for number, value in enumerate(self.losses):
            if value <= loss:
                if number == 0:
                    return float(self.steps[0])
                before, step = self.losses[number - 1], self.steps[number - 1]
                share = (before - loss) / (before - value)
                return step + share * (self.steps[number] - step)
        return math.inf


def run(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: Source,
    size: int,
    beginning: Inherit,
    seed: int,
    sizes: Sizes,
) -> Run:
    """Train a student as `edgeclip distill` does, at a constant learning rate after the warm-up."""
    shape = replace(SHAPES[size], inherit=beginning, mapping_steps=sizes.mapping)
    importance = None
    if beginning in ("selected", "mapped"):
        importance = measure_importance(
            teacher, source, seed=seed, held_out=sizes.held_out, inputs=sizes.inputs
        )
    student = new_student(teacher, shape, seed=seed, importance=importance)
    rows = Sampling(parts_of(source), held_out=sizes.held_out).held_out
    steps, losses = [0], [_loss(HeldOut(student, cache, source, rows)().values)]
    settings = TrainSettings(
        steps=sizes.steps,
        batch_size=sizes.batch_size,
        schedule="constant",
        warmup_steps=min(60, sizes.steps // 5),
        validations=sizes.validations,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if beginning == "mapped" and importance is not None:
            learn_mapping(
                student,
                teacher,
                shape,
                importance,
                cache,
                source,
                loss_weights=LossWeights(),
                settings=settings,
                out=folder / "mapping",
                held_out=sizes.held_out,
            )
            steps, losses = _joined(steps, losses, folder / "mapping", 0)
            every = sizes.steps // sizes.validations
            left = sizes.steps - sizes.mapping
            settings = replace(settings, steps=left, validations=max(1, left // every))
        distill(
            student,
            cache,
            source,
            loss_weights=LossWeights(),
            settings=settings,
            out=folder / "run",
            held_out=sizes.held_out,
        )
        steps, losses = _joined(steps, losses, folder / "run", steps[-1])
    return Run(size=size, beginning=beginning, seed=seed, steps=steps, losses=losses)


def _loss(values: Mapping[str, float]) -> float:
    return 5 * (1 - (values[IMAGE_COSINE] + values[TEXT_COSINE]) / 2)


def _joined(
    steps: list[int], losses: list[float], folder: Path, before: int
) -> tuple[list[int], list[float]]:
    """Add the validations of a log, whose first step is the one behind `before`."""
    log = [line for line in read_log(folder / "log.jsonl") if IMAGE_COSINE in line]
    added = [before + int(line["step"]) for line in log]
    return [*steps, *added], [*losses, *map(_loss, log)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The steps to a loss from one beginning.

    Attributes:
        steps: the mean over the seeds, with its interval.
        missed: of how many runs the loss was not reached; they count with all their steps.
    """

    size: int
    place: float
    loss: float
    beginning: Inherit
    steps: Interval
    missed: int


def reached(runs: Sequence[Run], sizes: Sizes) -> list[Reached]:
    """The steps to each loss, of each size, from each beginning."""
    found = []
    for size in SHAPES:
        for place in PLACES:
            loss = level(runs, size, place, sizes)
            for beginning in BEGINNINGS:
                taken = [item.steps_to(loss) for item in of(runs, size, beginning)]
                ends = np.minimum(taken, sizes.steps)
                found.append(
                    Reached(
                        size=size,
                        place=place,
                        loss=loss,
                        beginning=beginning,
                        steps=estimate_mean(ends, least=0.0).interval,
                        missed=sum(math.isinf(one) for one in taken),
                    )
                )
    return found


def level(runs: Sequence[Run], size: int, place: float, sizes: Sizes) -> float:
    """The loss of the selected students after a share of their steps."""
    selected = of(runs, size, "selected")
    return float(np.mean([item.loss_at(place * sizes.steps) for item in selected]))


def of(runs: Sequence[Run], size: int, beginning: Inherit) -> list[Run]:
    """The runs of a size and a beginning, in the order of their seeds."""
    return [item for item in runs if (item.size, item.beginning) == (size, beginning)]


def times(runs: Sequence[Run], one: Inherit, other: Inherit, sizes: Sizes) -> Interval:
    """How many times the steps of `other` the beginning `one` takes at 12%: a geometric mean.

    Runs of one seed are compared, at the later of the losses. It is infinite where a run of `one`
    does not reach it; one of `other` that does not counts with all its steps.
    """
    loss = level(runs, 12, PLACES[-1], sizes)
    ratios = []
    for ours, theirs in zip(of(runs, 12, one), of(runs, 12, other), strict=True):
        taken = max(1.0, ours.steps_to(loss))
        if math.isinf(taken):
            return Interval(math.inf, 0.0, math.inf)
        ratios.append(math.log(taken / max(1.0, min(theirs.steps_to(loss), sizes.steps))))
    found = estimate_mean(np.array(ratios)).interval
    return Interval(math.exp(found.value), math.exp(found.low), _exp(found.high))


def _exp(value: float) -> float:
    return math.inf if math.isinf(value) else math.exp(value)


def bars(runs: Sequence[Run], sizes: Sizes) -> list[Bar]:
    """What selecting and mapping must save at 12%."""
    pairs: list[tuple[Inherit, Inherit]] = [
        ("mapped", "selected"),
        ("selected", "leading"),
        ("selected", "random"),
    ]
    return [
        hold(BARS, f"{one}_steps_by_{other}_12", times(runs, one, other, sizes))
        for one, other in pairs
    ]


def write_plot(
    runs: Sequence[Run], found: Sequence[Reached], shares: Mapping[int, float], path: Path
) -> None:
    """Draw the steps to each loss, and the curve of each beginning, the mean over the seeds."""
    rows = []
    for size in SHAPES:
        for place in PLACES:
            here = [item for item in found if (item.size, item.place) == (size, place)]
            dots = tuple(Dot(item.steps, shape) for shape, item in enumerate(here))
            label = f"{percent(shares[size])}, loss {here[0].loss:.2f}"
            rows.append(DotRow(label, dots, " / ".join(f"{x.steps.value:.0f}" for x in here)))
    chart = RowChart(
        rows=tuple(rows),
        axis_name="steps to the loss",
        title="Steps to a held-out loss",
        legend=tuple(enumerate(BEGINNINGS)),
        log=False,
    )
    curves = []
    for size in SHAPES:
        for beginning in BEGINNINGS:
            same = of(runs, size, beginning)
            losses = np.mean([item.losses for item in same], axis=0)
            curves.append(
                TrainingCurve(
                    f"{beginning}, {percent(shares[size])}",
                    tuple(map(float, same[0].steps)),
                    tuple(losses.tolist()),
                )
            )
    note = "Held-out loss, 5 (1 - cosine), the mean of both towers and of all seeds."
    write_html(
        Page(
            title="Steps to a loss from random, leading, selected and mapped weights",
            lead=("Students of the built-in teacher on EmojiScenes.",),
            summary=PageSummary("", ""),
            sections=(
                Section(
                    anchor="steps",
                    title="Steps",
                    blocks=(Figure(chart, "Whiskers are 95% intervals over the seeds."),),
                ),
                Section(
                    anchor="curves",
                    title="Curves",
                    blocks=(Note(note), FigureGrid(tuple(curves))),
                ),
            ),
        ),
        path,
    )


def table(found: Sequence[Reached], shares: Mapping[int, float]) -> str:
    """Of each size and loss a line for each beginning."""
    lines = [f"{'size':>6} {'loss':>6} {'begins':<9} {'steps':>26} {'not reached':>12}"]
    for item in found:
        size = percent(shares[item.size])
        lines.append(
            f"{size:>6} {item.loss:>6.3f} {item.beginning:<9} {span(item.steps, 0):>26} "
            f"{item.missed:>12}"
        )
    return "\n".join(lines)


def main() -> int:
    """Train from each beginning, print the table and the bars."""
    args = options(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    teacher = DualEncoder.load(built_in_teacher())
    source = EmojiSource("train", sizes.pictures, size=teacher.image_spec.size)
    shares = {
        size: new_student(teacher, shape).weight_bytes / teacher.weight_bytes
        for size, shape in SHAPES.items()
    }
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(teacher, source, Path(folder))
        for size in SHAPES:
            for seed in range(sizes.seeds):
                for beginning in BEGINNINGS:
                    made = run(teacher, cache, source, size, beginning, seed, sizes)
                    runs.append(made)
                    ends = f"{made.losses[0]:.3f} to {made.losses[-1]:.3f}"
                    say(f"{percent(shares[size])} {beginning}, seed {seed}: loss {ends}")
    found = reached(runs, sizes)
    print(table(found, shares))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_plot(runs, found, shares, args.out.with_suffix(".html"))
    return finish(bars(runs, sizes), args.out, shares=shares, reached=found, runs=runs)


if __name__ == "__main__":
    sys.exit(main())
