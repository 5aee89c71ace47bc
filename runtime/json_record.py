"""JsonRecord: a dataclass that is kept as a JSON file with a schema version, or sent as one."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.schema import parse
from edgeclip.runtime.files import atomic_file


class JsonRecord:
    """Base of frozen dataclasses with a JSON round trip.

    Attributes:
        SCHEMA_VERSION: a change of the fields counts it up; the file's first key.
        WHAT: what the file is called in messages.
        MEND: what to do where the file is damaged, or of another version.
    """

    __slots__ = ()
    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str]
    MEND: ClassVar[str]

    def to_json(self) -> str:
        """This record as indented JSON; `from_json` gives an equal one back."""
        # A subclass is a dataclass, which this base cannot be: it has no fields.
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        data = {"schema_version": self.SCHEMA_VERSION, **fields}
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """Read what `to_json` wrote; `source` names it in messages.

        Raises:
            ConfigError: not JSON, another schema version, or wrong fields.
        """
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON ({error}): {cls.MEND}") from None
        version = data.pop("schema_version", None) if isinstance(data, dict) else None
        if type(version) is not int or version != cls.SCHEMA_VERSION:
            raise ConfigError(
                f"{source}: schema {version!r} of {cls.WHAT} is not {cls.SCHEMA_VERSION}: "
                f"{cls.MEND}, or use the version of edgeclip that wrote it"
            )
        return parse(cls, data, source=source)

    def save(self, path: Path) -> None:
        """Write `to_json` to `path`, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ConfigError: missing, unreadable or invalid file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text: {error}") from None
        return cls.from_json(text, source=str(path))
