"""The SQLite file of an outbox: its tables, and one transaction at a time.

The journal is a write-ahead log with `synchronous=FULL`: every commit is flushed to the disk.
NORMAL would flush only at checkpoints, so that a kill loses nothing, but a device whose power
is cut loses what it was told is kept (sqlite.org/pragma.html#pragma_synchronous).
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeclip.runtime.split.errors import OutboxError

_APPLICATION = 0x45434F42  # "ECOB": tells an outbox from other SQLite files
_VERSION = 1
_PAUSE_S = 0.01
_MEND = "choose another name, or delete it"
_SCHEMA = f"""
CREATE TABLE entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    json_length INTEGER,
    size INTEGER NOT NULL,
    created REAL NOT NULL,
    expires REAL NOT NULL,
    failures INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL
);
CREATE INDEX entries_by_kind ON entries (kind, number, size);
CREATE INDEX entries_by_end ON entries (expires);
CREATE TABLE sent (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, expires REAL NOT NULL);
CREATE TABLE counts (what TEXT PRIMARY KEY, value INTEGER NOT NULL);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""


class OutboxStore:
    """A connection to the file, for all threads of a process.

    Args:
        path: made if it is missing, for the owner's eyes only: it holds pictures.
        busy_s: how long to wait for another process that writes.

    Raises:
        OutboxError: the file cannot be made, or is something else.
    """

    def __init__(self, path: Path, busy_s: float) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=busy_s, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(busy_s)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the connection; what the block did is on the disk once it ended well, or undone.

        Raises:
            OutboxError: the file cannot be written, such as on a full disk, or was closed.
        """
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for a single query.

        Raises:
            OutboxError: the file cannot be read, or was closed.
        """
        with self._lock, self._explained():
            yield self._connection

    def _prepare(self, busy_s: float) -> None:
        self._begin_log(busy_s)
        self._value("PRAGMA synchronous = FULL")
        self._value("PRAGMA journal_size_limit = 1048576")
        self._value("BEGIN IMMEDIATE")  # two processes may be making it
        if self._value("SELECT count(*) FROM sqlite_master") == 0:
            for statement in _SCHEMA.split(";"):
                self._value(statement)
        found = self._value("PRAGMA application_id"), self._value("PRAGMA user_version")
        if found != (_APPLICATION, _VERSION):
            raise OutboxError(f"{self.path} is no outbox of this version: {_MEND}")
        self._value("COMMIT")

    def _begin_log(self, busy_s: float) -> None:
        """Turn the write-ahead log on; SQLite does not wait for others by itself here."""
        end = time.monotonic() + busy_s
        while True:
            try:
                self._value("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(_PAUSE_S)

    def _value(self, statement: str) -> object:
        row = self._connection.execute(statement).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutboxError(f"outbox {self.path}: {error.strerror or error}") from error
        except sqlite3.OperationalError as error:  # locked, a full disk, no permission
            raise OutboxError(f"outbox {self.path}: {error}") from error
        except sqlite3.ProgrammingError:
            raise OutboxError(f"outbox {self.path} was closed: open it anew") from None
        except sqlite3.DatabaseError as error:
            raise OutboxError(f"outbox {self.path} cannot be read ({error}): {_MEND}") from error
