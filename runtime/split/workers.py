"""A bounded set of threads for calls that may hang, so that their caller never does."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import ClientBusyError

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]"]


class Workers:
    """Daemon threads, made when they are needed and kept.

    Unlike `concurrent.futures.ThreadPoolExecutor`, nothing ever queues behind a thread that
    hangs, and a hanging thread does not keep the program from ending.

    Args:
        most: how many threads there may be.
        name: what the threads are called.

    Raises:
        InputError: `most` is below 1.
    """

    def __init__(self, most: int, name: str) -> None:
        if most < 1:
            raise InputError(f"{most} workers: take at least 1")
        self._most, self._name = most, name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._busy = 0  # jobs that were taken on and are not done
        self._threads = 0
        self._is_closed = False

    @property
    def busy(self) -> int:
        """How many threads are at work."""
        return self._busy

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` on a free thread.

        Raises:
            ClientBusyError: no thread is free, or these were closed.
        """
        with self._lock:
            if self._is_closed:
                raise ClientBusyError("the connection to the server was closed: open it anew")
            if self._busy == self._most:
                raise ClientBusyError(
                    f"{self._most} calls wait for the server already: make fewer at a time, or "
                    "allow more connections"
                )
            if self._busy == self._threads:
                self._begin_thread()
            self._busy += 1
        future: Future[T] = Future()
        self._jobs.put((work, future))
        return future

    def _begin_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError as error:
            raise ClientBusyError(f"the system gives no further thread: {error}") from None
        self._threads += 1

    def close(self) -> None:
        """Let the threads end once they are done; what hangs is left to its own timeout."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for _ in range(self._threads):
                    self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, future = job
            try:
                result = work()
            except BaseException as error:  # it belongs to the caller
                self._done()
                future.set_exception(error)
            else:
                self._done()
                future.set_result(result)
            del job, work, future  # a thread that waits must not keep what it did alive

    def _done(self) -> None:
        with self._lock:
            self._busy -= 1
