"""Serve the Open Inference Protocol over gRPC on a separate port."""

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import StatusCode

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.grpc_codec import (
    SERVICE,
    VERSION,
    decode_request,
    describe_model,
    encode_response,
    message_type,
    parse,
)
from edgeclip.runtime.serving.limits import (
    CLIENT_GONE,
    ClientGoneError,
    DrainingError,
    HttpError,
    ServerLimits,
    http_error_of,
)
from edgeclip.runtime.serving.security import TlsFiles, is_authorized
from edgeclip.runtime.wire.messages import (
    DEADLINE_MS,
    InferRequest,
    InferResponse,
    WireError,
    get_number,
)

# gRFC A6: after how many milliseconds a client that retries automatically may do so.
PUSHBACK = "grpc-retry-pushback-ms"

# Other statuses below 500 are INVALID_ARGUMENT, and INTERNAL from 500.
_CODES = {
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.FAILED_PRECONDITION,
    429: StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_GONE: StatusCode.CANCELLED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}


def grpc_status(error: HttpError) -> tuple[StatusCode, tuple[tuple[str, str], ...]]:
    """Return the gRPC status code and trailers for an HTTP error.

    Source: https://grpc.io/docs/guides/status-codes
    """
    other = StatusCode.INVALID_ARGUMENT if error.status < 500 else StatusCode.INTERNAL
    code = _CODES.get(error.status, other)
    after = error.headers.get("retry-after")
    return code, () if after is None else ((PUSHBACK, str(int(after) * 1000)),)


