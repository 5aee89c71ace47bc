"""Recipes: all settings of a distillation in one YAML file."""

import dataclasses
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

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillRecipe:
    """All settings of `edgeclip distill` but for where its files lie.

    Attributes:
        teacher: directories or hub ids; the student lives in the space of the first.
        data: sources of pictures, see `--data`.
        count: number of built-in scenes, where those are a source.
        keep: list of the pictures to train on, which `edgeclip data-report` writes.
        views: augmented views of each picture; None for those of an existing cache, else one.
        held_out: pictures that are not trained on; None for a tenth, at most `MOST_HELD_OUT`.
        start: directory or hub id of a dual encoder to start from in place of a part of the
            teacher.
        student: sizes of the student.
        losses: the weight of each loss.
        training: steps, rates and the like.
    """

    teacher: tuple[str, ...] = (BUILT_IN,)
    data: tuple[str, ...] = (EMOJI,)
    count: Annotated[int, Ge(0)] = 32_768
    keep: str | None = None
    views: Annotated[int | None, Ge(1)] = None
    held_out: Annotated[int | None, Ge(0)] = None
    start: str | None = None
    student: StudentShape = field(default_factory=StudentShape)
    losses: LossWeights = field(default_factory=LossWeights)
    training: TrainSettings = field(default_factory=TrainSettings)

    def replaced(self, given: Mapping[str, object], *, source: str) -> "DistillRecipe":
        """Return the recipe with other values of some settings, by their names in any section.

        Raises:
            ConfigError: one message that lists every value that is wrong; `source` says where they
                came from.
        """
        data: dict[str, Any] = dataclasses.asdict(self)
        for name, value in given.items():
            section = next((own for own in SECTIONS if name in data[own]), None)
            (data if section is None else data[section])[name] = value
        return parse(DistillRecipe, data, source=source)

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, all settings included."""
        with atomic_file(path) as temporary:
            temporary.write_text(_yaml(dataclasses.asdict(self)), encoding="utf-8")


SECTIONS = tuple(
    item.name for item in dataclasses.fields(DistillRecipe) if dataclasses.is_dataclass(item.type)
)


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
    return list(value) if isinstance(value, tuple) else value
