"""A bounded queue of requests on disk (SQLite), for a server that cannot be reached."""

import dataclasses
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import OutboxError
from edgeclip.runtime.split.retries_and_breaker import Clock
from edgeclip.runtime.wire.messages import (
    IDEMPOTENCY_KEY,
    JSON_LENGTH_HEADER,
    InferRequest,
    decode_request,
    encode_request,
    json_length,
)

EntryKind = Literal["escalation", "telemetry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request in the outbox.

    Attributes:
        key: idempotency key, the same for two requests that must not both take effect.
        kind: telemetry is dropped to make room for escalations, never the other way round.
        model: the server's model.
        body: the request as `encode_request` wrote it.
        json_length: where the JSON of the body ends; None if it is JSON alone.
        created: seconds since 1970.
        failures: number of error responses.
    """

    key: str
    kind: EntryKind
    model: str
    body: bytes
    json_length: int | None
    created: float
    failures: int = 0

    @classmethod
    def of(cls, key: str, request: InferRequest, kind: EntryKind, created: float) -> "Entry":
        """Make an entry of a request.

        Raises:
            InputError: the key is empty.
            WireError: the request holds what the protocol cannot carry.
        """
        if not key:
            raise InputError("an outbox entry needs a key: give what makes the request unique")
        headers, body = encode_request(request)
        return cls(
            key=key,
            kind=kind,
            model=request.model,
            body=body,
            json_length=json_length(headers.get(JSON_LENGTH_HEADER)),
            created=created,
        )

    def request(self) -> InferRequest:
        """Return the request, with the key as its idempotency key and id.

        Raises:
            WireError: the body was damaged.
        """
        found = decode_request(self.model, self.body, self.json_length)
        return InferRequest(
            model=found.model,
            inputs=found.inputs,
            parameters={**found.parameters, IDEMPOTENCY_KEY: self.key},
            id=self.key,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRules:
    """Capacity of an outbox, and lifetime of its entries.

    Attributes:
        max_bytes: largest size of all bodies together.
        max_entries: waiting entries; as many keys of sent ones are remembered.
        lives_s: seconds after which an entry expires, and a sent key may be used again.
        busy_s: how long to wait for another process that writes.

    Raises:
        InputError: a value that is not above 0.
    """

    max_bytes: int = 64 << 20
    max_entries: int = 10_000
    lives_s: float = 86_400.0
    busy_s: float = 5.0

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_entries, self.lives_s, self.busy_s) <= 0:
            raise InputError(f"an outbox cannot have these rules: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxCounts:
    """Numbers of waiting, sent and lost entries since the outbox was created.

    Attributes:
        escalations, telemetry: waiting entries.
        waiting_bytes: size of their bodies.
        sent: answered by the server.
        dropped_escalations, dropped_telemetry: removed to make room.
        expired: too old to be sent.
        refused: removed because the server rejects them.
    """

    escalations: int = 0
    telemetry: int = 0
    waiting_bytes: int = 0
    sent: int = 0
    dropped_escalations: int = 0
    dropped_telemetry: int = 0
    expired: int = 0
    refused: int = 0


_APPLICATION = 0x45434F42  # "ECOB": distinguishes an outbox from other SQLite files
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
    """The SQLite file of an outbox, for all threads of a process.

    Args:
        path: created if missing, readable by its owner only: it holds pictures.
        busy_s: how long to wait for another process that writes.

    Raises:
        OutboxError: the file cannot be created, or is not an outbox.
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
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for a transaction, which is on the disk when the block has ended.

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
        """Yield the connection for a single query.

        Raises:
            OutboxError: the file cannot be read, or was closed.
        """
        with self._lock, self._explained():
            yield self._connection

    def _prepare(self, busy_s: float) -> None:
        self._begin_log(busy_s)
        self._value("PRAGMA synchronous = FULL")
        self._value("PRAGMA journal_size_limit = 1048576")
        self._value("BEGIN IMMEDIATE")  # two processes may be creating it
        if self._value("SELECT count(*) FROM sqlite_master") == 0:
            for statement in _SCHEMA.split(";"):
                self._value(statement)
        found = self._value("PRAGMA application_id"), self._value("PRAGMA user_version")
        if found != (_APPLICATION, _VERSION):
            raise OutboxError(f"{self.path} is not an outbox of this version: {_MEND}")
        self._value("COMMIT")

    def _begin_log(self, busy_s: float) -> None:
        """Turn on the write-ahead log; here SQLite does not wait for other processes itself."""
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


# The clock of a device without a battery starts in 1970, until it has reached a time server:
# entries of that time must not expire at once.
_CLOCK_IS_SET = 1_700_000_000.0
_NEVER = 1e12
_COLUMNS = "key, kind, model, json_length, body, created, failures"


class Outbox:
    """A bounded queue of requests in a SQLite file; threads and processes may share it.

    A request is on the disk when `put` returns, and stays until the server has answered it
    (`Replayer`), it expires, or there is no room: then the oldest telemetry is dropped first,
    and counted. A key that waits, or was sent lately, is not added again.

    Args:
        path: the file; created if missing, beside it a -wal and a -shm.
        rules: see `OutboxRules`.
        clock: seconds since 1970.

    Raises:
        OutboxError: the file cannot be created, or is not an outbox.
    """

    def __init__(
        self, path: str | Path, *, rules: OutboxRules | None = None, clock: Clock = time.time
    ) -> None:
        self.rules = rules or OutboxRules()
        self._clock = clock
        self._store = OutboxStore(Path(path), self.rules.busy_s)
        self._has_come = threading.Event()

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._store.path

    def close(self) -> None:
        """Close the file; waiting entries stay in it."""
        self._store.close()

    def put(self, key: str, request: InferRequest, *, kind: EntryKind = "escalation") -> bool:
        """Store a request to be sent later.

        Args:
            key: idempotency key, the same for requests that must not both take effect.
            request: what to send; its id is replaced by the key.
            kind: see `Entry`.

        Returns:
            False if there is no room for the telemetry; True if it waits or was sent.

        Raises:
            InputError: the key is empty, or the request larger than the whole outbox may be.
            OutboxError: the file cannot be written.
            WireError: the request holds what the protocol cannot carry.
        """
        now = self._clock()
        entry = Entry.of(key, request, kind, now)
        if len(entry.body) > self.rules.max_bytes:
            raise InputError(
                f"a request of {len(entry.body)} bytes does not fit into an outbox of "
                f"{self.rules.max_bytes}: make it smaller, or the outbox larger"
            )
        with self._store.transaction() as connection:
            self._expire(connection, now)
            if _is_known(connection, key):
                return True
            if not self._make_room(connection, entry):
                return False
            _insert(connection, entry, self._end(now))
        self._has_come.set()
        return True

    def oldest(self) -> Entry | None:
        """Return the entry to be sent next; None if there is none.

        Raises:
            OutboxError: the file cannot be read.
        """
        with self._store.reading() as connection:
            query = f"SELECT {_COLUMNS} FROM entries WHERE expires > ? ORDER BY number LIMIT 1"
            row = connection.execute(query, (self._clock(),)).fetchone()
        return None if row is None else _entry(row)

    def confirm(self, key: str) -> None:
        """Remove an entry that the server has answered.

        Raises:
            OutboxError: the file cannot be written.
        """
        now = self._clock()
        with self._store.transaction() as connection:
            if _take_out(connection, key):
                _count(connection, "sent", 1)
            connection.execute(
                "INSERT OR IGNORE INTO sent (key, expires) VALUES (?, ?)",
                (key, self._end(now)),
            )
            connection.execute(
                "DELETE FROM sent WHERE number <= (SELECT max(number) FROM sent) - ?",
                (self.rules.max_entries,),
            )

    def failed(self, key: str, *, max_failures: int) -> None:
        """Count an error response to an entry; after `max_failures` of them, remove the entry.

        Raises:
            OutboxError: the file cannot be written.
        """
        with self._store.transaction() as connection:
            connection.execute("UPDATE entries SET failures = failures + 1 WHERE key = ?", (key,))
            query = "DELETE FROM entries WHERE key = ? AND failures >= ?"
            _count(connection, "refused", connection.execute(query, (key, max_failures)).rowcount)

    def counts(self) -> OutboxCounts:
        """Return the numbers of waiting, sent and lost entries.

        Raises:
            OutboxError: the file cannot be written.
        """
        with self._store.transaction() as connection:
            self._expire(connection, self._clock())
            query = "SELECT kind, count(*), sum(size) FROM entries GROUP BY kind"
            waiting = {kind: (count, size) for kind, count, size in connection.execute(query)}
            past = dict(connection.execute("SELECT what, value FROM counts"))
        escalations, telemetry = (waiting.get(kind, (0, 0)) for kind in ("escalation", "telemetry"))
        return OutboxCounts(
            escalations=escalations[0],
            telemetry=telemetry[0],
            waiting_bytes=escalations[1] + telemetry[1],
            **past,
        )

    def wait(self, seconds: float) -> None:
        """Wait until this process puts an entry, at most `seconds`."""
        self._has_come.wait(seconds)
        self._has_come.clear()

    def _end(self, now: float) -> float:
        """Return when an entry of now expires."""
        return now + self.rules.lives_s if now > _CLOCK_IS_SET else _NEVER

    def _expire(self, connection: sqlite3.Connection, now: float) -> None:
        gone = connection.execute("DELETE FROM entries WHERE expires <= ?", (now,)).rowcount
        _count(connection, "expired", gone)
        connection.execute("DELETE FROM sent WHERE expires <= ?", (now,))

    def _make_room(self, connection: sqlite3.Connection, entry: Entry) -> bool:
        """Drop the oldest entries until `entry` fits; False if `entry` itself is dropped."""
        query = "SELECT count(*), coalesce(sum(size), 0) FROM entries"
        count, size = connection.execute(query).fetchone()
        too_many = count + 1 - self.rules.max_entries
        too_large = size + len(entry.body) - self.rules.max_bytes
        kinds: tuple[EntryKind, ...] = ("telemetry", "escalation")
        for kind in kinds[: 1 + (entry.kind == "escalation")]:
            rows = connection.execute(
                "SELECT number, size FROM entries WHERE kind = ? ORDER BY number", (kind,)
            ).fetchall()
            for number, size in rows:
                if too_many <= 0 and too_large <= 0:
                    return True
                connection.execute("DELETE FROM entries WHERE number = ?", (number,))
                _count(connection, _DROPPED[kind], 1)
                too_many, too_large = too_many - 1, too_large - size
        if too_many <= 0 and too_large <= 0:
            return True
        _count(connection, _DROPPED[entry.kind], 1)
        return False


_DROPPED: dict[EntryKind, str] = {
    "escalation": "dropped_escalations",
    "telemetry": "dropped_telemetry",
}


def _is_known(connection: sqlite3.Connection, key: str) -> bool:
    query = "SELECT 1 FROM entries WHERE key = ? UNION ALL SELECT 1 FROM sent WHERE key = ?"
    return connection.execute(query, (key, key)).fetchone() is not None


def _insert(connection: sqlite3.Connection, entry: Entry, expires: float) -> None:
    values = dataclasses.asdict(entry) | {"size": len(entry.body), "expires": expires}
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT INTO entries ({names}) VALUES ({marks})", values)


def _entry(row: tuple[Any, ...]) -> Entry:
    key, kind, model, json_length, body, created, failures = row
    return Entry(
        key=key,
        kind=kind,
        model=model,
        json_length=json_length,
        body=body,
        created=created,
        failures=failures,
    )


def _take_out(connection: sqlite3.Connection, key: str) -> bool:
    return connection.execute("DELETE FROM entries WHERE key = ?", (key,)).rowcount > 0


def _count(connection: sqlite3.Connection, what: str, more: int) -> None:
    if more:
        connection.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (what) DO UPDATE SET value = value + ?",
            (what, more, more),
        )
