"""The files of the engines that were built on this machine, or tried on it.

Each engine has a NAME.engine and a NAME.json that vouches for it and is written last;
NAME.timing and NAME.runtime-cache save time and may be lost.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeclip.profiles.errors import EdgeClipError
from edgeclip.profiles.schema import parse
from edgeclip.runtime.engine_key import ENGINE_FOLDER, ENGINE_SUFFIX, EngineKey
from edgeclip.runtime.files import atomic_file, cache_root
from edgeclip.runtime.manifest import GateRecord

ENTRY_VERSION = 1
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """What is known of an engine on this machine.

    Attributes:
        schema_version: `ENTRY_VERSION` of the software that wrote it.
        key: what the engine was built from and for.
        sha256: of the engine.
        gates: bounds that it met here.
        failed: why it must not be used, such as the bounds that it missed; "" if it may be.
        seconds: how long the build took; 0 for an engine that came with a bundle.
        created: ISO 8601, UTC.
    """

    schema_version: int
    key: EngineKey
    sha256: str
    gates: tuple[GateRecord, ...]
    failed: str
    seconds: float
    created: str

    def __post_init__(self) -> None:
        if self.schema_version != ENTRY_VERSION:
            raise ValueError(f"schema_version must be {ENTRY_VERSION}")


class EngineCache:
    """A folder of engines, shared by all processes of a user.

    Args:
        folder: made when it is needed.
        say: told in one line why something in it cannot be used.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self._folder = folder
        self._say = say

    def path(self, stem: str, suffix: str = ENGINE_SUFFIX) -> Path:
        """Where a file of an engine lies."""
        return self._folder / f"{stem}{suffix}"

    def entry(self, stem: str, key: EngineKey) -> EngineEntry | None:
        """What is known of an engine; None if nothing is, or what is there is of no use."""
        path = self.path(stem, ".json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            entry = parse(EngineEntry, data, source=str(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, EdgeClipError) as error:
            self._say(f"{path} cannot be used ({' '.join(str(error).split())})")
            return None
        if entry.key != key:
            self._say(f"{path} is about another engine than its name says")
            return None
        return entry

    def content(self, stem: str, entry: EngineEntry) -> bytes | None:
        """The engine that an entry vouches for; None if it is not there or was altered."""
        path = self.path(stem)
        try:
            content = path.read_bytes()
        except OSError as error:
            self._say(f"{path} cannot be read ({error.strerror})")
            return None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            self._say(f"{path} is not what {path.with_suffix('.json').name} says")
            return None
        return content

    def timing(self, stem: str) -> bytes | None:
        """The timing cache of an earlier build, if there is one."""
        try:
            return self.path(stem, ".timing").read_bytes()
        except OSError:
            return None

    def write(
        self,
        stem: str,
        entry: EngineEntry,
        *,
        content: bytes | None = None,
        timing: bytes | None = None,
    ) -> None:
        """Keep an engine and what is known of it. A disk that refuses is said, not raised.

        Without `content` no engine is kept, and an earlier one is deleted.
        """
        path = self.path(stem)
        try:
            self.path(stem, ".json").unlink(missing_ok=True)  # it vouches for the old engine
            if content is None:
                path.unlink(missing_ok=True)
            else:
                _write(path, content)
            if timing is not None:
                _write(self.path(stem, ".timing"), timing)
            text = json.dumps(dataclasses.asdict(entry), indent=2, allow_nan=False) + "\n"
            _write(self.path(stem, ".json"), text.encode())
        except (OSError, EdgeClipError) as error:
            self._say(f"{path} cannot be kept, so that the next start builds it anew ({error})")

    @contextmanager
    def lock(self, stem: str) -> Iterator[None]:
        """Keep other processes from building the same engine; a killed one lets go.

        Where files cannot be locked, two may build: what they write is still whole.
        """
        descriptor = _open_lock(self.path(stem, ".lock"))
        if descriptor is None:
            yield
            return
        try:
            _wait_for(descriptor, lambda: self._say(f"another process is building {stem}: waiting"))
            yield
        finally:
            os.close(descriptor)


def engine_folder() -> Path:
    """Where engines are kept: the folder `engines` of `cache_root()`."""
    return cache_root() / ENGINE_FOLDER


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def _open_lock(path: Path) -> int | None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None


def _wait_for(descriptor: int, say_waiting: Callable[[], None]) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say_waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks
