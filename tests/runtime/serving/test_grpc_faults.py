"""Calls that end early, come late, or are no calls at all; and the server's end."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.grpc_codec import SERVICE
from edgeclip.runtime.serving.grpc_server import PUSHBACK, GrpcListener
from edgeclip.runtime.serving.limits import BatchLimits, ServerLimits
from edgeclip.runtime.serving.models import FunctionModel
from edgeclip.runtime.serving.security import TlsFiles, load_or_create_certificate
from edgeclip.runtime.serving.server import listen
from edgeclip.runtime.wire.messages import DEADLINE_MS
from tests.echo_function import echo as echo_function
from tests.runtime.serving.grpc_parts import (
    Held,
    Served,
    begin,
    call,
    infer_message,
    metrics,
    outputs_of,
    refusal,
    rows_message,
    serving,
    wait_for,
)

Code = grpc.StatusCode
SMALL = ServerLimits(max_body=2**20, max_json=2**10, body_seconds=0.2)


@pytest.fixture
def held() -> Iterator[Held]:
    model = Held()
    yield model
    model.go.set()


@pytest.fixture
def busy(held: Held) -> Iterator[Served]:
    """A server whose model runs a first call; one more may wait."""
    with serving(held, batches=BatchLimits(queue=1)) as served:
        first = begin(served.channel, "ModelInfer", rows_message("held"))
        assert held.began.acquire(timeout=20)
        yield served
        held.go.set()
        first.result()


@pytest.fixture(scope="module")
def echo() -> Iterator[Served]:
    with serving(FunctionModel(echo_function, "echo"), limits=SMALL) as served:
        yield served


def is_answered(served: Served) -> bool:
    message = infer_message("echo", {"data": np.zeros((2, 3), np.uint8)})
    sizes = outputs_of(call(served.channel, "ModelInfer", message))["size"]
    return [int(size) for size in sizes] == [3, 3]


def waiting(served: Served) -> int:
    """How many calls wait behind that which runs."""
    begin_of_line = 'edgeclip_waiting{model="held"}'
    (line,) = (line for line in metrics(served).splitlines() if line.startswith(begin_of_line))
    return int(float(line.split()[1]))


def test_a_cancelled_call_is_given_up(busy: Served, held: Held) -> None:
    second = begin(busy.channel, "ModelInfer", rows_message("held", rows=2))
    wait_for(lambda: waiting(busy) == 1)
    second.cancel()
    wait_for(lambda: waiting(busy) == 0)
    held.go.set()
    call(busy.channel, "ModelInfer", rows_message("held", rows=3))
    assert held.runs == [1, 3]


@pytest.mark.parametrize("deadline_ms", [None, 60_000.0])
def test_the_deadline_of_the_call_holds(
    busy: Served, held: Held, deadline_ms: float | None
) -> None:
    given = {} if deadline_ms is None else {DEADLINE_MS: deadline_ms}
    message = rows_message("held", rows=2, parameters=given)
    error = refusal(lambda: call(busy.channel, "ModelInfer", message, timeout=0.3))
    assert error.code() == Code.DEADLINE_EXCEEDED
    wait_for(lambda: waiting(busy) == 0)
    assert held.runs == [1]


def test_a_deadline_in_the_request_holds_too(busy: Served, held: Held) -> None:
    message = rows_message("held", rows=2, parameters={DEADLINE_MS: 200})
    error = refusal(lambda: call(busy.channel, "ModelInfer", message, timeout=60))
    assert (error.code(), "passed" in error.details()) == (Code.DEADLINE_EXCEEDED, True)
    assert held.runs == [1]


def test_a_full_queue_says_when_to_come_again(busy: Served) -> None:
    second = begin(busy.channel, "ModelInfer", rows_message("held"))
    wait_for(lambda: waiting(busy) == 1)
    error = refusal(lambda: call(busy.channel, "ModelInfer", rows_message("held")))
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert int(dict(error.trailing_metadata())[PUSHBACK]) >= 1000
    second.cancel()


def test_a_draining_server_ends_what_it_began(busy: Served, held: Held) -> None:
    second = begin(busy.channel, "ModelInfer", rows_message("held", rows=2))
    wait_for(lambda: waiting(busy) == 1)
    busy.app.drain()
    assert not call(busy.channel, "ServerReady").ready
    error = refusal(lambda: call(busy.channel, "ModelInfer", rows_message("held")))
    assert error.code() == Code.UNAVAILABLE
    assert PUSHBACK in dict(error.trailing_metadata())
    assert not busy.app.is_idle
    held.go.set()
    assert len(outputs_of(second.result())["data"]) == 2
    wait_for(lambda: busy.app.is_idle)


def test_the_end_of_the_grace_ends_what_runs(held: Held) -> None:
    with contextlib.ExitStack() as after, contextlib.ExitStack() as server:
        served = server.enter_context(serving(held, limits=ServerLimits(grace_seconds=0.1)))
        channel = after.enter_context(grpc.insecure_channel(served.address))
        running = begin(channel, "ModelInfer", rows_message("held"))
        assert held.began.acquire(timeout=20)
        server.close()
        assert running.code() == Code.UNAVAILABLE


def test_too_long_messages_are_refused(echo: Served) -> None:
    message = infer_message("echo", {"data": np.zeros((1, 2**21), np.uint8)})
    error = refusal(lambda: call(echo.channel, "ModelInfer", message))
    assert error.code() == Code.RESOURCE_EXHAUSTED
    typed = infer_message("echo", {"data": np.zeros((1, 2**11), np.uint8)})
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.uint_contents.extend([1] * 2**11)
    error = refusal(lambda: call(echo.channel, "ModelInfer", typed))
    assert (error.code(), "send tensors raw" in error.details()) == (Code.INVALID_ARGUMENT, True)
    assert is_answered(echo)


def test_compressed_messages_are_refused(echo: Served) -> None:
    message = infer_message("echo", {"data": np.zeros((1, 2**19), np.uint8)})
    gzip = grpc.Compression.Gzip
    error = refusal(lambda: call(echo.channel, "ModelInfer", message, compression=gzip))
    assert error.code() == Code.UNIMPLEMENTED
    assert is_answered(echo)


@pytest.mark.parametrize(
    ("messages", "words"),
    [((), "the call has no message"), ((b"\xff\xff",), "is no ModelInferRequest")],
)
def test_calls_without_a_request_are_refused(
    echo: Served, messages: tuple[bytes, ...], words: str
) -> None:
    stub: Any = echo.channel.stream_unary(f"/{SERVICE}/ModelInfer")
    error = refusal(lambda: stub(iter(messages)))
    assert (error.code(), words in error.details()) == (Code.INVALID_ARGUMENT, True)


def test_a_message_that_does_not_come_ends_its_call(echo: Served) -> None:
    held_back = threading.Event()

    def messages() -> Iterator[bytes]:
        held_back.wait(20)
        yield b""

    stub: Any = echo.channel.stream_unary(f"/{SERVICE}/ModelInfer")
    assert refusal(lambda: stub(messages())).code() == Code.CANCELLED
    held_back.set()
    assert is_answered(echo)


def test_more_calls_than_memory_are_refused(held: Held) -> None:
    limits = ServerLimits(max_body=2**20, max_memory=2**21)  # room for two
    with serving(held, limits=limits) as served:
        first = begin(served.channel, "ModelInfer", rows_message("held"))
        assert held.began.acquire(timeout=20)
        second = begin(served.channel, "ModelInfer", rows_message("held"))
        wait_for(lambda: waiting(served) == 1)
        error = refusal(lambda: call(served.channel, "ModelInfer", rows_message("held")))
        assert error.code() == Code.RESOURCE_EXHAUSTED
        held.go.set()
        assert [len(outputs_of(found.result())["data"]) for found in (first, second)] == [1, 1]


# HTTP/2 without a library, for no library sends what is not allowed (RFC 9113, RFC 7541).
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, ALL_HEADERS_AND_END = 1, 4, 5


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing or Huffman codes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


PLAIN = {
    b":method": b"POST",
    b":scheme": b"http",
    b":path": f"/{SERVICE}/ServerLive".encode(),
    b":authority": b"x",
    b"content-type": b"application/grpc",
    b"te": b"trailers",
}


@pytest.mark.parametrize(
    "odd",
    [
        {b":path": b"/\xff\xfe"},
        {b":path": f"/{SERVICE}/\u00e9".encode("latin-1")},
        {b":path": b""},
        {b":authority": b"\xff"},
        {b"authorization": b"Bearer \xff\xfe"},
        {b"user-agent": b"\xff"},
        {b"x-bin": b"\xff"},
        {b"grpc-timeout": b"\xff"},
    ],
    ids=str,
)
def test_headers_that_are_no_text_do_no_harm(echo: Served, odd: dict[bytes, bytes]) -> None:
    fields = b"".join(literal(*field) for field in {**PLAIN, **odd}.items())
    host, port = echo.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0, b""))
        connection.sendall(frame(HEADERS, ALL_HEADERS_AND_END, 1, fields))
        assert connection.recv(4096)
    assert is_answered(echo)


def test_bytes_that_are_no_http2_do_no_harm(echo: Served) -> None:
    host, port = echo.address.split(":")
    for garbage in (b"\0" * 4096, b"GET / HTTP/1.1\r\n\r\n", PREFACE + b"\xff" * 4096):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
    assert is_answered(echo)


def test_a_port_that_is_taken_is_told(echo: Served, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        door = GrpcListener(echo.app, host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(InputError, match="cannot listen on"):
            asyncio.run(door.open())
    files = load_or_create_certificate("127.0.0.1", tmp_path)
    lost = TlsFiles(certificate=files.certificate, key=tmp_path / "none", fingerprint="")
    door = GrpcListener(echo.app, host="127.0.0.1", port=0, tls=lost)
    with pytest.raises(InputError, match="none"):
        asyncio.run(door.open())