_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A gRPC call: its messages, of which at most the first is read, and its context."""

    messages: Iterator[bytes]
    context: grpc.ServicerContext


class GrpcService:
    """Answer gRPC calls with the models, queues, token and limits of the HTTP application.

    Calls arrive on gRPC's threads, which read them and wait; the models are called in the
    application's event loop.

    Every call is handled as a stream of messages. On the wire that makes no difference, and it
    allows to refuse a call before its message is read.

    Args:
        app: the application.
        loop: its event loop.
    """

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop
        self._reading: dict[grpc.ServicerContext, float] = {}  # since when, time.monotonic()

    def handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        """Return the handlers of all methods, by name."""
        methods: dict[str, Callable[[_Call], Message]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._describe_server,
            "ModelMetadata": self._describe_model,
            "ModelInfer": self._infer,
        }
        return {
            name: grpc.stream_unary_rpc_method_handler(
                functools.partial(_serve, method), response_serializer=_serialize
            )
            for name, method in methods.items()
        }

    def end_slow_calls(self) -> None:
        """Cancel calls whose message did not arrive in time; to be called periodically."""
        latest = time.monotonic() - self._app.limits.body_seconds
        for context, since in self._reading.copy().items():
            if since < latest:
                context.cancel()

    def _live(self, call: _Call) -> Message:
        return message_type("ServerLiveResponse")(live=True)

    def _ready(self, call: _Call) -> Message:
        return message_type("ServerReadyResponse")(ready=not self._app.is_draining)

    def _model_ready(self, call: _Call) -> Message:
        request = self._read("ModelReadyRequest", call)
        is_known = request.name in self._app.service.names and request.version in ("", VERSION)
        return message_type("ModelReadyResponse")(ready=is_known and not self._app.is_draining)

    def _describe_server(self, call: _Call) -> Message:
        self._authorize(call)
        return message_type("ServerMetadataResponse")(name="edgeclip", version=version("edgeclip"))

    def _describe_model(self, call: _Call) -> Message:
        request = self._read("ModelMetadataRequest", call)
        _check_version(request.version)
        return describe_model(self._app.service.find(request.name).model)

    def _infer(self, call: _Call) -> Message:
        if self._app.is_draining:
            raise DrainingError
        message = self._read("ModelInferRequest", call)
        arrival = time.monotonic()
        _check_version(message.model_version)
        self._app.service.find(message.model_name)
        status, metrics = 200, self._app.service.metrics(message.model_name)
        try:
            return encode_response(self._respond(message, call, arrival))
        except Exception as error:
            status = http_error_of(error).status
            raise
        finally:
            metrics.count_request(status, time.monotonic() - arrival)

    def _respond(self, message: Any, call: _Call, arrival: float) -> InferResponse:
        size, most = message.ByteSize(), self._app.limits.max_json
        if size > most and not message.raw_input_contents:
            # Typed contents are parsed one by one, like JSON.
            raise HttpError(413, f"the message is larger than {most} bytes: send tensors raw")
        request = _limit_deadline(decode_request(message), call.context.time_remaining())
        future = asyncio.run_coroutine_threadsafe(self._run(request, size, arrival), self._loop)

        def give_up() -> None:
            future.cancel()

        if not call.context.add_callback(give_up):
            give_up()
        try:
            return future.result()
        except CancelledError:  # the client disconnected, or its deadline passed
            raise ClientGoneError from None

    async def _run(self, request: InferRequest, size: int, arrival: float) -> InferResponse:
        over = self._loop.create_future()
        with self._app.in_flight():
            self._app.budget.reserve(size)
            try:
                return await self._app.service.infer(request, arrival=arrival, gone=lambda: over)
            finally:
                over.cancel()  # if this was cancelled, the waiting request is given up
                self._app.budget.release(size)

    def _read(self, name: str, call: _Call) -> Any:
        """Read the message of a call.

        Raises:
            HttpError: 401, without the token.
            WireError: no message, or one of another type.
            grpc.RpcError: the call is over.
        """
        self._authorize(call)
        self._reading[call.context] = time.monotonic()
        try:
            data = next(call.messages, None)
        finally:
            del self._reading[call.context]
        if data is None:
            raise WireError("the call has no message")
        return parse(name, data)

    def _authorize(self, call: _Call) -> None:
        shown = {
            key.encode(): value.encode()
            for key, value in call.context.invocation_metadata()
            if key == "authorization" and isinstance(value, str)
        }
        if not is_authorized(shown, self._app.token):
            raise HttpError(
                401, "send the server's token as metadata 'authorization: Bearer TOKEN'"
            )


def _serve(
    method: Callable[[_Call], Message], messages: Iterator[bytes], context: grpc.ServicerContext
) -> Message:
    try:
        return method(_Call(messages, context))
    except grpc.RpcError:  # the call is over
        raise
    except Exception as error:
        http_error = http_error_of(error)
        if http_error.status == 500:
            _LOG.error("a gRPC call failed", exc_info=error)
    code, trailers = grpc_status(http_error)
    context.set_trailing_metadata(trailers)
    context.abort(code, str(http_error))


def _limit_deadline(request: InferRequest, left: float | None) -> InferRequest:
    """Limit the deadline of a request to that of the call, `left` seconds away."""
    if left is None:
        return request
    own = get_number(request.parameters, DEADLINE_MS)
    earliest = left * 1e3 if own is None else min(own, left * 1e3)
    return dataclasses.replace(request, parameters={**request.parameters, DEADLINE_MS: earliest})


def _check_version(asked: str) -> None:
    if asked not in ("", VERSION):
        raise HttpError(404, f"models have the version {VERSION} only")


def _serialize(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    return data


_MAX_CALLS = 256  # each has a thread while it is answered
_CLOSE_SECONDS = 1.0  # for the last responses to be sent
_CHECK_SECONDS = 1.0  # between two checks for slow calls
_IDENTITY_ONLY = 1  # bit set of the accepted compression algorithms


class GrpcListener:
    """A port that accepts gRPC calls for the HTTP application.

    Args:
        app: the application, to be started before `open` and drained before `close`.
        host: address to listen on.
        port: 0 for any free port.
        tls: certificate and key; None for neither.
    """

    def __init__(self, app: App, *, host: str, port: int, tls: TlsFiles | None = None) -> None:
        self._app = app
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._tls = tls
        self._server: grpc.Server | None = None
        self._checking: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Host and port as gRPC clients expect them; the port is known once this is open."""
        return f"{self._host}:{self._port}"

    async def open(self) -> None:
        """Start to accept calls.

        Raises:
            InputError: the port cannot be bound, or the certificate not be used.
        """
        limits = self._app.limits
        # So many calls stay within max_memory even with the largest messages.
        calls = max(1, min(_MAX_CALLS, limits.max_memory // limits.max_body))
        service = GrpcService(self._app, asyncio.get_running_loop())
        server = grpc.server(
            ThreadPoolExecutor(calls, thread_name_prefix="edgeclip grpc"),
            [grpc.method_handlers_generic_handler(SERVICE, service.handlers())],
            options=_options(limits),
            maximum_concurrent_rpcs=calls,
        )
        try:
            if self._tls is None:
                self._port = server.add_insecure_port(self.address)
            else:
                self._port = server.add_secure_port(self.address, _credentials(self._tls))
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot listen on {self.address} for gRPC: {error}") from None
        server.start()
        self._server = server
        self._checking = asyncio.create_task(_check_periodically(service, limits))

    async def close(self) -> None:
        """Stop accepting calls, and end those in flight."""
        if self._server is None or self._checking is None:
            return
        self._checking.cancel()
        await asyncio.to_thread(self._server.stop(_CLOSE_SECONDS).wait)


async def _check_periodically(service: GrpcService, limits: ServerLimits) -> None:
    while True:
        await asyncio.sleep(min(_CHECK_SECONDS, limits.body_seconds))
        service.end_slow_calls()


def _options(limits: ServerLimits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_connection_idle_ms", 1000 * limits.idle_seconds),
        # A compressed message can expand a thousandfold.
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        ("grpc.so_reuseport", 0),  # otherwise two servers may share a port unnoticed
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
