"""What LoadGen's queries are answered by: its "system under test".

LoadGen is C++ and knows nothing of exceptions: one that left a callback would end the process, and
it has no call that ends a test. So a failure is kept, and from then on nothing is run: queries
are answered at once where LoadGen waits for an answer before the next one, and not at all where
it does not (Server), since it gives up when too many are open.
"""

import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from numpy.typing import NDArray

from edgeclip.runtime.measuring.interleave import Candidate
from edgeclip.runtime.progress import Progress

Ids = Sequence[int]  # of samples, as LoadGen names them


class AnsweringSut:
    """Answers queries in the thread that asks, one after the other.

    Attributes:
        failure: what the subject, or `progress`, raised.
        stopped: whether Ctrl-C was pressed.

    Args:
        loadgen: the module mlperf_loadgen.
        subject: what runs.
        batch: what it runs on, again and again: [n, ...]. A query of more than n samples is
            answered n by n; the last run of it may be for fewer.
        seconds: how long the test lasts, for `progress`.
        progress: called once a second at most, between two runs.
    """

    def __init__(
        self,
        loadgen: Any,
        subject: Candidate,
        batch: NDArray[Any],
        *,
        seconds: float,
        progress: Progress | None = None,
    ) -> None:
        self.failure: BaseException | None = None
        self.stopped = False
        self._loadgen = loadgen
        self._run = subject.run
        self._batch = batch
        self._tick = _ticker(progress, seconds)

    def issue(self, ids: Ids, _samples: Sequence[int]) -> None:
        """Take a query; called by LoadGen."""
        for at in range(0, len(ids), len(self._batch)):
            self._answer(ids[at : at + len(self._batch)])

    def flush(self) -> None:
        """Hear that no more queries come; called by LoadGen."""

    def close(self) -> None:
        """Wait until the last query is answered."""

    @property
    def given_up(self) -> bool:
        """Whether nothing is run any more."""
        return self.stopped or self.failure is not None

    def raise_failure(self) -> None:
        """Raise what ended the test early, if anything did."""
        if self.failure is not None:
            raise self.failure
        if self.stopped:
            raise KeyboardInterrupt

    def _answer(self, ids: Ids) -> None:
        self._attempt(self._run, self._batch)
        self._complete(ids)
        self._attempt(self._tick)

    def _attempt(self, work: Callable[..., object], *args: object) -> None:
        """Do it, unless the test is given up; a failure gives it up."""
        if self.given_up:
            return
        try:
            work(*args)
        except BaseException as error:  # a KeyboardInterrupt too must not get into LoadGen
            self.failure = error

    def _complete(self, ids: Ids) -> None:
        response = self._loadgen.QuerySampleResponse
        self._loadgen.QuerySamplesComplete([response(number, 0, 0) for number in ids])


class QueueingSut(AnsweringSut):
    """Puts queries into a queue and answers them in a thread of its own, in their order.

    LoadGen can issue the next query when it is due, however late the subject is.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting: queue.SimpleQueue[Ids | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="loadgen-worker", daemon=True)
        self._worker.start()

    def issue(self, ids: Ids, _samples: Sequence[int]) -> None:
        """Take a query; called by LoadGen."""
        self._waiting.put(ids)

    def flush(self) -> None:
        """Hear that no more queries come; called by LoadGen."""
        self._waiting.put(None)

    def close(self) -> None:
        """Wait until the last query is answered."""
        self._waiting.put(None)
        self._worker.join()

    def _work(self) -> None:
        held: list[int] = []
        while (ids := self._waiting.get()) is not None:
            self._attempt(self._run, self._batch)
            if self.given_up:
                held += ids
            else:
                self._complete(ids)
                self._attempt(self._tick)
        if held:
            self._complete(held)


@contextmanager
def stopped_by_ctrl_c(sut: AnsweringSut) -> Iterator[None]:
    """Let Ctrl-C stop `sut` instead of raising an exception wherever Python happens to be.

    Signals reach the main thread only: in another one there is nothing to do.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        sut.stopped = True

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ticker(progress: Progress | None, seconds: float) -> Callable[[], None]:
    """A function that tells `progress` the whole seconds since its first call."""
    if progress is None:
        return lambda: None
    total = max(1, math.ceil(seconds))
    began: list[float] = []
    told = 0

    def tick() -> None:
        nonlocal told
        now = time.monotonic()
        began[:] = began or [now]
        done = min(total, int(now - began[0]))
        if done > told:
            told = done
            progress(done, total)

    return tick
