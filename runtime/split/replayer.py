"""Send the requests in an outbox, in order, once the server can be reached."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.split.errors import BadReplyError, ServerError, ServerRefusedError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.outbox import Entry, Outbox
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import InferResponse, WireError

_log = logging.getLogger(__name__)

OnReply = Callable[[Entry, InferResponse], object]
Step = Literal["sent", "set aside", "nothing waits", "no server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRules:
    """Rate and limits of a replayer.

    Attributes:
        per_second: entries per second at most, so that a recovering server is not flooded.
        deadline_ms: milliseconds for one entry.
        pause_s: before an unavailable server, or an empty outbox, is checked again.
        max_failures: error responses after which an entry is given up.

    Raises:
        InputError: a value that is not above 0.
    """

    per_second: float = 5.0
    deadline_ms: float = 10_000.0
    pause_s: float = 1.0
    max_failures: int = 5

    def __post_init__(self) -> None:
        if min(self.per_second, self.deadline_ms, self.pause_s, self.max_failures) <= 0:
            raise InputError(f"a replayer cannot have these rules: {self}")


class Replayer:
    """Send the entries of an outbox one by one, the oldest first, on a thread of its own.

    The client's circuit breaker decides when the server is called at all. An entry is removed
    once the server has answered it: if the program dies in between, it is sent again with the
    same idempotency key. Of several processes that share an outbox, one at a time sends.

    Args:
        outbox: the outbox; it is not closed by this.
        server: the client of the server; likewise.
        on_reply: called with each entry and its response before the entry is removed, so that
            no response is lost; perhaps twice for the same entry.
        rules: see `ReplayRules`.
    """

    def __init__(
        self,
        outbox: Outbox,
        server: Server,
        *,
        on_reply: OnReply = lambda entry, response: None,
        rules: ReplayRules | None = None,
    ) -> None:
        self._outbox, self._server, self._on_reply = outbox, server, on_reply
        self._rules = rules or ReplayRules()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgeclip-replay", daemon=True)

    def __enter__(self) -> "Replayer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current entry; the rest waits for the next start."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> Step:
        """Send the oldest entry and return what happened.

        Raises:
            OutboxError: the file cannot be read or written.
        """
        entry = self._outbox.oldest()
        if entry is None:
            return "nothing waits"
        try:
            deadline = Deadline.after_ms(self._rules.deadline_ms)
            response = self._server.ask(entry.request(), deadline, _reader(entry))
        except WireError:
            self._outbox.failed(entry.key, max_failures=1)
            return "set aside"
        except ServerError as error:
            return self._after(error, entry)
        try:
            self._on_reply(entry, response)
        except Exception:
            _log.exception("on_reply failed for outbox entry %s", entry.key)
        self._outbox.confirm(entry.key)
        return "sent"

    def _after(self, error: ServerError, entry: Entry) -> Step:
        """Decide whether the entry is at fault, or the server."""
        is_answer = isinstance(error, ServerRefusedError | BadReplyError) and not error.lasting
        if is_answer:
            limit = 1 if error.server_works else self._rules.max_failures
            self._outbox.failed(entry.key, max_failures=limit)
            if limit == 1:
                _log.warning("outbox entry %s is given up: %s", entry.key, error)
                return "set aside"
        return "no server"

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with _lock(self._outbox.path) as is_ours:
                    while is_ours and not self._stopped.is_set():
                        self._pause_after(self.step())
            except (EdgeClipError, OSError) as error:  # perhaps temporary, such as a full disk
                _log.warning("the outbox cannot be emptied: %s", error)
            self._stopped.wait(self._rules.pause_s)

    def _pause_after(self, step: Step) -> None:
        if step == "nothing waits":
            self._outbox.wait(self._rules.pause_s)
        elif step == "no server":
            self._stopped.wait(self._rules.pause_s)
        else:
            self._stopped.wait(1 / self._rules.per_second)


def _reader(entry: Entry) -> Callable[[InferResponse], InferResponse]:
    def read(response: InferResponse) -> InferResponse:
        if response.id != entry.key:
            raise BadReplyError(f"the server answered {response.id[:40]!r}, not {entry.key!r}")
        return response

    return read


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Yield whether this process may send; the lock of a process that dies is released.

    If files cannot be locked, all may: the server runs each idempotency key once.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    is_ours = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except OSError:
            pass  # a file system without locks
        yield is_ours
    finally:
        os.close(descriptor)
