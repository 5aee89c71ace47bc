"""Read and write values of a recipe's settings as options spell them: SETTING=VALUE,VALUE."""

import dataclasses
import re
import typing
from typing import Any

import yaml

from edgeclip.compress.train.recipe import SECTIONS, DistillRecipe
from edgeclip.runtime.errors import InputError

_OUTSIDE_OF_LISTS = re.compile(r",(?![^\[]*\])")


def settings_of(recipe: DistillRecipe) -> dict[str, tuple[str | None, Any, Any]]:
    """Return section, type with its bounds, and value of every setting, by its name."""
    found = {}
    for section in (None, *SECTIONS):
        made: Any = recipe if section is None else getattr(recipe, section)
        hints = typing.get_type_hints(type(made), include_extras=True)
        for item in dataclasses.fields(made):
            if item.name not in (*SECTIONS, "stages"):
                found[item.name] = (section, hints[item.name], getattr(made, item.name))
    return found


def spelled(value: Any) -> str:
    """Return a value as it is written behind `SETTING=`: a list as [24,48]."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def split_values(text: str) -> list[str]:
    """Divide a text at its commas, but for those of a list in brackets."""
    return _OUTSIDE_OF_LISTS.split(text)


def read_value(text: str, hint: Any) -> Any:
    """Read a value of a setting of this type; one item is enough for a list of one.

    Raises:
        InputError: it is no value in YAML.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{text} cannot be read; a list is written [1,2]") from error
    kinds = (typing.get_origin(kind) for kind in (hint, *typing.get_args(hint)))
    if tuple in kinds and value is not None and not isinstance(value, list):
        return [value]
    return value
