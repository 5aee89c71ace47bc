"""Replayer: sends what waits in an outbox once the server can be reached, in order."""

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
from edgeclip.runtime.split.resilience import Deadline
from edgeclip.runtime.wire.messages import InferResponse, WireError

_log = logging.getLogger(__name__)

OnReply = Callable[[Entry, InferResponse], object]
Step = Literal["sent", "set aside", "nothing waits", "no server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRules:
    """How an outbox is emptied.

    Attributes:
        per_second: entries at most, so that a server that is just back is not flooded.
        deadline_ms: of one entry.
        pause_s: before the server, or an outbox that was empty, is looked at again.
        most_failures: answers of the server that are errors, after which an entry is given up.

    Raises:
        InputError: a value that is not above 0.
    """

    per_second: float = 5.0
    deadline_ms: float = 10_000.0
    pause_s: float = 1.0
    most_failures: int = 5

    def __post_init__(self) -> None:
        if min(self.per_second, self.deadline_ms, self.pause_s, self.most_failures) <= 0:
            raise InputError(f"a replayer cannot have these rules: {self}")


class Replayer:
    """Sends entries one by one, the oldest first, on a thread of its own.

    The server's breaker decides when it is asked at all. An entry is taken out once the server
    has confirmed it: if the program dies in between, it is sent again with the same id, by which
    the server recognises it. Of several processes that share an outbox, one at a time sends.

    Args:
        outbox: what to empty; not closed by this.
        server: where to send it; likewise.
        on_reply: given each entry and its reply before it is taken out, so that no reply is
            lost; the same entry may be given twice.
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
        """Begin to send."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the entry that is under way; the rest waits for the next start."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> Step:
        """Send the oldest entry.

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
            self._outbox.failed(entry.key, most=1)
            return "set aside"
        except ServerError as error:
            return self._after(error, entry)
        try:
            self._on_reply(entry, response)
        except Exception:
            _log.exception("what takes the reply to outbox entry %s failed", entry.key)
        self._outbox.confirm(entry.key)
        return "sent"

    def _after(self, error: ServerError, entry: Entry) -> Step:
        """Decide whether it is the entry that is wrong, or the server."""
        is_answer = isinstance(error, ServerRefusedError | BadReplyError) and not error.lasting
        if is_answer:
            most = 1 if error.server_works else self._rules.most_failures
            self._outbox.failed(entry.key, most=most)
            if most == 1:
                _log.warning("outbox entry %s is given up: %s", entry.key, error)
                return "set aside"
        return "no server"

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with _turn(self._outbox.path) as is_ours:
                    while is_ours and not self._stopped.is_set():
                        self._pause_after(self.step())
            except (EdgeClipError, OSError) as error:  # a full disk, say, which may pass
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
def _turn(path: Path) -> Iterator[bool]:
    """Give whether this process may send; another one that dies lets go of its turn.

    Where files cannot be locked, all may: the server recognises what comes twice.
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
