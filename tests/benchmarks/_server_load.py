"""Load on an HTTP server from a process of its own, on connections in threads.

    _server_load.py URL REQUEST.bin CONNECTIONS SECONDS

asks the same again and again, and prints what it measured as one JSON line.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from edgeclip.runtime.wire.messages import InferRequest, encode_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What was measured: answers with status 200, all others, and the time an answer took."""

    answers: int
    errors: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds


def load(url: str, request: InferRequest, *, connections: int, seconds: float) -> Load:
    """Ask a server the same from many connections at a time."""
    headers, body = encode_request(request)
    lines = [f"POST /v2/models/{request.model}/infer HTTP/1.1", f"Host: {urlsplit(url).netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with TemporaryDirectory() as folder:
        file = Path(folder, "request.bin")
        file.write_bytes(head.encode() + body)
        words = [sys.executable, __file__, url, str(file), str(connections), str(seconds)]
        return Load(**json.loads(subprocess.check_output(words)))


def ask(url: str, request: bytes, seconds: float, times: list[float], errors: list[bool]) -> None:
    """Send a request again and again on one connection, until the time is up."""
    parts = urlsplit(url)
    end = time.perf_counter() + seconds
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (start := time.perf_counter()) < end:
            sock.sendall(request)
            heard = b""
            while b"\r\n\r\n" not in heard:
                heard += received(sock)
            head, _, rest = heard.partition(b"\r\n\r\n")
            lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
            length = next(int(value) for name, _, value in lines if name == b"content-length")
            left = length - len(rest)
            while left > 0:
                left -= len(received(sock))
            if head.startswith(b"HTTP/1.1 200 "):
                times.append(time.perf_counter() - start)
            else:
                errors.append(True)


def received(sock: socket.socket) -> bytes:
    heard = sock.recv(1 << 16)
    if not heard:
        raise ConnectionError("the server closed the connection")
    return heard


def main() -> None:
    url, file, connections, seconds = sys.argv[1:]
    times, errors = list[float](), list[bool]()
    given = (url, Path(file).read_bytes(), float(seconds), times, errors)
    threads = [threading.Thread(target=ask, args=given) for _ in range(int(connections))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {"answers": len(times), "errors": len(errors), "seconds": time.perf_counter() - start}
    times.sort()
    for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
        found[name] = 1000 * times[int(len(times) * share)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
