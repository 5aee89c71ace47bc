"""Dispatch inference requests to models: checks, deadlines, idempotency keys, batching."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from edgeclip.runtime.arrays import Outputs
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.batcher import Batcher
from edgeclip.runtime.serving.limits import BatchLimits, ClientGoneError, HttpError
from edgeclip.runtime.serving.metrics import ModelMetrics, ServerMetrics
from edgeclip.runtime.serving.models import (
    RegisteredModel,
    Registry,
    check_inputs,
    without_columns,
)
from edgeclip.runtime.wire.messages import (
    DEADLINE_MS,
    IDEMPOTENCY_KEY,
    SPACE_ID,
    InferRequest,
    InferResponse,
    Parameter,
    get_number,
)

_MAX_ENTRIES = 10_000
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _CacheEntry:
    digest: bytes
    outputs: "asyncio.Future[Outputs]"

    @property
    def size(self) -> int:
        if not self.outputs.done() or self.outputs.cancelled() or self.outputs.exception():
            return 0
        return sum(array.nbytes for array in self.outputs.result().values())


class IdempotencyCache:
    """Cache the outputs of requests with an idempotency key, so that each runs once.

    All methods must be called on the event loop's thread.

    Args:
        max_entries: number of the latest requests to remember.
        max_bytes: bound of their outputs.
    """

    def __init__(self, max_entries: int = _MAX_ENTRIES, max_bytes: int = _MAX_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._bytes = 0
        self._known: OrderedDict[tuple[str, str], _CacheEntry] = OrderedDict()

    async def run_once(
        self,
        model: str,
        key: str,
        inputs: Mapping[str, NDArray[Any]],
        run: Callable[[], Awaitable[Outputs]],
    ) -> Outputs:
        """Run a request, or wait for the outputs of the earlier request with the same key.

        A failed request is forgotten, so that it can be retried.

        Raises:
            HttpError: 409, the key was used for other inputs.
            Exception: from `run`.
        """
        name, digest = (model, key), digest_of(inputs)
        known = self._known.get(name)
        if known is None:
            known = _CacheEntry(digest, asyncio.ensure_future(run()))
            self._known[name] = known
            known.outputs.add_done_callback(lambda _: self._settle(name, known))
        elif known.digest != digest:
            raise HttpError(409, f"the key {key[:60]!r} was used for another request")
        # A client that disconnects must not cancel the run for the others.
        return await asyncio.shield(known.outputs)

    def _settle(self, name: tuple[str, str], entry: _CacheEntry) -> None:
        """Keep the outputs of a request that ended, within the bounds; forget a failed one."""
        if entry.outputs.cancelled() or entry.outputs.exception() is not None:
            del self._known[name]
            return
        self._bytes += entry.size
        while len(self._known) > self._max_entries or self._bytes > self._max_bytes:
            oldest = next((key for key, item in self._known.items() if item.outputs.done()), None)
            if oldest is None:
                return
            self._bytes -= self._known.pop(oldest).size


def digest_of(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the BLAKE2b digest of names, dtypes, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(inputs.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        if array.dtype == object:
            for item in array.ravel():
                digest.update(len(item).to_bytes(8, "little") + bytes(item))
        else:
            digest.update(array.tobytes())
    return digest.digest()


# Parameters for the server, which the model does not see.
_SERVER_PARAMETERS = frozenset({SPACE_ID, DEADLINE_MS, IDEMPOTENCY_KEY})
_MAX_DEADLINE_MS = 86_400_000.0  # a day; timers overflow on more


class InferService:
    """Check requests, queue them for their models, and return the responses.

    Args:
        registry: the models.
        limits: limits of each model's batches and queue.
        metrics: count requests and runs.
    """

    def __init__(self, registry: Registry, limits: BatchLimits, metrics: ServerMetrics) -> None:
        self._registry = registry
        self._limits = limits
        self._metrics = {name: metrics.of(name) for name in registry.names}
        self._batchers: dict[str, Batcher] = {}
        self._cache = IdempotencyCache()

    def start(self) -> None:
        """Start a batcher for each model, in the running event loop."""
        for served in self._registry:
            name = served.model.name
            self._batchers[name] = Batcher(served, self._limits, self._metrics[name])

    def close(self) -> None:
        """Refuse new, waiting and running requests."""
        for batcher in self._batchers.values():
            batcher.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models."""
        return self._registry.names

    def find(self, name: str) -> RegisteredModel:
        """Return a model by its name.

        Raises:
            HttpError: 404, unknown.
        """
        served = self._registry.get(name)
        if served is None:
            known = ", ".join(self.names)
            raise HttpError(404, f"no model {name[:60]!r} here; there are {known}")
        return served

    def metrics(self, name: str) -> ModelMetrics:
        """Return the metrics of a model."""
        return self._metrics[name]

    def check_room(self, name: str) -> None:
        """Raise, before a body is read, if the request would be refused afterwards.

        Raises:
            HttpError: 404, unknown model; 429, full queue; 503, the server is shutting down.
        """
        self.find(name)
        self._batchers[name].check_room()

    async def infer(
        self,
        request: InferRequest,
        *,
        arrival: float,
        gone: Callable[[], Awaitable[None]] | None = None,
    ) -> InferResponse:
        """Run a request.

        Args:
            request: the request.
            arrival: `time.monotonic()` when its head was read; its deadline counts from there.
            gone: waits until the client disconnects; a request that is not running yet is
                given up then. It is called once, after the request was queued.

        Raises:
            HttpError: 404, 429, 503, or 504 where the deadline passed before the run.
            SpaceMismatchError: the request is of another embedding space.
            InputError, EngineError, Exception: from the model.
        """
        served = self.find(request.model)
        _check_space(served, request.parameters)
        _check_wanted(request.outputs, [spec.name for spec in served.model.outputs])
        request = replace(request, inputs=without_columns(served.model, request.inputs))
        rows = check_inputs(served.model, request.inputs)
        key = request.parameters.get(IDEMPOTENCY_KEY)
        if key is None:
            outputs = await self._run(request, rows, arrival, gone)
        elif isinstance(key, str) and key:
            # It runs to its end even if the client disconnects: the client will ask again.
            outputs = await self._cache.run_once(
                request.model, key, request.inputs, lambda: self._run(request, rows, arrival, None)
            )
        else:
            raise InputError(f"{IDEMPOTENCY_KEY} must be a text that is not empty")
        return InferResponse(
            model=request.model,
            outputs=_wanted(outputs, request.outputs),
            parameters={} if served.model.space is None else {SPACE_ID: served.model.space},
            id=request.id,
        )

    async def _run(
        self,
        request: InferRequest,
        rows: int,
        arrival: float,
        gone: Callable[[], Awaitable[None]] | None,
    ) -> dict[str, NDArray[Any]]:
        batcher = self._batchers[request.model]
        waiting = batcher.submit(
            request.inputs,
            {
                key: value
                for key, value in request.parameters.items()
                if key not in _SERVER_PARAMETERS
            },
            rows=rows,
            deadline=_deadline(request.parameters, arrival),
        )
        watch = None if gone is None else asyncio.ensure_future(gone())
        if watch is not None:
            watch.add_done_callback(lambda _: batcher.give_up(waiting, ClientGoneError()))
        try:
            return await waiting.future
        finally:
            batcher.give_up(waiting, ClientGoneError())  # if this was cancelled
            if watch is not None:
                watch.cancel()


def _check_space(served: RegisteredModel, parameters: Mapping[str, Parameter]) -> None:
    space, own = parameters.get(SPACE_ID), served.model.space
    if space is None or own is None:
        return
    if not isinstance(space, str):
        raise InputError(f"{SPACE_ID} must be a text")
    check_space(own, space, f"the request to {served.model.name}")


def _deadline(parameters: Mapping[str, Parameter], arrival: float) -> float | None:
    left = get_number(parameters, DEADLINE_MS)
    return None if left is None else arrival + min(left, _MAX_DEADLINE_MS) / 1000


def _check_wanted(wanted: tuple[str, ...], known: list[str]) -> None:
    unknown = sorted(set(wanted) - set(known))
    if unknown and known:
        raise InputError(f"no output {unknown[0][:40]!r}; there are {', '.join(known)}")


def _wanted(outputs: dict[str, NDArray[Any]], wanted: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    if not wanted:
        return outputs
    _check_wanted(wanted, list(outputs))
    return {name: outputs[name] for name in wanted}
