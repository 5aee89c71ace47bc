"""HTTP connections that another thread can cancel, and the daemon threads that use them."""

import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import Url, parse_url

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import ClientBusyError

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_KEEP_ALIVE = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class CancelToken:
    """Cancel one exchange from another thread: its socket is shut down, and its thread wakes.

    A socket's own timeout counts from each read, so a server that sends a byte now and then
    could hold a thread forever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: _CancellableSocket | None = None
        self.is_cancelled = False

    def __call__(self) -> None:
        """Cancel the exchange, if it is still in progress."""
        with self._lock:
            self.is_cancelled = True
            if self._socket is not None:
                self._socket.shut_down(self)

    def attach(self, sock: "_CancellableSocket") -> None:
        with self._lock:
            self._socket = sock
            if self.is_cancelled:
                sock.shut_down(self)

    def detach(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.release(self)
            self._socket = None


_current = threading.local()


@contextmanager
def cancelled_by(token: CancelToken) -> Iterator[None]:
    """Let `token` cancel the exchange of this thread inside the block."""
    _current.token = token
    try:
        yield
    finally:
        _current.token = None
        token.detach()


class _CancellableSocket:
    """The socket of a connection, and the token of the exchange that uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._user: CancelToken | None = None
        self._is_closed = True

    def connect(self, sock: socket.socket) -> None:
        # A copy: TLS moves the descriptor to an object that only its own thread may use.
        with self._lock:
            self._drop()
            self._socket, self._is_closed = sock.dup(), False
        self.use()

    def use(self) -> None:
        """Assign the connection to the thread's current exchange."""
        user: CancelToken | None = getattr(_current, "token", None)
        with self._lock:
            self._user = user
        if user is not None:
            user.attach(self)

    def shut_down(self, user: CancelToken) -> None:
        """Shut the socket down if this exchange still uses it."""
        with self._lock:
            if self._user is user and self._socket is not None:
                _shut_down(self._socket)

    def close(self) -> None:
        """Mark the connection as closed; its last reply may still be read."""
        with self._lock:
            self._is_closed = True
            if self._user is None:
                self._drop()

    def release(self, user: CancelToken) -> None:
        """Release the connection at the end of an exchange."""
        with self._lock:
            if self._user is user:
                self._user = None
                if self._is_closed:
                    self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


class _PlainConnection(HTTPConnection):
    """A cancellable connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._cancellable = _CancellableSocket()
        super().__init__(*args, **options)

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        self._cancellable.connect(sock)
        return sock

    def request(self, *args: Any, **options: Any) -> None:
        self._cancellable.use()
        super().request(*args, **options)

    def close(self) -> None:
        super().close()
        self._cancellable.close()


class _TlsConnection(_PlainConnection, HTTPSConnection):
    """A cancellable connection with TLS."""


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """The address of a server, and how to verify its identity.

    Attributes:
        url: `http://` or `https://`, host, and perhaps port and path prefix.
        fingerprint: SHA-256 of the server's certificate, 64 hexadecimal digits, colons
            allowed. Only this certificate is trusted then, whatever its issuer and name.
        ca: file of CA certificates (PEM) to trust in place of the system's.
    """

    url: str
    fingerprint: str | None = None
    ca: str | None = None


def open_pool(address: Address, connections: int) -> tuple[HTTPConnectionPool, str]:
    """Return a pool of at most `connections` idle connections, and the prefix of all paths.

    Nothing is connected yet.

    Raises:
        InputError: an address that cannot be used.
    """
    url = _parse(address.url)
    options: dict[str, Any] = {"maxsize": connections, "retries": False, "timeout": 5.0}
    options["socket_options"] = [*HTTPConnection.default_socket_options, _KEEP_ALIVE]
    prefix = (url.path or "").rstrip("/")
    if url.scheme == "http":
        if address.fingerprint or address.ca:
            raise InputError(f"{address.url} has no certificate to check: write https://")
        return _PlainPool(str(url.host), url.port or 80, **options), prefix
    return _TlsPool(str(url.host), url.port or 443, **options, **_trust(address)), prefix


def is_confidential(url: str) -> bool:
    """Return whether nobody else can read the traffic: TLS, or a host that is this machine.

    Raises:
        InputError: an address that cannot be used.
    """
    found = _parse(url)
    return found.scheme == "https" or str(found.host).strip("[]") in _LOCAL_HOSTS


def _parse(text: str) -> Url:
    try:
        url = parse_url(text)
    except HTTPError as error:
        raise InputError(f"{text!r} is not the address of a server: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or "://" not in text:
        raise InputError(
            f"{text!r} is not the address of a server: write http://HOST:PORT or https://"
        )
    if url.auth or url.query or url.fragment:
        raise InputError(
            "the address of a server has no user, query or fragment: give a token instead"
        )
    return url


def _trust(address: Address) -> dict[str, Any]:
    if address.fingerprint is None:
        return {"cert_reqs": "CERT_REQUIRED", "ca_certs": address.ca}
    pinned = address.fingerprint.replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(pinned):
        raise InputError(
            "a fingerprint is the SHA-256 of a certificate, 64 hexadecimal digits, not "
            f"{address.fingerprint[:80]!r}"
        )
    # The certificate itself is known: neither its issuer nor its name adds anything.
    return {"cert_reqs": "CERT_NONE", "assert_fingerprint": pinned}


T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]"]


class DaemonThreads:
    """A pool of daemon threads without a queue, started on demand and kept.

    Unlike with `concurrent.futures.ThreadPoolExecutor`, nothing ever waits for a thread that
    hangs, and a hanging thread does not keep the program from ending.

    Args:
        max_threads: maximum number of threads.
        name: name of the threads.

    Raises:
        InputError: `max_threads` is below 1.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        if max_threads < 1:
            raise InputError(f"{max_threads} workers: take at least 1")
        self._max_threads, self._name = max_threads, name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._busy = 0  # jobs that are not done
        self._threads = 0
        self._is_closed = False

    @property
    def busy(self) -> int:
        """The number of busy threads."""
        return self._busy

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` on a free thread.

        Raises:
            ClientBusyError: no thread is free, or the pool is closed.
        """
        with self._lock:
            if self._is_closed:
                raise ClientBusyError("the connection to the server was closed: open it anew")
            if self._busy == self._max_threads:
                raise ClientBusyError(
                    f"{self._max_threads} calls wait for the server already: make fewer at a time, "
                    "or allow more connections"
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
            raise ClientBusyError(f"the system starts no further thread: {error}") from None
        self._threads += 1

    def close(self) -> None:
        """Let the threads end when they are done; a hanging one ends at its own timeout."""
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
            except BaseException as error:  # raised in the caller
                self._done()
                future.set_exception(error)
            else:
                self._done()
                future.set_result(result)
            del job, work, future  # a waiting thread must not keep objects of its last job alive

    def _done(self) -> None:
        with self._lock:
            self._busy -= 1
