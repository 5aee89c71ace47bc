"""Gather requests to one model into batches, run them on a thread, and split the results."""

import asyncio
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.runtime.arrays import Outputs, Tensors
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.serving.limits import (
    BatchLimits,
    DeadlinePassedError,
    DrainingError,
    QueueFullError,
)
from edgeclip.runtime.serving.metrics import ModelMetrics
from edgeclip.runtime.serving.models import RegisteredModel, ServingModel
from edgeclip.runtime.wire.messages import Parameter
from edgeclip.runtime.wire.tensors import WireError, datatype_of

BatchResult = Outputs | BaseException


@dataclass(frozen=True, slots=True, eq=False)
class BatchItem:
    """What one request brings to a run: arrays whose first axis has `rows`, and parameters."""

    inputs: Tensors
    parameters: Mapping[str, Parameter]
    rows: int

    @property
    def key(self) -> object:
        """Equal for requests that may be run together.

        Names, dtypes, shapes beyond the first axis, and parameters with their types agree
        then (1, 1.0 and True are equal in Python). Where an input has another number of
        rows, nothing is equal.
        """
        if any(array.shape[:1] != (self.rows,) for array in self.inputs.values()):
            return object()
        arrays = ((name, array.dtype, array.shape[1:]) for name, array in self.inputs.items())
        values = ((key, type(value), value) for key, value in self.parameters.items())
        return frozenset(arrays), frozenset(values)


def run_joined(model: ServingModel, shares: Sequence[BatchItem]) -> list[BatchResult]:
    """Run all shares at once; the answer to each is its rows of the outputs.

    Where that fails, they are run one by one, so that the failure is that of one request.

    Args:
        model: gives one row for each that it is given.
        shares: of equal `key`; at least one.
    """
    if len(shares) > 1:
        try:
            return _run_together(model, shares)
        except BaseException:  # a fault of one of them, which the single runs will show
            pass
    return [run_single(model, share) for share in shares]


def run_single(model: ServingModel, share: BatchItem) -> BatchResult:
    """Run one share; a failure of any kind is the answer."""
    try:
        return _checked(model, model.run(share.inputs, share.parameters))
    except BaseException as error:  # SystemExit too, which a user's function may raise
        return error


def _run_together(model: ServingModel, shares: Sequence[BatchItem]) -> list[BatchResult]:
    first = shares[0]
    joined = {
        name: np.concatenate([share.inputs[name] for share in shares]) for name in first.inputs
    }
    for array in joined.values():
        array.flags.writeable = False  # as what comes off the wire is
    outputs = _checked(model, model.run(joined, first.parameters))
    rows = sum(share.rows for share in shares)
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        raise EngineError(f"{model.name} gave another number of rows than it was given")
    answers: list[BatchResult] = []
    start = 0
    for share in shares:
        stop = start + share.rows
        answers.append({name: array[start:stop] for name, array in outputs.items()})
        start = stop
    return answers


def _checked(model: ServingModel, outputs: object) -> Outputs:
    if not isinstance(outputs, dict) or not all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in outputs.items()
    ):
        raise EngineError(f"{model.name} gave something other than named arrays")
    for name, array in outputs.items():
        try:
            datatype_of(array)
        except WireError as error:
            raise EngineError(f"output {name!r} of {model.name}: {error}") from None
    return outputs


