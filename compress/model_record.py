"""`edgeclip-model.json`: what EdgeCLIP records beside the weights of a model that it saved."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.schema import parse

# Only EdgeCLIP writes this file, so a directory that holds it may be replaced by a model.
MARKER = "edgeclip-model.json"
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The embedding space that the weights live in: a student's is its teacher's.

    `space` is a fingerprint as `dual_encoder.space_fingerprint` gives it, 64 hex digits.
    """

    schema_version: Literal[1]
    space: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.space):
            raise ValueError(f"space must be 64 hexadecimal digits, got {self.space[:70]!r}")


def write_record(folder: Path, space: str) -> None:
    """Record `space` in a directory of a model."""
    text = json.dumps(asdict(ModelRecord(1, space)), indent=2) + "\n"
    (folder / MARKER).write_text(text, encoding="utf-8")


def recorded_space(folder: Path) -> str | None:
    """The space recorded in a directory; None where EdgeCLIP did not save the model.

    Raises:
        ConfigError: the record is damaged, or of another version.
    """
    path = folder / MARKER
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return parse(ModelRecord, data, source=str(path)).space
