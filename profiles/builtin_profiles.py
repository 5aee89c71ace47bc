"""Finding a profile by its built-in name or by the path of the user's own YAML file."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.schema import read_yaml

T = TypeVar("T")
Folder = Literal["devices", "links", "traffic", "workloads"]
_ROOT = Path(__file__).parent


def builtin_names(folder: Folder) -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in (_ROOT / folder).glob("*.yaml")))


def load_profile(
    kind: type[T], folder: Folder, name_or_path: str | Path, extra_names: tuple[str, ...] = ()
) -> T:
    """Read a profile: a `Path`, or a text that looks like one, is a file; else a name.

    Args:
        kind: the dataclass to read.
        folder: where the built-in profiles of this kind are.
        name_or_path: for example `"wifi"`, `"my/link.yaml"` or `Path("link.yaml")`.
        extra_names: further names that the caller knows, for the message.

    Raises:
        ConfigError: no such name or file, or a file that is not valid.
    """
    if isinstance(name_or_path, Path) or _looks_like_path(name_or_path):
        return read_yaml(kind, Path(name_or_path))
    names = builtin_names(folder)
    if name_or_path in names:
        return read_yaml(kind, _ROOT / folder / f"{name_or_path}.yaml")
    known = (*extra_names, *names)
    raise unknown_name(folder.removesuffix("s"), name_or_path, known, "a .yaml file")


def unknown_name(kind: str, name: str, known: Sequence[str], file: str) -> ConfigError:
    """The error that no `kind` has this name; `file` says what a path may lead to instead."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return ConfigError(
        f"no {kind} is named {name!r}{hint}; known names: {', '.join(known)}; or give the path "
        f"of {file}"
    )


def _looks_like_path(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml")) or "/" in text or "\\" in text
