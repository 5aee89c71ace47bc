"""The ASGI application of the server: Open Inference Protocol v2 over HTTP."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from edgeclip.runtime.serving.infer_service import InferService
from edgeclip.runtime.serving.limits import (
    CLIENT_GONE,
    BatchLimits,
    ClientGoneError,
    DrainingError,
    HttpError,
    QueueFullError,
    ServerLimits,
    http_error_of,
)
from edgeclip.runtime.serving.metrics import CONTENT_TYPE, ServerMetrics
from edgeclip.runtime.serving.models import Registry
from edgeclip.runtime.serving.security import is_authorized
from edgeclip.runtime.wire.messages import (
    JSON_LENGTH_HEADER,
    SERVER_TIMING_HEADER,
    InferRequest,
    InferResponse,
    WireError,
    decode_request,
    encode_error,
    encode_response,
    json_length,
    server_timing,
)

_MAX_DIGITS = 18

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpResponse:
    """A complete response; `content-length` is added when it is sent."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def send_response(send: Send, answer: HttpResponse) -> None:
    """Send a response."""
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in answer.headers.items()
    ]
    headers.append((b"content-length", b"%d" % len(answer.body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class BodyBudget:
    """The memory budget of all request bodies in flight.

    Args:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self._left = total

    def reserve(self, size: int) -> None:
        """Reserve `size` bytes.

        Raises:
            QueueFullError: too few are left.
        """
        if size > self._left:
            raise QueueFullError(1.0)
        self._left -= size

    def release(self, size: int) -> None:
        """Release reserved bytes."""
        self._left += size


async def read_body(
    receive: Receive, headers: Mapping[bytes, bytes], *, max_bytes: int, seconds: float
) -> bytes:
    """Read the body of a request.

    Args:
        receive: receive function of the request.
        headers: names in lower case.
        max_bytes: bound in bytes.
        seconds: timeout.

    Raises:
        HttpError: 413, larger than `max_bytes`; 415, compressed; 408, too slow.
        ClientGoneError: the client closed the connection first.
    """
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise HttpError(415, "compressed bodies are not supported: send the body uncompressed")
    declared_size(headers, max_bytes)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return _first_part(message, max_bytes)
    try:
        return await asyncio.wait_for(_read_on(message, receive, max_bytes), seconds)
    except asyncio.TimeoutError:  # a name of its own on Python 3.10
        raise HttpError(408, f"the body was not complete within {seconds:g} s") from None


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects or the response was sent; call it after `read_body`."""
    while (await receive())["type"] != "http.disconnect":
        pass


def declared_size(headers: Mapping[bytes, bytes], max_bytes: int) -> int:
    """Return the value of `Content-Length`, or `max_bytes` if it is missing.

    Raises:
        HttpError: 413, larger than `max_bytes`; 400, not a number.
    """
    text = headers.get(b"content-length")
    if text is None:
        return max_bytes
    if not text.isdigit():
        raise HttpError(400, "Content-Length must be a whole number")
    # Digits are counted first: Python refuses to parse very long numbers.
    if len(text) > _MAX_DIGITS or int(text) > max_bytes:
        raise _too_large(max_bytes)
    return int(text)


def _first_part(message: Message, max_bytes: int) -> bytes:
    body: bytes = message.get("body", b"")
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


async def _read_on(message: Message, receive: Receive, max_bytes: int) -> bytes:
    parts, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"the body is larger than {max_bytes} bytes: send less at a time")


_LOG = logging.getLogger(__name__)
_VERSION = "1"  # of every model
_JSON_LENGTH = JSON_LENGTH_HEADER.lower().encode()
_Headers = dict[bytes, bytes]


class App:
    """Answer HTTP requests; `app(scope, receive, send)` is the ASGI entry point.

    Args:
        registry: the models.
        batches: limits of each model's batches and queue.
        limits: size and duration of requests.
        token: bearer token that all but the health paths require; None for none.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        batches: BatchLimits | None = None,
        limits: ServerLimits | None = None,
        token: str | None = None,
    ) -> None:
        self.limits = limits or ServerLimits()
        self._metrics = ServerMetrics()
        self.service = InferService(registry, batches or BatchLimits(), self._metrics)
        self.budget = BodyBudget(self.limits.max_memory)
        self.token = token.encode() if token is not None else None
        self._in_flight = 0
        self.is_draining = False

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight."""
        return self._in_flight == 0

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request as in flight during the block."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def drain(self) -> None:
        """Report that the server is not ready, and refuse new requests."""
        self.is_draining = True

    def close(self) -> None:
        """Refuse waiting and running requests too."""
        self.service.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan events of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            with self.in_flight():
                await self._serve(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.service.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.service.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: _Headers = dict(scope["headers"])
        try:
            response = await self._respond(scope, receive, headers)
        except Exception as error:
            response = _error_response(error, scope, headers)
        if response.status == CLIENT_GONE:
            return
        if self.is_draining:
            response.headers["connection"] = "close"
        await send_response(send, response)

    async def _respond(self, scope: Scope, receive: Receive, headers: _Headers) -> HttpResponse:
        path = scope["path"].split("/")[1:]
        if path[:2] == ["v2", "health"]:
            _check_method(scope, "GET", "HEAD")
            return self._health(path[2:])
        if not is_authorized(headers, self.token):
            raise HttpError(
                401, "send the server's token as 'Authorization: Bearer TOKEN'", _CHALLENGE
            )
        if path[:2] == ["v2", "models"] and path[3:4] == ["versions"]:
            if path[4:5] != [_VERSION]:
                raise HttpError(404, f"models have the version {_VERSION} only")
            del path[3:5]
        match path:
            case ["v2", "models", name, "infer"]:
                _check_method(scope, "POST")
                return await self._infer(name, receive, headers)
            case ["metrics"]:
                _check_method(scope, "GET", "HEAD")
                return HttpResponse(
                    status=200, headers={"content-type": CONTENT_TYPE}, body=self._metrics.page()
                )
        response = _json(200, self._describe(path))
        _check_method(scope, "GET", "HEAD")
        return response

    def _health(self, path: list[str]) -> HttpResponse:
        match path:
            case ["live"]:
                return _json(200, {"live": True})
            case ["ready"] if self.is_draining:
                return _json(503, {"ready": False}, DrainingError().headers)
            case ["ready"]:
                return _json(200, {"ready": True})
        raise _unknown_path()

    def _describe(self, path: list[str]) -> dict[str, Any]:
        match path:
            case ["v2"] | ["v2", ""]:
                return {
                    "name": "edgeclip",
                    "version": version("edgeclip"),
                    "extensions": ["binary_tensor_data"],
                    "models": self.service.names,
                }
            case ["v2", "models", *model, "stats"] if model or "stats" not in self.service.names:
                raise HttpError(404, "no statistics are kept there: GET /metrics has them")
            case ["v2", "models", name]:
                return self._describe_model(name)
            case ["v2", "models", name, "ready"]:
                self.service.find(name)
                return {"name": name, "ready": not self.is_draining}
        raise _unknown_path()

    def _describe_model(self, name: str) -> dict[str, Any]:
        model = self.service.find(name).model
        space = {} if model.space is None else {"parameters": {"space_id": model.space}}
        return {
            "name": name,
            "versions": [_VERSION],
            "platform": "edgeclip",
            "inputs": [asdict(spec) for spec in model.inputs],
            "outputs": [asdict(spec) for spec in model.outputs],
            **space,
        }

    async def _infer(self, name: str, receive: Receive, headers: _Headers) -> HttpResponse:
        arrival = time.monotonic()
        self.service.find(name)
        metrics = self.service.metrics(name)
        status = CLIENT_GONE
        try:
            response = await self._run(name, receive, headers, arrival)
            status = response.status
            return response
        except Exception as error:
            status = http_error_of(error).status
            raise
        finally:
            metrics.count_request(status, time.monotonic() - arrival)

    async def _run(
        self, name: str, receive: Receive, headers: _Headers, arrival: float
    ) -> HttpResponse:
        if self.is_draining:
            raise DrainingError
        self.service.check_room(name)
        limits = self.limits
        size = declared_size(headers, limits.max_body)
        self.budget.reserve(size)
        try:
            body = await read_body(
                receive, headers, max_bytes=limits.max_body, seconds=limits.body_seconds
            )
            received = time.monotonic()
            request = self._decode(name, headers, body)
            result = await self.service.infer(
                request, arrival=arrival, gone=lambda: wait_for_disconnect(receive)
            )
            response = _encode(result, request)
            response.headers[SERVER_TIMING_HEADER] = server_timing(
                1e3 * (time.monotonic() - received)
            )
            return response
        finally:
            self.budget.release(size)

    def _decode(self, name: str, headers: _Headers, body: bytes) -> InferRequest:
        length = json_length(headers.get(_JSON_LENGTH))
        if (len(body) if length is None else length) > self.limits.max_json:
            raise HttpError(
                413, f"the JSON is larger than {self.limits.max_json} bytes: send tensors as binary"
            )
        return decode_request(name, body, length)


_CHALLENGE = {"www-authenticate": "Bearer"}


def _encode(response: InferResponse, request: InferRequest) -> HttpResponse:
    try:
        headers, body = encode_response(response, request.binary)
    except WireError as error:
        # The client can avoid values that JSON does not have by asking for binary outputs.
        raise HttpError(500 if request.binary is True else 400, str(error)) from error
    return HttpResponse(status=200, headers=headers, body=body)


def _error_response(error: Exception, scope: Scope, headers: _Headers) -> HttpResponse:
    http_error = http_error_of(error)
    if http_error.status == 500:
        _LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
    own_headers, body = encode_error(str(http_error))
    # A client that was not told to continue may omit the body: what follows is ambiguous.
    close = {"connection": "close"} if b"expect" in headers else {}
    return HttpResponse(
        status=http_error.status,
        headers={**own_headers, **http_error.headers, **close},
        body=body,
    )


def _check_method(scope: Scope, *allowed: str) -> None:
    if scope["method"] not in allowed:
        methods = ", ".join(allowed)
        raise HttpError(405, f"this path takes {methods}", {"allow": methods})


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> HttpResponse:
    return HttpResponse(
        status=status,
        headers={"content-type": "application/json", **(headers or {})},
        body=json.dumps(value).encode(),
    )


def _unknown_path() -> HttpError:
    return HttpError(404, "no such path: the protocol begins at /v2")
