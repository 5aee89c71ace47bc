"""What a search has found, kept in a folder: a rerun goes on where the last one stopped.

One JSON file for each record, written whole as soon as it is known, so that Ctrl-C, a kill
or a power cut loses only what was being measured. A file's name is the hash of all that the
record depends on: another graph, other data, bounds, device or version is another name, and
what is there of them stays for when they come back.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.json_record import JsonRecord

_VERSION = 3  # of how points are made and measured: a change counts it up

Made = TypeVar("Made", bound=JsonRecord)


class PointStore:
    """The records of one tower on one device, judged on the same data by the same bounds.

    Args:
        folder: where the files are.
        identity: everything beside the config that a point depends on.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def find(self, kind: type[Made], what: str) -> Made | None:
        """Return a record that is there; None if there is none, or none readable.

        Args:
            kind: its class, whose name is the beginning of the file's.
            what: tells it from others of its kind.
        """
        try:
            return kind.load(self._path(kind, what))
        except ConfigError:
            return None  # of another version, perhaps: it is made again

    def remember(self, kind: type[Made], what: str, make: Callable[[], Made]) -> Made:
        """Return a record that is there, or make it and keep it; for `kind` and `what` see `find`.

        Raises:
            InputError: the file cannot be written.
        """
        found = self.find(kind, what)
        if found is None:
            found = make()
            found.save(self._path(kind, what))
        return found

    def _path(self, kind: type[JsonRecord], what: str) -> Path:
        name = hashlib.sha256(f"{_VERSION}\n{self._identity}\n{what}".encode()).hexdigest()[:20]
        return self._folder / f"{kind.__name__.lower()}-{name}.json"
