"""Run a recipe: open teachers and data, fill the caches, make the student and train it in stages.

The log and the checkpoints of a run lie in its folder; with stages, those of stage N in `stage-N`,
beside the student that it ended with. A run that was stopped goes on in the stage where it was: one
that has ended takes no more steps.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgeclip.compress.built_in import model_source
from edgeclip.compress.data.keep_list import kept_rows, read_keep_list
from edgeclip.compress.data.mixture import only, parts_of
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import Source
from edgeclip.compress.data.translations import translated
from edgeclip.compress.processes import processes
from edgeclip.compress.students.importance import Importance, measure_importance
from edgeclip.compress.students.student import StudentShape, adopt_student, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_basis import teacher_basis
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.checkpoint import checkpoint_folder
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.kept_weights import BestStep
from edgeclip.compress.train.learn_mapping import learn_mapping
from edgeclip.compress.train.recipe import DistillRecipe, load_recipe, stage_number
from edgeclip.compress.train.trackers import check_trackers
from edgeclip.compress.train.train_loop import check_batch_norm
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Basis, check_lengths, read_basis
from edgeclip.runtime.errors import ConfigError, EdgeClipError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad

_log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"  # in the folder of a run
MAPPING = "mapping"  # in that of a stage

Models = Mapping[str, DualEncoder]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEnd:
    """How a stage ended: its folder, number of steps, and the step whose weights it kept.

    `best` is None if nothing was held out.
    """

    run: Path
    steps: int
    best: BestStep | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """The student that a run ended with, and how each of its stages ended."""

    student: DualEncoder
    stages: tuple[StageEnd, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A stage with what it needs.

    Attributes:
        number: from 1.
        recipe: its settings.
        run: its folder.
        shape: the sizes of its student.
        before: those of the stage before; None for the first.
        begins: with what its student begins: a whole model of `--start`, the student of the stage
            before with all its weights (`goes on`), or what it inherits of that or of the teacher.
        source: its data.
        student_source: the same, with the captions that the student reads.
    """

    number: int
    recipe: DistillRecipe
    run: Path
    shape: StudentShape
    before: StudentShape | None
    begins: Literal["start", "goes on", "inherits"]
    source: Source
    student_source: Source


