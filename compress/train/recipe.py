"""Recipes: all settings of a distillation in one YAML file, in one stage or several."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge

from edgeclip.compress.built_in import BUILT_IN
from edgeclip.compress.data.sources import EMOJI
from edgeclip.compress.students.student import StudentShape
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.device.schema import parse, read_yaml, unknown_name_error
from edgeclip.runtime.errors import ConfigError

_FOLDER = Path(__file__).parent / "recipes"
_STAGE = re.compile(r"stage-([1-9]\d*)")


class _Partial:
    """Lets `runtime.device.schema.parse` read some of the settings of a recipe as a dict.

    Types, bounds and names are those of `StageSettings`, the rest stays as it is in the recipe.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(_given, handler(_stage_settings()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillRecipe:
    """All settings of `edgeclip distill` but for where its files lie.

    With `stages`, a run is one training after the other, see `stage_recipes`: the student of a
    stage goes on with the weights of the stage before, or, where its sizes are others, inherits
    from that student. All students live in the space of the first stage's first teacher.

    Attributes:
        teacher: directories or hub ids; the student lives in the space of the first.
        data: sources of pictures, see `--data`.
        count: number of built-in scenes, where those are a source.
        keep: list of the pictures to train on, which `edgeclip data-report` writes.
        translations: table of captions as the student reads them in place of the teacher's, see
            `read_translations`.
        views: augmented views of each picture; None for those of an existing cache, else one.
        held_out: pictures that are not trained on; None for a tenth, at most `MOST_HELD_OUT`.
        start: directory or hub id of a dual encoder to start from in place of a part of the
            teacher.
        dims: shorter lengths that embeddings can be cut to, for which the losses count as well.
        student: sizes of the student.
        losses: the weight of each loss.
        training: steps, rates and the like.
        stages: for each stage the settings that differ from those above, in the same sections; all
            but `start`. `stage-N` as a teacher is the student of an earlier stage.
    """

    teacher: tuple[str, ...] = (BUILT_IN,)
    data: tuple[str, ...] = (EMOJI,)
    count: Annotated[int, Ge(0)] = 32_768
    keep: str | None = None
    translations: str | None = None
    views: Annotated[int | None, Ge(1)] = None
    held_out: Annotated[int | None, Ge(0)] = None
    start: str | None = None
    dims: tuple[Annotated[int, Ge(1)], ...] = ()
    student: StudentShape = field(default_factory=StudentShape)
    losses: LossWeights = field(default_factory=LossWeights)
    training: TrainSettings = field(default_factory=TrainSettings)
    stages: tuple[Annotated[dict[str, Any], _Partial()], ...] = ()

    def __post_init__(self) -> None:
        self.stage_recipes()

    def stage_recipes(self) -> tuple["DistillRecipe", ...]:
        """Return the recipe of each stage, which has no stages itself; of one without, itself.

        Raises:
            ConfigError: one message that lists the mistakes of all stages.
        """
        if not self.stages:
            return (self,)
        made: list[DistillRecipe] = []
        wrong = []
        for number, changes in enumerate(self.stages, 1):
            try:
                changed = {
                    name: dataclasses.replace(getattr(self, name), **value)
                    if name in SECTIONS
                    else value
                    for name, value in changes.items()
                }
                teacher = changed.get("teacher", self.teacher)
                if mistakes := _wrong_teachers(teacher, number):
                    raise ConfigError(mistakes)
            except ConfigError as error:
                wrong.append(f"  stages.{number - 1}: {error}")
            else:
                start = self.start if number == 1 else None
                made.append(dataclasses.replace(self, **changed, start=start, stages=()))
        if wrong:
            raise ConfigError("the recipe is not valid:\n" + "\n".join(wrong))
        return tuple(made)

    def replaced(self, given: Mapping[str, object], *, source: str) -> "DistillRecipe":
        """Return the recipe with other values of some settings, by their names in any section.

        They hold in every stage, but for the teachers of one that learns from a stage before.

        Raises:
            ConfigError: one message that lists every value that is wrong; `source` says where they
                came from.
        """
        data: dict[str, Any] = dataclasses.asdict(self)
        for name, value in given.items():
            section = next((own for own in SECTIONS if name in data[own]), None)
            (data if section is None else data[section])[name] = value
            for stage in data["stages"]:
                own = stage if section is None else stage.get(section, {})
                if name == "teacher" and any(map(stage_number, own.get(name, ()))):
                    continue
                own.pop(name, None)
        return parse(DistillRecipe, data, source=source)

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, all settings included."""
        with atomic_file(path) as temporary:
            temporary.write_text(_yaml(dataclasses.asdict(self)), encoding="utf-8")


SECTIONS = tuple(
    item.name for item in dataclasses.fields(DistillRecipe) if dataclasses.is_dataclass(item.type)
)
_SAME: Any = object()  # a setting that a stage does not change


def _stage_settings() -> type:
    """Return a dataclass with the settings that a stage may change, each of which may be absent."""
    return _partial(DistillRecipe, without=("start", "stages"))


def _partial(kind: type, without: tuple[str, ...] = ()) -> type:
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [item.name for item in dataclasses.fields(kind) if item.name not in without]
    fields = [
        (name, _partial(hints[name]) if name in SECTIONS else hints[name], field(default=_SAME))
        for name in names
    ]
    return dataclasses.make_dataclass(f"Stage{kind.__name__}", fields, frozen=True, kw_only=True)


def _given(made: Any) -> dict[str, Any]:
    """Return what is there of a dataclass of `_partial`."""
    found = {item.name: getattr(made, item.name) for item in dataclasses.fields(made)}
    return {
        name: _given(value) if name in SECTIONS else value
        for name, value in found.items()
        if value is not _SAME
    }


def stage_number(teacher: str) -> int | None:
    """Return N of a teacher that is the student of stage N; None of any other."""
    found = _STAGE.fullmatch(teacher)
    return int(found[1]) if found else None


def _wrong_teachers(teachers: tuple[str, ...], stage: int) -> str:
    """Say which teachers of a stage are students that are not there yet."""
    late = [name for name in teachers if (stage_number(name) or 0) >= stage]
    if not late:
        return ""
    known = ", ".join(f"stage-{number}" for number in range(1, stage)) or "none before the first"
    return f"teacher: {', '.join(late)} is no stage before this one (there is {known})"


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def recipe_text(name: str) -> str:
    """Return the YAML of a recipe that comes with the package, with its comments.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in recipe_names():
        raise unknown_name_error("recipe", name, recipe_names(), "a .yaml file")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str) -> DistillRecipe:
    """Read a recipe by its name, or from a file if it looks like a path.

    Raises:
        ConfigError: no such name or file, or a file that is not valid: the message lists every
            mistake.
    """
    if name_or_path.lower().endswith((".yaml", ".yml")) or "/" in name_or_path:
        return read_yaml(DistillRecipe, Path(name_or_path))
    recipe_text(name_or_path)
    return read_yaml(DistillRecipe, _FOLDER / f"{name_or_path}.yaml")


def _yaml(data: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(_plain(data), sort_keys=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    """Return tuples as lists, which YAML has."""
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, tuple) else value
