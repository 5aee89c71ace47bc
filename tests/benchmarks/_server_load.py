"""Load on an HTTP server from another process: `wrk` (Debian's package wrk), or Python itself.

    _server_load.py URL BODY.bin JSON_LENGTH CONNECTIONS SECONDS

is the part in Python: it prints what it measured as one JSON line.
"""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from edgeclip.runtime.wire.messages import JSON_LENGTH_HEADER

# No pipelining: a connection sends its next request when it has the answer to the last.
_LUA = """
wrk.method = "POST"
local file = io.open("BODY", "rb")
wrk.body = file:read("*all")
file:close()
wrk.headers["Content-Type"] = "application/octet-stream"
wrk.headers["HEADER"] = "LENGTH"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\n{"answers": %d, "errors": %d, "seconds": %f, "p50_ms": %f, ' ..
    '"p99_ms": %f}\\n', summary.requests, e.connect + e.read + e.write + e.status + e.timeout,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What was measured: answers with status 200, all others, and the time an answer took."""

    answers: int
    errors: int
    seconds: float
    p50_ms: float
    p99_ms: float


def tool() -> str:
    """What makes the load here."""
    return "wrk" if shutil.which("wrk") else "Python (apt-get install wrk for a quicker one)"


def load(url: str, body: bytes, json_length: str, *, connections: int, seconds: int) -> Load:
    """Ask the same again and again, on several connections at a time.

    Args:
        url: of the model's inference.
        body: of each request.
        json_length: what its header says.
        connections: how many ask at a time.
        seconds: how long; wrk takes whole ones.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "body.bin")
        file.write_bytes(body)
        if shutil.which("wrk"):
            script = Path(folder, "post.lua")
            text = _LUA.replace("BODY", str(file)).replace("HEADER", JSON_LENGTH_HEADER)
            script.write_text(text.replace("LENGTH", json_length), encoding="utf-8")
            words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), url]
        else:
            words = [sys.executable, __file__, url, str(file), json_length]
            words += [str(connections), str(seconds)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
    return Load(**json.loads(done.stdout.strip().splitlines()[-1]))


class _Clients:
    """Connections in threads of this process."""

    def __init__(self, url: str, body: bytes, json_length: str, seconds: int) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        head += f"{JSON_LENGTH_HEADER}: {json_length}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._end = time.perf_counter() + seconds
        self._lock = threading.Lock()
        self.times: list[float] = []
        self.errors = 0

    def run(self) -> None:
        """Ask on one connection until the time is up."""
        times, errors = [], 0
        with socket.create_connection(self._address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (start := time.perf_counter()) < self._end:
                sock.sendall(self._request)
                if _answer(sock):
                    times.append(time.perf_counter() - start)
                else:
                    errors += 1
        with self._lock:
            self.times += times
            self.errors += errors


def _answer(sock: socket.socket) -> bool:
    """Read one answer; whether its status is 200."""
    heard = b""
    while b"\r\n\r\n" not in heard:
        heard += _received(sock)
    head, _, rest = heard.partition(b"\r\n\r\n")
    lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    left = next(int(value) for name, _, value in lines if name == b"content-length") - len(rest)
    while left > 0:
        left -= len(_received(sock))
    return head.startswith(b"HTTP/1.1 200 ")


def _received(sock: socket.socket) -> bytes:
    heard = sock.recv(1 << 16)
    if not heard:
        raise ConnectionError("the server closed the connection")
    return heard


def main() -> int:
    """Ask from Python."""
    url, body, json_length, connections, seconds = sys.argv[1:]
    clients = _Clients(url, Path(body).read_bytes(), json_length, int(seconds))
    threads = [threading.Thread(target=clients.run) for _ in range(int(connections))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(clients.times)
    found = Load(
        answers=len(times),
        errors=clients.errors,
        seconds=time.perf_counter() - start,
        p50_ms=1000 * times[len(times) // 2],
        p99_ms=1000 * times[int(len(times) * 0.99)],
    )
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
