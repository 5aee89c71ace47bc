"""Outbox: requests that wait on the disk until the server can be reached."""

import dataclasses
import sqlite3
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.deadline import Clock
from edgeclip.runtime.split.outbox_entry import Entry, EntryKind, OutboxCounts, OutboxRules
from edgeclip.runtime.split.outbox_store import OutboxStore
from edgeclip.runtime.wire.messages import InferRequest

# A device without a battery for its clock begins in 1970, until it has reached a time server;
# what was put before must not be too old at once.
_CLOCK_IS_SET = 1_700_000_000.0
_NEVER = 1e12
_COLUMNS = "key, kind, model, json_length, body, created, failures"


class Outbox:
    """A bounded queue in a SQLite file; several threads and processes may share it.

    What was put is on the disk when `put` returns, and stays until the server has confirmed it
    (`Replayer`), it is too old, or there is no room: then the oldest telemetry goes first, and
    what goes is counted. A key that waits, or was sent a while ago, is not taken again.

    Args:
        path: the file; made if it is missing, beside it a -wal and a -shm.
        rules: see `OutboxRules`.
        clock: seconds since 1970.

    Raises:
        OutboxError: the file cannot be made, or is something else.
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
        """Let go of the file; what waits stays in it."""
        self._store.close()

    def put(self, key: str, request: InferRequest, *, kind: EntryKind = "escalation") -> bool:
        """Keep a request to be sent later.

        Args:
            key: the same for requests that must not both take effect.
            request: what to send; its id is replaced by the key.
            kind: see `Entry`.

        Returns:
            False for telemetry for which there is no room; True if it waits or was sent.

        Raises:
            InputError: the key is empty, or the request larger than the whole outbox may be.
            OutboxError: the file cannot be written.
            WireError: the request holds what the protocol cannot carry.
        """
        now = self._clock()
        entry = Entry.of(key, request, kind, now)
        if len(entry.body) > self.rules.most_bytes:
            raise InputError(
                f"a request of {len(entry.body)} bytes does not fit into an outbox of "
                f"{self.rules.most_bytes}: make it smaller, or the outbox larger"
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
        """The entry to be sent next; None if nothing waits.

        Raises:
            OutboxError: the file cannot be read.
        """
        with self._store.reading() as connection:
            query = f"SELECT {_COLUMNS} FROM entries WHERE expires > ? ORDER BY number LIMIT 1"
            row = connection.execute(query, (self._clock(),)).fetchone()
        return None if row is None else _entry(row)

    def confirm(self, key: str) -> None:
        """Take an entry out that the server has answered.

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
                (self.rules.most_entries,),
            )

    def failed(self, key: str, *, most: int) -> None:
        """Note that the server answered an entry with an error; after `most` it is taken out.

        Raises:
            OutboxError: the file cannot be written.
        """
        with self._store.transaction() as connection:
            connection.execute("UPDATE entries SET failures = failures + 1 WHERE key = ?", (key,))
            query = "DELETE FROM entries WHERE key = ? AND failures >= ?"
            _count(connection, "refused", connection.execute(query, (key, most)).rowcount)

    def counts(self) -> OutboxCounts:
        """What waits, and what became of the rest.

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
        """Wait until this process puts something, at most that long."""
        self._has_come.wait(seconds)
        self._has_come.clear()

    def _end(self, now: float) -> float:
        """When what comes at `now` is too old."""
        return now + self.rules.lives_s if now > _CLOCK_IS_SET else _NEVER

    def _expire(self, connection: sqlite3.Connection, now: float) -> None:
        gone = connection.execute("DELETE FROM entries WHERE expires <= ?", (now,)).rowcount
        _count(connection, "expired", gone)
        connection.execute("DELETE FROM sent WHERE expires <= ?", (now,))

    def _make_room(self, connection: sqlite3.Connection, entry: Entry) -> bool:
        """Drop the oldest until `entry` fits; False if it is the one to be dropped."""
        query = "SELECT count(*), coalesce(sum(size), 0) FROM entries"
        count, size = connection.execute(query).fetchone()
        too_many = count + 1 - self.rules.most_entries
        too_large = size + len(entry.body) - self.rules.most_bytes
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
