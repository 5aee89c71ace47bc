"""Name files by their content, without reading again what has not changed."""

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.files import cache_root, sha256_file
from edgeclip.runtime.errors import InputError

if TYPE_CHECKING:
    import sqlite3

_log = logging.getLogger(__name__)

# A file that changes again within the tick of its clock keeps its times: FAT counts in 2 s.
_SETTLED_NS = 2_500_000_000
_TABLE = (
    "CREATE TABLE IF NOT EXISTS files "
    "(path BLOB PRIMARY KEY, state TEXT NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID"
)


class ContentHashes:
    """SHA-256 of files' bytes; those found before are kept in this user's cache.

    A hash is taken from there while size, inode and both times (of content and of inode) are the
    same, which no change of the bytes leaves so. Without a usable cache every file is read.
    """

    _kept: "sqlite3.Connection | None" = None
    _error: type[Exception]

    def __init__(self) -> None:
        try:
            import sqlite3  # which the Python of a small device may lack

            self._error = sqlite3.Error
            folder = cache_root()
            folder.mkdir(parents=True, exist_ok=True)
            self._kept = sqlite3.connect(
                folder / "content-hashes.sqlite",
                isolation_level=None,
                check_same_thread=False,
            )
            self._kept.execute("PRAGMA journal_mode=WAL")  # a commit need not wait for the disk
            self._kept.execute("PRAGMA synchronous=NORMAL")
            self._kept.execute(_TABLE)
        except Exception as error:  # no home, a read-only or full disk, a damaged file
            self._give_up(error)

    def of(self, path: Path) -> bytes:
        """Return the SHA-256 of a file's bytes.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            before = _state(path)
            name = os.fsencode(os.path.abspath(path))
            found = self._find(name, before)
            if found is None:
                found = bytes.fromhex(sha256_file(path))
                if _state(path) == before and _is_settled(path):
                    self._keep(name, before, found)
        except PermissionError as error:
            raise InputError(f"{path} may not be read: check its permissions") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} cannot be read: {reason}") from error
        return found

    def _find(self, name: bytes, state: str) -> bytes | None:
        if self._kept is None:
            return None
        try:
            query = "SELECT sha256 FROM files WHERE path = ? AND state = ?"
            row = self._kept.execute(query, (name, state)).fetchone()
        except self._error as error:
            self._give_up(error)
            return None
        return None if row is None else bytes(row[0])

    def _keep(self, name: bytes, state: str, found: bytes) -> None:
        if self._kept is None:
            return
        try:
            self._kept.execute("REPLACE INTO files VALUES (?, ?, ?)", (name, state, found))
        except self._error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _log.debug("content hashes are not kept: %s", error)
        self._kept = None


def _state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def _is_settled(path: Path) -> bool:
    status = path.stat()
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
