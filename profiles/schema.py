"""Strict reading of frozen dataclasses from YAML and JSON: all mistakes in one message."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from edgeclip.profiles.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")


def parse(kind: type[T], data: object, *, source: str) -> T:
    """Turn plain data into `kind`, a dataclass, refusing unknown keys and wrong types.

    Nothing is converted, with two exceptions: a list becomes a tuple, and a whole number
    is taken where a float is expected.

    Args:
        kind: a dataclass; nested dataclasses, `Literal`s, tuples and `Range`s are
            followed.
        data: what a JSON or YAML parser returned.
        source: where it came from, for the message.

    Raises:
        ConfigError: one message that lists every mistake with its path. Rules that
            compare fields (`__post_init__`) are looked at once the fields are sound.
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
        value: T = _adapter(kind).validate_json(text)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors(include_url=False)]
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(lines)) from None
    return value


def _adapter(kind: type[Any]) -> "TypeAdapter[Any]":
    """Pydantic's validator of a dataclass; nested dataclasses inherit its configuration."""
    from pydantic import ConfigDict, TypeAdapter

    # pydantic takes the configuration of a dataclass from this attribute only.
    kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return TypeAdapter(kind)


def _describe(item: "ErrorDetails") -> str:
    path = ".".join(map(str, item["loc"])) or "(top)"
    if item["type"] == "unexpected_keyword_argument":
        return f"  {path}: unknown key"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] not in {"value_error", "missing"}:
        message += f", got {str(item['input'])[:60]!r}"
    return f"  {path}: {message}"


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
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
