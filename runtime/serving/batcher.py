"""Batch the requests to one model, run the batches on a thread, and split the results."""

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
    """The inputs of one request: arrays whose first axis has `rows`, and parameters."""

    inputs: Tensors
    parameters: Mapping[str, Parameter]
    rows: int

    @property
    def key(self) -> object:
        """A key that is equal for items that may share a batch.

        It consists of names, dtypes, shapes beyond the first axis, and parameters with their
        types (1, 1.0 and True are equal in Python). If an input has another number of rows, the
        key equals no other.
        """
        if any(array.shape[:1] != (self.rows,) for array in self.inputs.values()):
            return object()
        arrays = ((name, array.dtype, array.shape[1:]) for name, array in self.inputs.items())
        values = ((key, type(value), value) for key, value in self.parameters.items())
        return frozenset(arrays), frozenset(values)


def run_batch(model: ServingModel, items: Sequence[BatchItem]) -> list[BatchResult]:
    """Run items as one batch; the result of each is its rows of the outputs, or an exception.

    If the batch fails, the items are run one by one, so that only the faulty ones fail.

    Args:
        model: returns one row for each row of its inputs.
        items: at least one item; all have the same `key`.
    """
    if len(items) > 1:
        try:
            return _run_concatenated(model, items)
        except BaseException:  # the fault of one item, which the single runs will show
            pass
    return [run_single(model, item) for item in items]


def run_single(model: ServingModel, item: BatchItem) -> BatchResult:
    """Run one item and return its outputs, or the exception that it raised."""
    try:
        return _check_outputs(model, model.run(item.inputs, item.parameters))
    except BaseException as error:  # SystemExit too, which a user's function may raise
        return error


def _run_concatenated(model: ServingModel, items: Sequence[BatchItem]) -> list[BatchResult]:
    first = items[0]
    joined = {name: np.concatenate([item.inputs[name] for item in items]) for name in first.inputs}
    for array in joined.values():
        array.flags.writeable = False  # as the arrays of a single request
    outputs = _check_outputs(model, model.run(joined, first.parameters))
    rows = sum(item.rows for item in items)
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        raise EngineError(f"{model.name} returned another number of rows than it was given")
    results: list[BatchResult] = []
    start = 0
    for item in items:
        stop = start + item.rows
        results.append({name: array[start:stop] for name, array in outputs.items()})
        start = stop
    return results


def _check_outputs(model: ServingModel, outputs: object) -> Outputs:
    if not isinstance(outputs, dict) or not all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in outputs.items()
    ):
        raise EngineError(f"{model.name} returned something other than named arrays")
    for name, array in outputs.items():
        try:
            datatype_of(array)
        except WireError as error:
            raise EngineError(f"output {name!r} of {model.name}: {error}") from None
    return outputs


