"""What a search has found, kept in a folder: a rerun goes on where the last one stopped.

One JSON file for each point, written whole as soon as it is known, so that Ctrl-C, a kill
or a power cut loses only what was being measured. A file's name is the hash of all that the
point depends on: another graph, other data, bounds, device or version is another name, and
what is there of them stays for when they come back.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edgeclip.export.quantizing.config import Config
from edgeclip.export.quantizing.point import Point, key_of, point_from_data, point_to_data
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.json_record import JsonRecord

_VERSION = 2  # of how points are made and measured: a change counts it up

Made = TypeVar("Made", bound=JsonRecord)


class PointStore:
    """The points of one tower on one device, judged on the same data by the same bounds.

    Args:
        folder: where the files are; it is made.
        identity: everything beside the config that a point depends on.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def get(self, config: Config) -> Point | None:
        """Return what is known of a config; None if nothing, or nothing readable."""
        data = self._read(self._path("point", key_of(config)))
        try:
            return None if data is None else point_from_data(data, source="point")
        except ConfigError:
            return None  # of another version: it is measured again

    def put(self, point: Point) -> None:
        """Keep a point.

        Raises:
            InputError: the file cannot be written.
        """
        text = json.dumps(point_to_data(point), indent=1, allow_nan=False)
        with atomic_file(self._path("point", point.key)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def remember(self, kind: type[Made], what: str, make: Callable[[], Made]) -> Made:
        """Return a record that is there, or make it and keep it.

        Args:
            kind: its class, whose name is the beginning of the file's.
            what: tells it from others of its kind.
            make: called if there is none, or none readable.

        Raises:
            InputError: the file cannot be written.
        """
        path = self._path(kind.__name__.lower(), what)
        try:
            return kind.load(path)
        except ConfigError:
            made = make()
        made.save(path)
        return made

    def _path(self, kind: str, what: str) -> Path:
        parts = f"{_VERSION}\n{self._identity}\n{what}"
        return self._folder / f"{kind}-{hashlib.sha256(parts.encode()).hexdigest()[:20]}.json"

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
