"""Read dataclasses from YAML and JSON strictly: types, bounds, all mistakes in one message."""

import dataclasses
import difflib
import functools
import json
import math
import operator
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from annotated_types import Ge, Gt, Le, Lt, Predicate

from edgeclip.runtime.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails


_FINITE = Predicate(math.isfinite)  # `IsFinite[float]`
# What bounds a number in an annotation: the key that pydantic reports, words, the test.
_BOUNDS: dict[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Ge: ("ge", "at least", operator.ge),
    Gt: ("gt", "above", operator.gt),
    Le: ("le", "at most", operator.le),
    Lt: ("lt", "below", operator.lt),
}


def check_bounds(made: object) -> None:
    """Check each field of a dataclass against the bounds in its type: `Annotated[int, Ge(1)]`.

    `Ge`, `Gt`, `Le`, `Lt` and `IsFinite` of `annotated_types` are what pydantic's `Field` keeps,
    but take no tenth of a second to import. None passes; NaN and infinity pass no bound.

    Raises:
        ValueError: one message that names every field out of bounds.
    """
    mistakes = []
    # mypy does not see that a class is hashable.
    fields = _bounded_fields(type(made))  # type: ignore[arg-type]
    for name, marks in fields.items():
        value = getattr(made, name)
        if value is None:
            continue
        bounds = [(*_BOUNDS[type(mark)], dataclasses.astuple(mark)[0]) for mark in marks]
        if not math.isfinite(value) or not all(holds(value, end) for *_, holds, end in bounds):
            words = " and ".join(f"{word} {end:g}" for _, word, _, end in bounds)
            mistakes.append(f"{name} must be {words or 'a finite number'}, got {value}")
    if mistakes:
        raise ValueError("; ".join(mistakes))


@functools.cache
def _bounded_fields(kind: type) -> dict[str, list[Any]]:
    """The `Ge`, `Gt`, `Le` and `Lt` of each field that has any, or must be finite."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if any(type(mark) in _BOUNDS or mark == _FINITE for mark in marks):
            found[name] = [mark for mark in marks if type(mark) in _BOUNDS]
    return found


T = TypeVar("T")


def parse(kind: type[T], data: object, *, source: str) -> T:
    """Build a dataclass from plain data, refusing unknown keys and wrong types.

    Nothing is converted, with two exceptions: a list becomes a tuple, and a whole number
    is taken where a float is expected.

    Args:
        kind: the dataclass; nested dataclasses, `Literal`s, tuples and bounds are checked too.
        data: what a JSON or YAML parser returned.
        source: where it came from, for the message.

    Raises:
        ConfigError: one message that lists every mistake with its path. Checks that compare
            fields (`__post_init__`) run only if each field is valid by itself.
    """
    # pydantic takes a tenth of a second to import, and most runs read few files.
    from pydantic import ValidationError

    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected a mapping of keys to values")
    try:
        # Strict JSON mode takes a list for a tuple, and nothing else that is not exact.
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not plain data: {error}") from None
    try:
        value: T = _adapter(kind).validate_json(text)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors(include_url=False)]
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(lines)) from None
    return value


@functools.cache
def _adapter(kind: type[Any]) -> "TypeAdapter[Any]":
    """Return pydantic's validator of a dataclass; nested dataclasses inherit its configuration."""
    from pydantic import ConfigDict, TypeAdapter

    # pydantic takes the configuration of a dataclass from this attribute only.
    kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return TypeAdapter(kind)


def _describe(item: "ErrorDetails") -> str:
    path = ".".join(map(str, item["loc"])) or "(top)"
    if item["type"] == "unexpected_keyword_argument":
        return f"  {path}: unknown key"
    for key, word, _ in _BOUNDS.values():
        if key in item.get("ctx", {}):
            return f"  {path}: must be {word} {item['ctx'][key]:g}, got {item['input']}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] not in {"value_error", "missing"}:
        message += f", got {str(item['input'])[:60]!r}"
    return f"  {path}: {message}"


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(kind: type[T], path: Path) -> T:
    """Read one dataclass from a YAML file.

    Raises:
        ConfigError: missing or unreadable file, bad YAML, or any mistake `parse` finds.
    """
    try:
        # A subclass of SafeLoader: plain data only, no objects.
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    return parse(kind, data, source=str(path))


Folder = Literal["devices", "links", "workloads"]
_ROOT = Path(__file__).parents[2] / "profiles"  # edgeclip/profiles, whose YAML files come with it


def builtin_names(folder: Folder) -> tuple[str, ...]:
    """Return the names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in (_ROOT / folder).glob("*.yaml")))


def load_profile(
    kind: type[T], folder: Folder, name_or_path: str | Path, extra_names: tuple[str, ...] = ()
) -> T:
    """Read a profile by its name, or from a file if given a `Path` or a text that looks like one.

    Args:
        kind: the dataclass to read.
        folder: the folder of the built-in profiles of this kind.
        name_or_path: for example `"wifi"`, `"my/link.yaml"` or `Path("link.yaml")`.
        extra_names: further names that the caller accepts, for the error message.

    Raises:
        ConfigError: no such name or file, or a file that is not valid.
    """
    if isinstance(name_or_path, Path) or _looks_like_path(name_or_path):
        return read_yaml(kind, Path(name_or_path))
    names = builtin_names(folder)
    if name_or_path in names:
        return read_yaml(kind, _ROOT / folder / f"{name_or_path}.yaml")
    known = (*extra_names, *names)
    raise unknown_name_error(folder.removesuffix("s"), name_or_path, known, "a .yaml file")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'NAME'?)" of the most similar known name; "" if none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name_error(kind: str, name: str, known: Sequence[str], file: str) -> ConfigError:
    """Return the error that no `kind` has this name; it suggests a similar one, or a `file`."""
    hint = did_you_mean(name, known)
    return ConfigError(
        f"no {kind} is named {name!r}{hint}; known names: {', '.join(known)}; or give the path "
        f"of {file}"
    )


def _looks_like_path(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml")) or "/" in text or "\\" in text
