"""A client that says exactly what a test wants said, and a server in a process of its own."""

import http.client
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgeclip.runtime.wire.messages import (
    JSON_LENGTH_HEADER,
    InferRequest,
    InferResponse,
    decode_response,
    encode_request,
    json_length,
)

PATIENCE = 30.0  # seconds after which a test is broken, not slow
_ROOT = Path(__file__).parents[3]
_SERVE = (sys.executable, "-m", "edgeclip.runtime.cli.main", "serve")


@dataclass(frozen=True)
class Heard:
    """What a server answered; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        text = self.json["error"]
        assert isinstance(text, str)
        return text

    @property
    def response(self) -> InferResponse:
        assert self.status == 200, self.body
        return decode_response(self.body, json_length(self.headers.get(JSON_LENGTH_HEADER.lower())))


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE)


def raw_socket(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=PATIENCE)


def hear(connection: http.client.HTTPConnection) -> Heard:
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return Heard(answer.status, headers, answer.read())


def ask(
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Heard:
    """One request on a connection of its own; an iterable body is sent in chunks."""
    connection = connect(url)
    try:
        chosen = method or ("GET" if body is None else "POST")
        connection.request(chosen, path, body, dict(headers or {}))
        return hear(connection)
    finally:
        connection.close()


def infer(url: str, request: InferRequest, headers: Mapping[str, str] | None = None) -> Heard:
    own, body = encode_request(request)
    path = f"/v2/models/{request.model}/infer"
    return ask(url, path, body, headers={**own, **(headers or {})})


def in_thread(url: str, request: InferRequest) -> "tuple[threading.Thread, list[Heard]]":
    heard: list[Heard] = []
    thread = threading.Thread(target=lambda: heard.append(infer(url, request)))
    thread.start()
    return thread, heard


def until(condition: Callable[[], bool]) -> None:
    """Ask again until it is so."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to be so")


def metric(url: str, name: str) -> float:
    lines = ask(url, "/metrics").body.decode().splitlines()
    found = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return float(found[0]) if found else 0.0


class ServeProcess:
    """`edgeclip serve` in a process; its lines on stdout and stderr."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._out: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.said: list[str] = []
        assert process.stdout
        assert process.stderr
        for stream, take in ((process.stdout, self._out.put), (process.stderr, self.said.append)):
            threading.Thread(target=_copy, args=(stream, take), daemon=True).start()

    def ready(self) -> str:
        """Wait for the line that says it serves, and return its address."""
        try:
            return self._out.get(timeout=PATIENCE).split(" at ")[1]
        except queue.Empty:
            raise AssertionError(f"the server did not start: {self.said}") from None

    def end(self) -> int:
        """Wait for its end."""
        return self.process.wait(PATIENCE)


@contextmanager
def serve_process(
    *words: str, cache: Path, cwd: Path | None = None, port: str = "0"
) -> Iterator[ServeProcess]:
    """Start `edgeclip serve` with a cache folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "EDGECLIP_TOKEN"}
    process = subprocess.Popen(
        [*_SERVE, *words, "--port", port],
        cwd=cwd or _ROOT,
        env={**environment, "EDGECLIP_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield ServeProcess(process)
    finally:
        process.kill()
        process.wait(PATIENCE)


def _copy(stream: Any, take: Any) -> None:
    for line in stream:
        take(line.rstrip("\n"))
