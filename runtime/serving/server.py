"""Run the server: uvicorn with uvloop and httptools, in this thread or in the background."""

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

_MOST_HEAD_BYTES = 64 * 2**10


def bounded_protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """A protocol class that closes connections which take too long over the head of a request.

    A head that is not whole after 64 KiB, and what was read with them, is answered with 400.

    Args:
        head_seconds: from the opening of the connection, or the first byte of a later
            request, to the end of the head.
    """

    class BoundedProtocol(HttpToolsProtocol):
        """Counts bytes and seconds until the head of each request is whole."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # The parser keeps a header until it is whole, and says nothing meanwhile.
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.send_400_response("The head of the request is too large.")
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
            self._head_timer = self.loop.call_later(head_seconds, self.transport.close)

        def _end_head(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedProtocol


_POLL = 0.02  # seconds
_LAST_SECONDS = 1  # for the last answers to be sent
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Door(Protocol):
    """Another way into the application, in the same event loop."""

    async def open(self) -> None:
        """Take requests."""
        ...

    async def close(self) -> None:
        """Take no more, and end what is still under way."""
        ...


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket, so that a port that is taken is known before anything is loaded.

    Args:
        host: name or address.
        port: 0 lets the system choose.

    Raises:
        InputError: no such host, or the port cannot be had.
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


def address_of(bound: socket.socket, tls: TlsFiles | None = None) -> str:
    """The address of a server that listens on a socket, such as http://127.0.0.1:8000."""
    host, port = bound.getsockname()[:2]
    scheme = "http" if tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def serve(
    app: App,
    bound: socket.socket,
    *,
    tls: TlsFiles | None = None,
    ready: Callable[[], None] = lambda: None,
    doors: Sequence[Door] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, then let what is under way end.

    From the signal on the server is not ready and refuses what comes, for at most
    `app.limits.grace_seconds`; a second SIGINT ends it at once.

    Args:
        app: what is served.
        bound: see `listen`; it is closed at the end.
        tls: certificate and key; None for plain HTTP.
        ready: called when connections are accepted.
    """
    server = _Server(app, tls, ready, doors)
    with _signals_that_end_well():
        server.run([bound])


@contextlib.contextmanager
def in_background(
    app: App,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TlsFiles | None = None,
    doors: Sequence[Door] = (),
) -> Iterator[str]:
    """Serve in a thread of this process, and give the address; the end of the block ends it.

    Raises:
        InputError: see `listen`.
    """
    bound = listen(host, port)
    is_ready = threading.Event()
    server = _Server(app, tls, is_ready.set, doors)

    def run() -> None:
        try:
            server.run([bound])
        finally:
            is_ready.set()

    thread = threading.Thread(target=run, name="edgeclip server", daemon=True)
    address = address_of(bound, tls)
    thread.start()
    is_ready.wait()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """Drains the application before uvicorn closes the connections."""

    def __init__(
        self, app: App, tls: TlsFiles | None, ready: Callable[[], None], doors: Sequence[Door]
    ) -> None:
        limits = app.limits
        super().__init__(
            uvicorn.Config(
                app,
                loop=_loop(),
                http=bounded_protocol(limits.head_seconds),
                ws="none",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                # The application reports its own failures; what is left are broken requests.
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=_LAST_SECONDS,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
            )
        )
        self._app = app
        self._ready = ready
        self._doors = doors

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for door in self._doors:
            await door.open()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.drain()
        end = time.monotonic() + self._app.limits.grace_seconds
        while not (self._app.is_idle or self.force_exit) and time.monotonic() < end:
            await asyncio.sleep(_POLL)
        self._app.close()
        for door in self._doors:
            await door.close()
        await super().shutdown(sockets)


def _loop() -> Literal["uvloop", "asyncio"]:
    """uvloop where it is installed, which it cannot be on Windows."""
    return "asyncio" if importlib.util.find_spec("uvloop") is None else "uvloop"


@contextlib.contextmanager
def _signals_that_end_well() -> Iterator[None]:
    """Let the signals that end the server pass by afterwards.

    uvicorn raises those that it caught once more when it is done, with the handlers that
    were there before: SIGTERM would then kill the process that has just ended well.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
