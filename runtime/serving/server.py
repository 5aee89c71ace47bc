"""Run the HTTP server (uvicorn with uvloop and httptools) in this thread or in the background."""

import asyncio
import contextlib
import importlib.util
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.security import TlsFiles

_MAX_HEAD_BYTES = 64 * 2**10
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)
_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 1  # for the last responses to be sent
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Listener(Protocol):
    """A further port of the application, such as gRPC's, in the same event loop."""

    async def open(self) -> None:
        """Start to accept requests."""
        ...

    async def close(self) -> None:
        """Stop accepting requests, and end those in flight."""
        ...


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; done first, so that a taken port is reported before anything is loaded.

    Args:
        host: name or address.
        port: 0 for any free port.

    Raises:
        InputError: no such host, or the port cannot be bound.
    """
    if not 0 <= port < 2**16:  # getaddrinfo would take it modulo that
        raise InputError(f"there is no port {port}: give 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"cannot listen on {host} port {port}: {error}") from None
    return bound


def url_of(bound: socket.socket, tls: TlsFiles | None = None) -> str:
    """Return the URL of a server on a bound socket, such as http://127.0.0.1:8000."""
    host, port = bound.getsockname()[:2]
    scheme = "http" if tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def serve(
    app: App,
    bound: socket.socket,
    *,
    tls: TlsFiles | None = None,
    ready: Callable[[], None] = lambda: None,
    listeners: Sequence[Listener] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, then drain: finish the requests in flight.

    From the signal on the server reports that it is not ready and refuses new requests, for at
    most `app.limits.grace_seconds`; a second SIGINT ends it at once.

    Args:
        app: the application.
        bound: see `listen`; it is closed at the end.
        tls: certificate and key; None for plain HTTP.
        ready: called when connections are accepted.
        listeners: further ports, opened and closed with this one.
    """
    server = _Server(app, tls, ready, listeners)
    with _ignore_repeated_signals():
        server.run([bound])


@contextlib.contextmanager
def in_background(
    app: App,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TlsFiles | None = None,
    listeners: Sequence[Listener] = (),
) -> Iterator[str]:
    """Serve in a thread of this process inside the block, and yield the URL.

    Raises:
        InputError: see `listen`.
    """
    bound = listen(host, port)
    is_ready = threading.Event()
    server = _Server(app, tls, is_ready.set, listeners)

    def run() -> None:
        try:
            server.run([bound])
        finally:
            is_ready.set()

    thread = threading.Thread(target=run, name="edgeclip server", daemon=True)
    url = url_of(bound, tls)
    thread.start()
    is_ready.wait()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """A uvicorn server that drains the application before it closes the connections."""

    def __init__(
        self,
        app: App,
        tls: TlsFiles | None,
        ready: Callable[[], None],
        listeners: Sequence[Listener],
    ) -> None:
        limits = app.limits
        super().__init__(
            uvicorn.Config(
                app,
                loop=_loop(),
                http=http_protocol(limits.head_seconds),
                ws="none",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                # The application logs its own failures; uvicorn would log malformed requests only.
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
            )
        )
        self._app = app
        self._ready = ready
        self._listeners = listeners

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in self._listeners:
            await listener.open()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.drain()
        end = time.monotonic() + self._app.limits.grace_seconds
        while not (self._app.is_idle or self.force_exit) and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        self._app.close()
        for listener in self._listeners:
            await listener.close()
        await super().shutdown(sockets)


def http_protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's httptools protocol with bounds on the size and duration of a request's head.

    A head of more than 64 KiB is answered with 431; one that is not complete after
    `head_seconds` (from the opening of the connection, or the first byte of a later request)
    ends the connection.

    uvicorn has no option for either: `h11_max_incomplete_event_size` bounds the slower h11
    parser alone, and no option bounds the time. Without this class one connection can fill the
    memory, since httptools keeps a header until it is complete. `uvicorn.Config.http` accepts a
    protocol class; this one relies on the methods of `asyncio.Protocol` and the callbacks that
    httptools documents, and on nothing else of its base class.
    """

    class LimitedHeadProtocol(HttpToolsProtocol):
        """Count bytes and seconds until the head of each request is complete."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._close: Callable[[], None] = transport.close
            self._write: Callable[[bytes], None] = transport.write
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # Checked before the parser sees more: it says nothing until a header is complete.
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._write(_HEAD_TOO_LARGE)
                self._close()
                return
            super().data_received(data)
            if self._head_timer is not None:
                self._head_bytes += len(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def _begin_head(self) -> None:
            self._end_head()
            loop = asyncio.get_running_loop()
            self._head_timer = loop.call_later(head_seconds, self._close)

        def _end_head(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedHeadProtocol


def _loop() -> Literal["uvloop", "asyncio"]:
    """Return uvloop if it is installed (it does not exist on Windows)."""
    return "asyncio" if importlib.util.find_spec("uvloop") is None else "uvloop"


@contextlib.contextmanager
def _ignore_repeated_signals() -> Iterator[None]:
    """Ignore the signals that ended the server once it has ended.

    uvicorn raises the signals that it caught again when it is done, with the handlers that were
    there before: SIGTERM would then kill a process that has just shut down cleanly.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