_FIRST_GUESS = 0.1  # seconds of a run, before one was measured
_SMOOTHING = 0.2  # weight of the latest run in the exponential moving average


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request in the queue of a batcher.

    Attributes:
        item: its inputs and parameters.
        key: see `BatchItem.key`.
        future: its outputs, or an error.
        arrival: `time.monotonic()` when it was read.
        deadline: likewise; None for none.
        timer: ends the wait at the deadline.
    """

    item: BatchItem
    key: object
    future: "asyncio.Future[Outputs]"
    arrival: float
    deadline: float | None
    timer: asyncio.TimerHandle | None = None

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class Batcher:
    """Queue the requests to one model and run them in batches, on a thread of its own.

    All methods must be called on the event loop's thread.

    Args:
        served: the model.
        limits: limits of batches and queue.
        metrics: count each run.
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
        self._rows = 0  # of the waiting requests
        self._flush_at: float | None = None
        self._flush: asyncio.Handle | None = None
        self._seconds = _FIRST_GUESS  # of one run, moving average
        self._run_rows = 1.0  # of one run, moving average
        self._is_closed = False
        metrics.watch_queue(lambda: len(self._waiting))
        self._inbox: queue.SimpleQueue[list[QueuedRequest] | None] = queue.SimpleQueue()
        # A daemon thread: a model that never returns must not keep the process alive.
        name = f"model {served.model.name}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def check_room(self) -> None:
        """Raise what `submit` would raise; to be called before a body is read.

        Raises:
            QueueFullError: the queue is full.
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
            inputs: arrays whose first axis has `rows`, checked by `check_inputs`.
            parameters: parameters of the model; requests with different parameters share no batch.
            rows: number of rows, at least 1.
            deadline: `time.monotonic()` after which no run begins; None for never.

        Raises:
            QueueFullError, DrainingError: see `check_room`.
            DeadlinePassedError: the deadline has passed.
        """
        self.check_room()
        item = BatchItem(inputs, parameters, rows)
        key = item.key if self._served.joins else object()
        future = self._loop.create_future()
        waiting = QueuedRequest(item, key, future, time.monotonic(), deadline)
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
        """End a request that is not running yet with the error `reason`."""
        if waiting in self._waiting:
            self._remove(waiting)
            _settle(waiting, reason)

    def close(self) -> None:
        """Refuse new, waiting and running requests; a running batch is abandoned."""
        self._is_closed = True
        for waiting in list(self._waiting):
            self.give_up(waiting, DrainingError())
        for waiting in self._running:
            _settle(waiting, DrainingError())
        self._inbox.put(None)

    def _remove(self, waiting: QueuedRequest) -> None:
        del self._waiting[waiting]
        self._rows -= waiting.item.rows
        if waiting.timer is not None:
            waiting.timer.cancel()

    def _plan(self, waiting: QueuedRequest) -> None:
        """Schedule the next run in time for a waiting request."""
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
        else:  # after the other requests that the event loop reads in this iteration
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
        """Return the oldest waiting request, and those that may share its batch."""
        first = next(iter(self._waiting))
        batch: list[QueuedRequest] = []
        rows = 0
        for waiting in self._waiting:
            if waiting.key == first.key:
                rows += waiting.item.rows
                if batch and rows > self._limits.max_batch:
                    break
                batch.append(waiting)
        return batch

    def _work(self) -> None:
        """Run batches (on the model's thread)."""
        while (batch := self._inbox.get()) is not None:
            start = time.monotonic()
            results = self._run(batch)
            seconds = time.monotonic() - start
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, results, seconds)
            except RuntimeError:  # the event loop was closed meanwhile
                return

    def _run(self, batch: Sequence[QueuedRequest]) -> list[BatchResult]:
        results: dict[QueuedRequest, BatchResult] = {
            waiting: DeadlinePassedError() for waiting in batch if waiting.is_late
        }
        rest = [waiting for waiting in batch if waiting not in results]
        if rest:
            found = run_batch(self._served.model, [waiting.item for waiting in rest])
            results.update(zip(rest, found, strict=True))
        return [results[waiting] for waiting in batch]

    def _finish(
        self, batch: Sequence[QueuedRequest], results: Sequence[BatchResult], seconds: float
    ) -> None:
        rows = sum(waiting.item.rows for waiting in batch)
        self._seconds += _SMOOTHING * (seconds - self._seconds)
        self._run_rows += _SMOOTHING * (rows - self._run_rows)
        self._metrics.count_run(rows, seconds)
        self._running = []
        for waiting, result in zip(batch, results, strict=True):
            _settle(waiting, result)
        for waiting in self._waiting:
            self._plan(waiting)


def _settle(waiting: QueuedRequest, result: BatchResult) -> None:
    """Complete the future of a request, unless it is complete already."""
    if waiting.future.done():
        return
    if isinstance(result, dict):
        waiting.future.set_result(result)
    elif isinstance(result, Exception):
        waiting.future.set_exception(result)
    else:  # SystemExit and the like must not end the server
        waiting.future.set_exception(RuntimeError(type(result).__name__))