_FIRST_GUESS = 0.1  # seconds a run takes, before one was measured
_FORGETTING = 0.2  # weight of the latest run in the running mean


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request on its way through a batcher.

    Attributes:
        share: what it brings.
        future: its outputs, or an error.
        arrival: `time.monotonic()` when it was read.
        deadline: likewise; None for none.
        timer: ends the wait at the deadline.
    """

    share: BatchItem
    key: object
    future: "asyncio.Future[Outputs]"
    arrival: float
    deadline: float | None
    timer: asyncio.TimerHandle | None = None

    @property
    def is_late(self) -> bool:
        """Whether the deadline is past."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class Batcher:
    """The queue of one model. All methods belong to the event loop's thread.

    Args:
        served: the model.
        limits: of batches and queue.
        metrics: told of each run.
        loop: the event loop; None for the running one.
    """

    def __init__(
        self,
        served: RegisteredModel,
        limits: BatchLimits,
        metrics: ModelMetrics,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._served = served
        self._limits = limits
        self._metrics = metrics
        self._loop = loop or asyncio.get_running_loop()
        self._waiting: dict[QueuedRequest, None] = {}  # in order of arrival
        self._running: list[QueuedRequest] = []
        self._rows = 0  # of those that wait
        self._flush_at: float | None = None
        self._flush: asyncio.Handle | None = None
        self._seconds = _FIRST_GUESS  # one run, running mean
        self._run_rows = 1.0  # rows of one run, running mean
        self._is_closed = False
        metrics.watch_queue(lambda: len(self._waiting))
        self._inbox: queue.SimpleQueue[list[QueuedRequest] | None] = queue.SimpleQueue()
        # A daemon, so that a model which never returns cannot keep the process alive.
        name = f"model {served.model.name}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def check_room(self) -> None:
        """Refuse what `submit` would refuse; worth asking before a body is read.

        Raises:
            QueueFullError: as many wait as may.
            DrainingError: the batcher is closed.
        """
        if self._is_closed:
            raise DrainingError
        if len(self._waiting) >= self._limits.queue:
            runs = 1 + self._rows / self._run_rows
            raise QueueFullError(runs * self._seconds)

    def submit(
        self,
        inputs: Tensors,
        parameters: Mapping[str, Parameter],
        *,
        rows: int,
        deadline: float | None = None,
    ) -> QueuedRequest:
        """Queue a request; its `future` gets the outputs.

        The future's errors are `DeadlinePassedError`, `DrainingError`, and whatever the model
        raised.

        Args:
            inputs: arrays whose first axis has `rows`, as `check_inputs` lets pass.
            parameters: for the model; requests whose parameters differ are not joined.
            rows: at least 1.
            deadline: `time.monotonic()` after which no run begins; None for never.

        Raises:
            QueueFullError, DrainingError: see `check_room`.
            DeadlinePassedError: the deadline is past.
        """
        self.check_room()
        share = BatchItem(inputs, parameters, rows)
        key = share.key if self._served.joins else object()
        future = self._loop.create_future()
        waiting = QueuedRequest(share, key, future, time.monotonic(), deadline)
        if deadline is not None:
            left = deadline - waiting.arrival
            if left <= 0:
                raise DeadlinePassedError
            waiting.timer = self._loop.call_later(
                left, self.give_up, waiting, DeadlinePassedError()
            )
        self._waiting[waiting] = None
        self._rows += rows
        self._plan(waiting)
        return waiting

    def give_up(self, waiting: QueuedRequest, reason: Exception) -> None:
        """End a request that has not begun, with `reason`; one that has goes on."""
        if waiting in self._waiting:
            self._remove(waiting)
            _settle(waiting, reason)

    def close(self) -> None:
        """Refuse whatever comes, waits or runs; a run that is under way is left to itself."""
        self._is_closed = True
        for waiting in list(self._waiting):
            self.give_up(waiting, DrainingError())
        for waiting in self._running:
            _settle(waiting, DrainingError())
        self._inbox.put(None)

    def _remove(self, waiting: QueuedRequest) -> None:
        del self._waiting[waiting]
        self._rows -= waiting.share.rows
        if waiting.timer is not None:
            waiting.timer.cancel()

    def _plan(self, waiting: QueuedRequest) -> None:
        """Let the next run begin in time for a request that waits."""
        if self._running:
            return
        now = time.monotonic()
        begin = waiting.arrival + self._limits.max_wait_ms / 1000
        if self._rows >= self._limits.max_batch or not self._served.joins:
            begin = now
        if waiting.deadline is not None:
            begin = min(begin, waiting.deadline - self._seconds)
        if self._flush_at is not None and self._flush_at <= begin:
            return
        if self._flush is not None:
            self._flush.cancel()
        self._flush_at = begin
        if begin > now:
            self._flush = self._loop.call_later(begin - now, self._begin)
        else:  # after all that the event loop has read in this turn
            self._flush = self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._flush = self._flush_at = None
        if self._running or not self._waiting:
            return
        self._running = self._next_batch()
        for waiting in self._running:
            self._remove(waiting)
        self._inbox.put(self._running)

    def _next_batch(self) -> list[QueuedRequest]:
        """The request that waits longest, and those behind it that it can be joined with."""
        first = next(iter(self._waiting))
        batch: list[QueuedRequest] = []
        rows = 0
        for waiting in self._waiting:
            if waiting.key == first.key:
                rows += waiting.share.rows
                if batch and rows > self._limits.max_batch:
                    break
                batch.append(waiting)
        return batch

    def _work(self) -> None:
        """Run batches, on the model's thread."""
        while (batch := self._inbox.get()) is not None:
            start = time.monotonic()
            answers = self._run(batch)
            seconds = time.monotonic() - start
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, answers, seconds)
            except RuntimeError:  # the event loop was closed meanwhile
                return

    def _run(self, batch: Sequence[QueuedRequest]) -> list[BatchResult]:
        answers: dict[QueuedRequest, BatchResult] = {
            waiting: DeadlinePassedError() for waiting in batch if waiting.is_late
        }
        rest = [waiting for waiting in batch if waiting not in answers]
        if rest:
            found = run_joined(self._served.model, [waiting.share for waiting in rest])
            answers.update(zip(rest, found, strict=True))
        return [answers[waiting] for waiting in batch]

    def _finish(
        self, batch: Sequence[QueuedRequest], answers: Sequence[BatchResult], seconds: float
    ) -> None:
        rows = sum(waiting.share.rows for waiting in batch)
        self._seconds += _FORGETTING * (seconds - self._seconds)
        self._run_rows += _FORGETTING * (rows - self._run_rows)
        self._metrics.run(rows, seconds)
        self._running = []
        for waiting, answer in zip(batch, answers, strict=True):
            _settle(waiting, answer)
        for waiting in self._waiting:
            self._plan(waiting)


def _settle(waiting: QueuedRequest, answer: BatchResult) -> None:
    if waiting.future.done():
        return
    if isinstance(answer, dict):
        waiting.future.set_result(answer)
    elif isinstance(answer, Exception):
        waiting.future.set_exception(answer)
    else:  # SystemExit and the like must not end the server
        waiting.future.set_exception(RuntimeError(type(answer).__name__))
