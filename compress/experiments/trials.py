"""Train recipes at several seeds on one cache, and judge each student on pairs it never saw.

A trial is one recipe at one seed. It has a folder of its own: a trial that was stopped goes on,
and one that was judged is not repeated. All trials of a seed see the same data in the same order,
so that their differences are paired.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.compress.built_in import model_source
from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import Source
from edgeclip.compress.processes import processes, without_bars
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.compress.train.run_recipe import MAPPING, PreparedRun, RunEnd, prepare_run
from edgeclip.compress.train.train_loop import read_log
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.errors import ConfigError, EdgeClipError, InputError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import pair_ranks

# What is chosen by the first is judged by the second; neither is trained on nor held out.
CHOOSE: Split = "calibration"
JUDGE: Split = "test"
_RESULT = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a model reaches on the pairs of a split.

    Attributes:
        hits: of each picture, the mean of both directions' hits at rank 1, in [0, 1].
        image_r1, text_r1: R@1 of images that look for their text, and of texts.
        image_cosine, text_cosine: mean cosine to the teacher's embeddings.
    """

    hits: tuple[float, ...]
    image_r1: float
    text_r1: float
    image_cosine: float
    text_cosine: float

    @property
    def r1(self) -> float:
        """R@1, the mean of both directions."""
        return (self.image_r1 + self.text_r1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult(JsonRecord):
    """What a trial gave.

    Attributes:
        identity: hash of its recipe, of the data and models that this names, and of the teacher
            and the pairs it was judged on.
        parameters: number of weights of the student.
        steps, seconds: of its training, all stages together, with those of a learned map.
        chosen_on, judged_on: on the splits `CHOOSE` and `JUDGE`.
    """

    WHAT: ClassVar[str] = "a trial's result"
    HINT: ClassVar[str] = "delete it, and the trial is judged again"
    identity: str
    parameters: int
    steps: int
    seconds: float
    chosen_on: Judged
    judged_on: Judged


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The pairs of a split with the teacher's embeddings of them."""

    source: Source
    relevance: Relevance
    image: NDArray[np.float32]
    text: NDArray[np.float32]


class Trials:
    """Trains and judges the trials of an experiment.

    Args:
        recipe: the base, which names the teacher and the data of all.
        out: folder of the experiment; `cache` is that of its caches, None for `out/cache`.
        pairs: number of scenes that students are judged on, in either split; data of your own are
            taken whole.
        strict, max_bad: see `prepare_run`.

    Attributes:
        teacher: what the teacher itself reaches on `CHOOSE` and on `JUDGE`.
        teacher_model, teacher_parameters: itself, and the number of its weights.

    Raises:
        ConfigError, InputError: a teacher or data that cannot be used, or without captions.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        out: Path,
        *,
        pairs: int,
        cache: Path | None = None,
        strict: bool = False,
        max_bad: MaxBad = DEFAULT_MAX_BAD,
    ) -> None:
        self._out, self._cache = out, cache or out / "cache"
        self._usual = _cached(recipe)
        self._strict, self._max_bad = strict, max_bad
        name = recipe.stage_recipes()[0].teacher[0]
        teacher = DualEncoder.load(model_source(name)).to(processes().device)
        self._space = teacher.space
        self._split = {}
        for split in (CHOOSE, JUDGE):
            opened = open_source(
                recipe.data,
                split=split,
                count=pairs,
                size=teacher.image_spec.size,
                strict=strict,
                max_bad=max_bad,
            )
            if not opened.has_captions:
                raise ConfigError(f"{opened.name}: students are compared by R@1, give captions")
            self._split[split] = _pairs(teacher, opened)
        self.teacher = {split: _judge(teacher, own) for split, own in self._split.items()}
        self.teacher_model = teacher
        self.teacher_parameters = _parameters(teacher)
        for split, judged in self.teacher.items():
            if not judged.r1:
                raise InputError(
                    f"the teacher finds none of {len(judged.hits)} {split} pairs, so no student "
                    "can be compared by R@1: choose other data or another teacher"
                )

    def weight_bytes(self, recipe: DistillRecipe, name: str) -> int:
        """Return the bytes of the student of a recipe, as float32. Nothing is trained.

        Raises:
            ConfigError, InputError: the recipe cannot run.
        """
        return self._prepare(recipe, self._folder(name, 0)).weight_bytes

    def mistake(self, recipe: DistillRecipe, name: str) -> str | None:
        """Say why a recipe cannot run; None if it can. Nothing is trained."""
        try:
            self.weight_bytes(recipe, name)
        except EdgeClipError as error:
            return str(error)
        return None

    def run(
        self, recipes: Mapping[str, DistillRecipe], *, seeds: int, title: str
    ) -> dict[str, tuple[TrialResult, ...]]:
        """Train every recipe at every seed, and judge it; return the results by the names.

        Raises:
            ConfigError, InputError, KeyboardInterrupt: see `PreparedRun.train`; what has ended is
                kept.
        """
        todo = [
            (name, seed, _with_seed(recipe, seed))
            for seed in range(seeds)
            for name, recipe in recipes.items()
        ]
        found: dict[str, list[TrialResult]] = {name: [] for name in recipes}
        steps = sum(_steps(recipe) for _, _, recipe in todo)
        done = 0
        with tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True) as bar:
            for name, seed, recipe in todo:
                bar.set_postfix_str(f"{done} of {len(todo)} trials, {name}, seed {seed}")
                found[name].append(self._one(name, seed, recipe))
                done += 1
                bar.update(_steps(recipe))
        return {name: tuple(results) for name, results in found.items()}

    def _one(self, name: str, seed: int, recipe: DistillRecipe) -> TrialResult:
        folder = self._folder(name, seed)
        # What the recipe names may have changed, though it has the same name.
        prepared = self._prepare(recipe, folder)
        identity = self._identity(recipe, prepared)
        path = folder / _RESULT
        if path.exists():
            kept = TrialResult.load(path)
            if kept.identity == identity:
                return kept
        with without_bars():
            end = prepared.train()
        logs = [read_log(path) for path in _logs(recipe, end)]
        result = TrialResult(
            identity=identity,
            parameters=_parameters(end.student),
            steps=sum(int(log[-1]["step"]) for log in logs),
            seconds=sum(float(log[-1]["seconds"]) for log in logs),
            chosen_on=_judge(end.student, self._split[CHOOSE]),
            judged_on=_judge(end.student, self._split[JUDGE]),
        )
        result.save(path)
        for checkpoint in folder.rglob("checkpoint-*"):  # three times the student, for nothing now
            shutil.rmtree(checkpoint, ignore_errors=True)
        return result

    def _prepare(self, recipe: DistillRecipe, folder: Path) -> PreparedRun:
        cached = _cached(recipe)
        cache = self._cache if cached == self._usual else self._cache / f"other-{_hash(cached)[:8]}"
        return prepare_run(
            recipe, run=folder, cache=cache, strict=self._strict, max_bad=self._max_bad
        )

    def _folder(self, name: str, seed: int) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in name)
        return self._out / "trials" / safe / f"seed-{seed}"

    def _identity(self, recipe: DistillRecipe, prepared: PreparedRun) -> str:
        judged_on = [own.source.identity for own in self._split.values()]
        # What changes no weight is no part of it.
        plain = replace(
            recipe, training=replace(recipe.training, workers=None, checkpoint_seconds=1.0)
        )
        return _hash((asdict(plain), prepared.identity, self._space, judged_on))


def _with_seed(recipe: DistillRecipe, more: int) -> DistillRecipe:
    """Return a recipe with another seed in every stage."""
    seed = recipe.training.seed + more
    return recipe.replaced({"seed": seed}, source="the recipe") if more else recipe


def _cached(recipe: DistillRecipe) -> list[object]:
    """Return what a cache of the teachers' embeddings depends on, beside the data."""
    return [(own.teacher, own.views) for own in recipe.stage_recipes()]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _steps(recipe: DistillRecipe) -> int:
    return sum(own.training.steps for own in recipe.stage_recipes())


def _logs(recipe: DistillRecipe, end: RunEnd) -> list[Path]:
    """Return the logs of all trainings of a run: those of its stages, and of the maps before."""
    found = []
    for own, stage in zip(recipe.stage_recipes(), end.stages, strict=True):
        folders = [stage.run]
        if own.student.inherit == "mapped":  # but where nothing was inherited, or all of it
            folders.insert(0, stage.run / MAPPING)
        found += [path for folder in folders if (path := folder / "log.jsonl").is_file()]
    return found


def _parameters(model: DualEncoder) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _pairs(teacher: DualEncoder, source: Source) -> _Pairs:
    captions = [source.captions(index) for index in range(len(source))]
    image, text = embed_source(teacher, source)
    return _Pairs(
        source=source,
        relevance=Relevance.of_captions(captions),
        image=image.numpy(),
        text=text.numpy(),
    )


def _judge(model: DualEncoder, pairs: _Pairs) -> Judged:
    image, text = (rows.numpy() for rows in embed_source(model, pairs.source))
    ranks = pair_ranks(image, text, pairs.relevance)
    return Judged(
        hits=tuple(ranks.hits(1).tolist()),
        image_r1=float(ranks.image_hits(1).mean()),
        text_r1=float(ranks.text_hits(1).mean()),
        image_cosine=float(cosines(image, pairs.image).mean()),
        text_cosine=float(cosines(text, pairs.text).mean()),
    )
