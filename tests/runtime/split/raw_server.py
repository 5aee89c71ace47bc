"""A server on a bare socket that answers as it should, or misbehaves in any way asked for."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from edgeclip.runtime.wire.messages import (
    JSON_LENGTH_HEADER,
    SPACE_ID,
    InferRequest,
    InferResponse,
    decode_request,
    encode_response,
    json_length,
)

Answer = Callable[[InferRequest], InferResponse]
_PATIENCE = 30.0  # seconds after which what waits for the end of a test gives up


@dataclass
class Call:
    """One HTTP request, and the socket to answer on."""

    server: "RawServer"
    sock: socket.socket
    path: str
    headers: dict[str, str]
    body: bytes

    def request(self) -> InferRequest:
        length = json_length(self.headers.get(JSON_LENGTH_HEADER.lower()))
        return decode_request(self.path.split("/")[-2], self.body, length)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def good(self) -> bytes:
        """The bytes of a right answer."""
        if not self.path.endswith("/infer"):
            return ok({}, b'{"ready": true}')
        return ok(*encode_response(self.server.answer(self.request())))


Behaviour = Callable[[Call], None]


def echo(request: InferRequest) -> InferResponse:
    """Give the inputs back, in the request's space."""
    space = {key: request.parameters[key] for key in (SPACE_ID,) if key in request.parameters}
    return InferResponse(
        model=request.model, outputs=request.inputs, parameters=space, id=request.id
    )


def ok(headers: dict[str, str], body: bytes) -> bytes:
    """The bytes of a reply with status 200."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def good(call: Call) -> None:
    call.send(call.good())


def slow(seconds: float) -> Behaviour:
    def behave(call: Call) -> None:
        call.server.stopped.wait(seconds)
        call.send(call.good())

    return behave


def hang(call: Call) -> None:
    call.server.stopped.wait(_PATIENCE)
    drop(call)


def drop(call: Call) -> None:
    call.sock.shutdown(socket.SHUT_RDWR)


def truncated(call: Call) -> None:
    call.send(call.good()[:-10])
    call.sock.shutdown(socket.SHUT_RDWR)


def trickling(call: Call) -> None:
    """Send a right answer so slowly that no read ever times out."""
    for byte in call.good():
        call.send(bytes([byte]))
        if call.server.stopped.wait(0.01):
            return


def garbage(call: Call) -> None:
    call.send(b"\x00\xff\x13 this is no HTTP\r\n\r\n")
    call.sock.shutdown(socket.SHUT_RDWR)


def html(call: Call) -> None:
    call.send(ok({"Content-Type": "text/html"}, b"<html>please log in</html>"))


def endless(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not call.server.stopped.is_set():
        call.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def gigantic(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
    call.server.stopped.wait(_PATIENCE)


def status(code: int, headers: str = "", body: bytes = b'{"error": "because"}') -> Behaviour:
    def behave(call: Call) -> None:
        head = f"HTTP/1.1 {code} Whatever\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        call.send(head.encode() + body)

    return behave


@dataclass
class RawServer:
    """What the server does; it may be changed while it runs.

    `behave` is what each request for an inference gets; `script` what the first ones get
    instead, one after the other. `requests` are those that were read whole.
    """

    answer: Answer = echo
    behave: Behaviour = good
    script: list[Behaviour] = field(default_factory=list)
    ready: Behaviour | None = None
    tls: ssl.SSLContext | None = None
    requests: list[InferRequest] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    probes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError), self._secured(sock) as sock:
            while (call := _read(self, sock)) is not None:
                self._dispatch(call)

    def _secured(self, sock: socket.socket) -> socket.socket:
        return sock if self.tls is None else self.tls.wrap_socket(sock, server_side=True)

    def _dispatch(self, call: Call) -> None:
        if call.path.endswith("/v2/health/ready"):
            self.probes += 1
            default = status(200) if self.behave is good else self.behave
            (self.ready or default)(call)
            return
        self.heads.append(call.headers)
        self.requests.append(call.request())
        behave = self.script.pop(0) if self.script else self.behave
        behave(call)


def _read(server: RawServer, sock: socket.socket) -> Call | None:
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        if not part:
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    while len(body) < int(headers.get("content-length", "0")):
        part = sock.recv(65536)
        if not part:
            return None
        body += part
    return Call(server, sock, first.split(" ")[1], headers, body)


@contextmanager
def serving(server: RawServer, port: int = 0) -> Iterator[RawServer]:
    """Run a server until the block ends."""
    listener = socket.create_server(("127.0.0.1", port))
    scheme = "http" if server.tls is None else "https"
    server.url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextmanager
def dropping_syn() -> Iterator[str]:
    """The address of a host that answers nothing at all, not even to a connection attempt.

    Linux drops connection attempts to a listener whose backlog is full.
    """
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def refusing_address() -> str:
    """The address of a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def a_request(model: str = "echo", size: int = 4, **parameters: str) -> InferRequest:
    """A small request."""
    values = np.arange(size, dtype=np.float32)[None]
    return InferRequest(model=model, inputs={"x": values}, parameters=parameters)