class PreparedRun:
    """A run with its teachers and data open, and its mistakes looked for; see `prepare_run`.

    Attributes:
        weight_bytes: bytes of the student that it will end with, as float32.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        stages: Sequence[_Stage],
        models: Models,
        students: Sequence[DualEncoder],
        *,
        run: Path,
        cache: Path,
        max_bad: MaxBad,
    ) -> None:
        self._recipe, self._stages, self._models = recipe, stages, models
        self._teacher = models[stages[0].recipe.teacher[0]]
        self._run, self._cache, self._max_bad = run, cache, max_bad
        self._asked: dict[Path, tuple[object, ...]] = {}  # what each cache is of
        self.weight_bytes = students[-1].weight_bytes

    @property
    def identity(self) -> str:
        """Names data, files and models of the run by their contents, without paths and settings."""
        stages = [[stage.source.identity, *_read_files(stage)] for stage in self._stages]
        models = [space_fingerprint(own) for own in self._models.values()]
        return json.dumps([stages, models])

    def train(self) -> RunEnd:
        """Train stage after stage, or go on where the run was stopped.

        Raises:
            ConfigError, InputError, KeyboardInterrupt: see `build_cache`, `distill` and `train`.
        """
        students: list[DualEncoder] = []
        ends: list[StageEnd] = []
        for stage in self._stages:
            if self._recipe.stages:
                _log.info("stage %d of %d", stage.number, len(self._stages))
            best = self._train_stage(stage, students)
            if self._recipe.stages and processes().is_first:
                students[-1].save(stage.run / "student")
            ends.append(StageEnd(run=stage.run, steps=stage.recipe.training.steps, best=best))
        return RunEnd(student=students[-1], stages=tuple(ends))

    def _train_stage(self, stage: _Stage, students: list[DualEncoder]) -> BestStep | None:
        """Train the student of a stage, and put it behind those of the stages before."""
        recipe, shape = stage.recipe, stage.shape
        origin = students[-1] if students else self._teacher
        held_out, settings = recipe.held_out, recipe.training
        # All weights of a run that goes on are in its checkpoint.
        is_new = stage.begins == "inherits" and checkpoint_folder(stage.run) is None
        importance = None
        if is_new and shape.inherit in ("selected", "mapped"):
            importance = measure_importance(
                origin, stage.source, seed=settings.seed, held_out=held_out
            )
        student = _begin(stage, origin, self._teacher, self._models, importance)
        caches = self._caches(stage, students)
        if recipe.dims:
            student.basis = _basis(stage, student, caches[0])
        start = self._start(stage, students)
        if is_new and shape.inherit == "mapped" and importance is not None:
            learn_mapping(
                student,
                origin,
                shape,
                importance,
                caches,
                stage.student_source,
                loss_weights=recipe.losses,
                settings=settings,
                out=stage.run / MAPPING,
                start=start,
                held_out=held_out,
                max_bad=self._max_bad,
            )
        best = distill(
            student,
            caches,
            stage.student_source,
            loss_weights=recipe.losses,
            settings=settings,
            out=stage.run,
            held_out=held_out,
            max_bad=self._max_bad,
            start=start,
            begin=self._keep_recipe(stage),
        )
        students.append(student)
        return best

    def _start(self, stage: _Stage, students: Sequence[DualEncoder]) -> str:
        """Name what a student began as, which a run that goes on must have in common."""
        names = []
        if students:
            names.append(space_fingerprint(students[-1]))
        elif stage.recipe.start is not None:
            names.append(space_fingerprint(self._models[stage.recipe.start]))
        shape = stage.shape
        if stage.begins == "inherits" and shape.inherit != "leading":
            steps = f" in {shape.mapping_steps} steps" if shape.inherit == "mapped" else ""
            names.append(f"{shape.inherit}{steps}")
        return " ".join([*names, *_read_files(stage)])

    def _keep_recipe(self, stage: _Stage) -> Callable[[], None]:
        """Return what writes the recipe, once no later stage can refuse to go on with it."""
        begun = [own.number for own in self._stages if checkpoint_folder(own.run)]
        if stage.number < max(begun, default=1):
            return lambda: None
        return lambda: self._recipe.save(self._run / RECIPE)

    def _caches(self, stage: _Stage, students: Sequence[DualEncoder]) -> list[TeacherCache]:
        """Return the embeddings of each teacher; the first one's cache holds those of the others.

        Stages with the same teachers and views share theirs. Those of students lie in the folder of
        the run, for they are of no use to others.
        """
        names, views = stage.recipe.teacher, stage.recipe.views
        asked = (names, views)
        of_students = any(name not in self._models for name in names)
        own = (self._run / "cache" if of_students else self._cache) / f"stage-{stage.number}"
        usual = [own] if of_students else [self._cache, own]
        known = [path for path, before in self._asked.items() if before == asked]
        main = next(path for path in (*known, *usual) if self._asked.get(path, asked) == asked)
        self._asked[main] = asked
        of_patches = any(own.recipe.losses.patches > 0 for own in self._stages)
        caches: list[TeacherCache] = []
        for place, name in enumerate(names, 1):
            number = None if name in self._models else stage_number(name)
            first = caches[0].settings if caches else None
            caches.append(
                build_cache(
                    self._models[name] if number is None else students[number - 1],
                    stage.source,
                    main if first is None else main / f"teacher-{place}",
                    views=views if first is None else first.views,
                    augmentation=None if first is None else first.augmentation,
                    max_bad=self._max_bad,
                    workers=stage.recipe.training.workers,
                    patches=first is None and of_patches,
                )
            )
        return caches


def prepare_run(
    recipe: DistillRecipe,
    *,
    run: Path,
    cache: Path | None = None,
    strict: bool = False,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
) -> PreparedRun:
    """Open the teachers and data of a recipe, and look for the mistakes of all its stages.

    Nothing is written.

    Args:
        recipe: the settings.
        run: folder of checkpoints, logs and the recipe.
        cache: folder of the teacher cache; None for `run/cache`.
        strict, max_bad: see `open_source` and `build_cache`.

    Raises:
        ConfigError, InputError: a teacher or data cannot be used, a student cannot be made, or
            `run` holds another run. The mistakes of several stages are one message.
    """
    recipes = recipe.stage_recipes()
    folders = [run / f"stage-{number}" if recipe.stages else run for number in _numbers(recipes)]
    _refuse_another_run(recipe, run, folders)
    wrong: list[str] = []
    models = _load_models(recipe, wrong)
    teacher = models[recipes[0].teacher[0]]
    size = max(
        *(own.image_spec.size for own in models.values()),
        *(own.student.image_size or 0 for own in recipes),
    )
    stages: list[_Stage] = []
    students: list[DualEncoder] = []  # as they begin: the sizes of one rest on those before
    for number, own, folder in zip(_numbers(recipes), recipes, folders, strict=True):
        if own.start is not None and own.start not in models:
            continue  # it is noted
        with _noted(wrong, f"stage {number}" if recipe.stages else ""):
            check_trackers(own.training.track)
            if own.dims:
                check_lengths(own.dims, teacher.spec.dim)
            _check_teachers(own, models, students, number)
            source = _open_data(own, size=size, strict=strict)
            Sampling(parts_of(source), held_out=own.held_out)
            student_source = _with_translations(own, source)
            shape = _shape(own, source, number)
            numbers = _with_numbers(shape, teacher)
            stage = _Stage(
                number=number,
                recipe=own,
                run=folder,
                shape=numbers,
                before=stages[-1].shape if stages else None,
                begins=_begins(own, numbers, stages),
                source=source,
                student_source=student_source,
            )
            origin = students[-1] if students else teacher
            student = _begin(stage, origin, teacher, models)
            masked = own.losses.masked > 0
            check_batch_norm(student, own.training, processes(), masked=masked)
            stages.append(stage)
            students.append(student)
    if wrong:
        raise ConfigError("the recipe cannot run:\n" + "\n".join(f"  {line}" for line in wrong))
    cache = cache or run / "cache"
    return PreparedRun(recipe, stages, models, students, run=run, cache=cache, max_bad=max_bad)


def _basis(stage: _Stage, student: DualEncoder, cache: TeacherCache) -> Basis:
    """Return the basis of a stage's student: that of its run where it has begun, or a new one.

    Another number of threads computes other axes in the last digits, which would be another run.
    """
    dims = stage.recipe.dims
    with processes().first_before_others():
        begun = any(checkpoint_folder(own) for own in (stage.run, stage.run / MAPPING))
        if begun or not processes().is_first:
            known = read_basis(stage.run)
            if known is not None and set(known.lengths) == {student.spec.dim, *dims}:
                return known
        sampling = Sampling(parts_of(stage.source), held_out=stage.recipe.held_out)
        without = sampling.held_out.tolist()
        made = teacher_basis(cache, stage.source, dims, space=student.space, without=without)
        if not begun and processes().is_first:
            stage.run.mkdir(parents=True, exist_ok=True)
            made.save(stage.run / BASIS_NAME)
        return made


def _read_files(stage: _Stage) -> list[str]:
    """Name the contents of the files, data aside, that change what a student reads."""
    named = (
        ("read by", stage.recipe.translations),
        ("of the tokens of", stage.shape.vocabulary),
    )
    return [f"{how} {sha256_file(Path(path))}" for how, path in named if path is not None]


def _numbers(recipes: Sequence[DistillRecipe]) -> range:
    return range(1, len(recipes) + 1)


@contextmanager
def _noted(wrong: list[str], where: str) -> Iterator[None]:
    """Note a mistake and go on to look for others; raise it if it is nowhere in particular."""
    try:
        yield
    except EdgeClipError as error:
        if not where:
            raise
        wrong.append(f"{where}: {error}")


def _refuse_another_run(recipe: DistillRecipe, run: Path, folders: Sequence[Path]) -> None:
    """Refuse a folder that holds a run with stages for one without, and the other way round.

    Raises:
        ConfigError: as said; or a stage that others went on from is to have other steps.
    """
    advice = "choose another --out, or delete it to start again"
    if checkpoint_folder(run if recipe.stages else run / "stage-1") is not None:
        what = "without" if recipe.stages else "with"
        raise ConfigError(f"{run} holds a run {what} stages: {advice}")
    written = run / RECIPE
    if not recipe.stages or not written.is_file():
        return
    pairs = zip(load_recipe(str(written)).stage_recipes(), recipe.stage_recipes(), strict=False)
    for number, (before, now) in enumerate(pairs, 1):
        steps = before.training.steps
        began = number < len(folders) and checkpoint_folder(folders[number]) is not None
        if began and now.training.steps != steps:
            raise ConfigError(
                f"stage {number} in {run} ended after {steps} steps, and stage {number + 1} went "
                f"on from there: leave its steps as they are; {advice}"
            )


def _load_models(recipe: DistillRecipe, wrong: list[str]) -> dict[str, DualEncoder]:
    """Load each teacher of all stages, and what to start from, by its name."""
    recipes = recipe.stage_recipes()
    models: dict[str, DualEncoder] = {}
    for number, own in enumerate(recipes, 1):
        for name in (*own.teacher, *((own.start,) if own.start is not None else ())):
            if name in models or (recipe.stages and stage_number(name)):
                continue
            # Without the very first one there is nothing to hold the others against.
            with _noted(wrong, f"stage {number}" if models and recipe.stages else ""):
                models[name] = DualEncoder.load(model_source(name)).to(processes().device)
    return models


def _check_teachers(
    recipe: DistillRecipe, models: Models, students: Sequence[DualEncoder], number: int
) -> None:
    """Refuse a stage that would leave the space of the run's first teacher.

    Args:
        recipe: that of the stage.
        models: all models, the run's first teacher first.
        students: those of the stages before.
        number: of the stage.

    Raises:
        ConfigError: its first teacher embeds into another space, or the teachers cannot teach one
            of its losses.
    """
    first, teacher = recipe.teacher[0], next(iter(models.values()))
    if number > 1 and first in models and models[first].space != teacher.space:
        raise ConfigError(
            f"its first teacher {first} has another embedding space than that of stage 1, which "
            "all students live in: name it behind a teacher of that space"
        )
    known = dict(models) | {f"stage-{place}": own for place, own in enumerate(students, 1)}
    if all(name in known for name in recipe.teacher):
        recipe.losses.check([known[name].logit_bias for name in recipe.teacher])


def _open_data(recipe: DistillRecipe, *, size: int, strict: bool) -> Source:
    with processes().first_before_others():
        source = open_source(
            recipe.data, split="train", count=recipe.count, size=size, strict=strict
        )
    if recipe.keep is None:
        return source
    keep = read_keep_list(Path(recipe.keep))
    rows = kept_rows(source, keep)
    return only(source, rows, name=f"{source.name}, {len(rows)} of them kept by {keep.path}")


def _with_translations(recipe: DistillRecipe, source: Source) -> Source:
    if recipe.translations is None:
        return source
    made, says = translated(source, Path(recipe.translations))
    _log.info("%s", says)
    return made


def _shape(recipe: DistillRecipe, source: Source, number: int) -> StudentShape:
    """Return the sizes of a student, with the whole text tower where no caption trains it."""
    if recipe.start is not None and recipe.student != StudentShape():
        raise ConfigError("--start begins with a whole model, so leave out the sizes of a student")
    if source.has_captions or recipe.start is not None or recipe.student.whole_text:
        return recipe.student
    whose = "teacher's" if number == 1 else "last stage's"
    _log.info("%s: no captions, so the %s text tower is kept as it is", source.name, whose)
    return replace(recipe.student, whole_text=True)


def _with_numbers(shape: StudentShape, teacher: DualEncoder) -> StudentShape:
    """Return a shape with numbers in place of None, which means a part of the first teacher's.

    A later stage's student is made from the student before it, whose half would be less.
    """
    towers = teacher.model.config.vision_config, teacher.model.config.text_config
    inherits = shape.family == "inherited"
    known: dict[str, Any] = {"image_size": teacher.image_spec.size}
    if inherits:
        known["patch_size"] = _patch_size(teacher)
    for tower, config in zip(("image", "text"), towers, strict=True):
        if tower == "image" and not inherits:
            continue
        for part, name in (("heads", "num_attention_heads"), ("layers", "num_hidden_layers")):
            whole = getattr(config, name, None)
            known[f"{tower}_{part}"] = (whole + 1) // 2 if isinstance(whole, int) else None
    return replace(
        shape, **{name: value for name, value in known.items() if getattr(shape, name) is None}
    )


def _patch_size(model: DualEncoder) -> int | None:
    size = getattr(model.model.config.vision_config, "patch_size", None)
    return size if isinstance(size, int) else None


def _begins(
    recipe: DistillRecipe, shape: StudentShape, before: Sequence[_Stage]
) -> Literal["start", "goes on", "inherits"]:
    if not before:
        return "inherits" if recipe.start is None else "start"
    return "goes on" if before[-1].shape == shape else "inherits"


def _begin(
    stage: _Stage,
    origin: DualEncoder,
    teacher: DualEncoder,
    models: Models,
    importance: Importance | None = None,
) -> DualEncoder:
    """Make the student of a stage as it is before the first step.

    Args:
        stage: what it is to be.
        origin: what it inherits from: the teacher, or the student of the stage before.
        teacher: the first of all stages, in whose space it lives.
        models: all others.
        importance: of the origin's units; without it the student has the leading ones, which is
            enough to know its sizes.
    """
    seed, shape = stage.recipe.training.seed, stage.shape
    if stage.begins == "goes on":
        origin.requires_grad_(True)  # a stage without captions had frozen the text tower
        return adopt_student(origin, teacher, seed=seed).to(teacher.device)
    if stage.recipe.start is not None and stage.begins == "start":
        return adopt_student(models[stage.recipe.start], teacher, seed=seed).to(teacher.device)
    if importance is None and shape.inherit in ("selected", "mapped"):
        shape = replace(shape, inherit="leading")
    if shape.image_size == origin.image_spec.size:  # there is nothing to resample
        shape = replace(shape, image_size=None)
    if shape.patch_size == _patch_size(origin):
        shape = replace(shape, patch_size=None)
    shape = _with_new_tokens(shape, stage.before)
    student = new_student(origin, shape, seed=seed, importance=importance)
    return student.to(teacher.device)


_TOKENS = ("text_tokenizer", "vocabulary", "token_rank")


def _with_new_tokens(shape: StudentShape, before: StudentShape | None) -> StudentShape:
    """Return a shape without the changes of tokens that the student before it has had.

    Raises:
        ConfigError: another change, which cannot be made of a text tower that had one.
    """
    if before is None:
        return shape
    usual = StudentShape()
    done = [name for name in _TOKENS if getattr(before, name) != getattr(usual, name)]
    for name in done:
        had, now = getattr(before, name), getattr(shape, name)
        if now != had:
            raise ConfigError(
                f"{name} is {had} in the stage before, and {now} here: choose one for both stages"
            )
    return replace(shape, **{name: getattr(usual, name) for name in done})
