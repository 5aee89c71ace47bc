"""The server over real sockets: what it answers to whom, and that nothing brings it down."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.limits import ServerLimits
from edgeclip.runtime.serving.models import FunctionModel, Registry
from edgeclip.runtime.serving.server import in_background
from edgeclip.runtime.wire.messages import (
    SERVER_TIMING_HEADER,
    InferRequest,
    encode_request,
    server_timing_ms,
)
from tests.echo_function import echo
from tests.runtime.serving.ask_server import ask, connect, hear, infer, raw_socket
from tests.runtime.serving.odd_models import SPACE, GatedModel, question, rows

GATED, ECHO = "/v2/models/gated/infer", "/v2/models/echo/infer"


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    """A server for all tests that leave it as it is."""
    registry = Registry()
    registry.add(GatedModel())
    registry.add(FunctionModel(echo, "echo"))
    limits = ServerLimits(max_body=100_000, max_json=50_000)
    with in_background(App(registry, limits=limits)) as url:
        yield url


def test_statistics_are_elsewhere(shared: str) -> None:
    for path in ("/v2/models/stats", "/v2/models/gated/stats", "/v2/models/gated/versions/1/stats"):
        refused = ask(shared, path)
        assert refused.status == 404
        assert "GET /metrics" in refused.json["error"]


def test_server_and_models_describe_themselves(shared: str) -> None:
    server = ask(shared, "/v2").json
    assert server["name"] == "edgeclip"
    assert server["extensions"] == ["binary_tensor_data"]
    assert server["models"] == ["gated", "echo"]
    expected = {
        "name": "gated",
        "versions": ["1"],
        "platform": "edgeclip",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "sum", "datatype": "FP32", "shape": [-1]}],
        "parameters": {"space_id": SPACE},
    }
    assert ask(shared, "/v2/models/gated").json == expected
    assert ask(shared, "/v2/models/gated/versions/1").json == expected
    assert ask(shared, "/v2/models/gated/ready").json == {"name": "gated", "ready": True}
    assert ask(shared, "/v2/health/live").json == {"live": True}
    assert ask(shared, "/v2/health/ready").json == {"ready": True}
    assert ask(shared, "/v2/health/ready", method="HEAD").status == 200


def test_answers_are_binary_or_json_as_asked(shared: str) -> None:
    response = infer(shared, question(1, 2)).response
    assert response.outputs["sum"].tolist() == [2, 3]
    assert (response.model, response.id) == ("gated", "q1")
    assert response.parameters == {"space_id": SPACE}
    body = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[3, 4]]}]}
    )
    found = ask(shared, "/v2/models/gated/versions/1/infer", body).json["outputs"]
    assert found == [{"name": "sum", "datatype": "FP32", "shape": [1], "data": [7.0]}]


def test_outputs_are_chosen(shared: str) -> None:
    request = InferRequest(model="gated", inputs=rows(1), outputs=("sum",))
    assert list(infer(shared, request).response.outputs) == ["sum"]
    request = InferRequest(model="gated", inputs=rows(1), outputs=("product",))
    heard = infer(shared, request)
    assert (heard.status, heard.error) == (400, "no output 'product'; there are sum")


def test_values_that_json_lacks_are_asked_for_in_binary(shared: str) -> None:
    plain = InferRequest(model="gated", inputs=rows(np.inf), binary=False)
    heard = infer(shared, plain)
    assert heard.status == 400
    assert "ask for binary" in heard.error
    assert infer(shared, question(np.inf)).response.outputs["sum"].tolist() == [np.inf]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/", 404, "begins at /v2"),
        ("GET", "/v2/nothing", 404, "begins at /v2"),
        ("GET", "/v2/health", 404, "begins at /v2"),
        ("GET", "/v2/health/other", 404, "begins at /v2"),
        ("GET", "/v2/models", 404, "begins at /v2"),
        ("GET", "/v2/models/other", 404, "there are gated, echo"),
        ("GET", "/v2/models/other/ready", 404, "there are gated, echo"),
        ("POST", "/v2/models/other/infer", 404, "there are gated, echo"),
        ("POST", "/v2/models/%2e%2e%2fgated/infer", 404, "begins at /v2"),
        ("POST", "/v2/models/gated/versions/2/infer", 404, "version 1 only"),
        ("POST", "/v2/models/gated/versions", 404, "version 1 only"),
        ("GET", GATED, 405, "takes POST"),
        ("POST", "/v2", 405, "takes GET"),
        ("DELETE", "/v2/models/gated", 405, "takes GET"),
        ("POST", "/v2/health/ready", 405, "takes GET"),
        ("PUT", "/metrics", 405, "takes GET"),
        ("POST", GATED, 400, "JSON"),
    ],
)
def test_wrong_paths_and_methods(
    shared: str, method: str, path: str, status: int, words: str
) -> None:
    heard = ask(shared, path, b"" if method == "POST" else None, method=method)
    assert heard.status == status
    assert words in heard.error
    assert ("allow" in heard.headers) == (status == 405)


def test_mistakes_of_the_client_are_explained(shared: str) -> None:
    wrong_shape = InferRequest(model="gated", inputs={"x": np.zeros((1, 3), np.float32)})
    for request, status, words in (
        (wrong_shape, 400, "is FP32 [-1, 2]"),
        (question(np.nan), 400, "a row begins with NaN"),
        (question(1, space_id="b" * 64), 409, "made in the embedding space bbbbbbbbbbbb"),
        (question(1, space_id=5), 400, "must be a text"),
        (question(1, deadline_ms="soon"), 400, "must be a number"),
        (question(1, deadline_ms=0), 504, "deadline"),
        (question(1, deadline_ms=-1e300), 504, "deadline"),
    ):
        heard = infer(shared, request)
        assert (heard.status, words in heard.error) == (status, True), heard.error
    assert infer(shared, question(1, space_id=SPACE, deadline_ms=1e300)).status == 200


def test_faults_of_the_model_are_not_told_in_detail(
    shared: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard = infer(shared, question(-1))
    assert heard.status == 500
    assert heard.error == "the model failed (ZeroDivisionError): see the server's log"
    assert "secret detail" in caplog.text
    assert infer(shared, question(-2)).status == 500
    assert infer(shared, question(1)).status == 200


def test_bodies_have_their_bounds(shared: str) -> None:
    connection = connect(shared)
    connection.request("POST", ECHO, bytes(100_001))
    heard = hear(connection)
    assert heard.status == 413
    assert "larger than 100000 bytes" in heard.error
    # The rest of the body was taken off the connection, which goes on.
    connection.request("GET", "/v2/health/live")
    assert hear(connection).status == 200
    chunks = [bytes(1000)] * 101
    assert ask(shared, ECHO, iter(chunks)).status == 413
    assert ask(shared, ECHO, iter(chunks[:9])).status == 400
    assert "as binary" in ask(shared, ECHO, bytes(60_000)).error
    assert ask(shared, ECHO, b"{}", headers={"Content-Encoding": "gzip"}).status == 415


def test_chunks_are_put_together(shared: str) -> None:
    headers, body = encode_request(question(1, 2, 3))
    parts = (body[start : start + 100] for start in range(0, len(body), 100))
    heard = ask(shared, GATED, parts, headers=headers)
    assert heard.response.outputs["sum"].tolist() == [2, 3, 4]


def test_who_expects_to_be_told_to_go_on_is_told(shared: str) -> None:
    headers, body = encode_request(question(1))
    lines = [f"POST {GATED} HTTP/1.1", "Host: x", "Expect: 100-continue"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with raw_socket(shared) as sock:
        sock.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
        sock.sendall(body)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    with raw_socket(shared) as sock:  # refused before the body: the connection is closed
        sock.sendall("\r\n".join([*lines, "Content-Length: 999999", "", ""]).encode())
        heard = b"".join(iter(lambda: sock.recv(1000), b""))
        assert heard.startswith(b"HTTP/1.1 413 ")


def test_a_head_without_end_is_refused(shared: str) -> None:
    endless = b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 100_000_000
    with raw_socket(shared) as sock, pytest.raises(ConnectionError):
        sock.sendall(endless)


def test_a_head_that_is_too_large_is_refused(shared: str) -> None:
    with raw_socket(shared) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 70_000)
        time.sleep(0.2)  # until it was read: an unread rest would reset the connection
        sock.sendall(b"x")
        assert sock.recv(1000).startswith(b"HTTP/1.1 431 ")
    with raw_socket(shared) as sock:  # a large head within the bound
        sock.sendall(b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 50_000 + b"\r\nHost: x\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_response_tells_how_long_the_server_worked(shared: str) -> None:
    began = time.monotonic()
    heard = infer(shared, question(1))
    took = 1e3 * (time.monotonic() - began)
    ms = server_timing_ms(heard.headers[SERVER_TIMING_HEADER])
    assert ms is not None
    assert 0 < ms < took


def test_many_clients_get_their_own_answers(shared: str) -> None:
    def one(number: int) -> None:
        values = [number + place for place in range(number % 3 + 1)]
        found = infer(shared, question(*values)).response.outputs["sum"].tolist()
        assert found == [value + 1 for value in values]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(100)))


@given(
    st.binary(max_size=300) | st.text(max_size=100).map(str.encode),
    st.none() | st.integers(-5, 400).map(str) | st.text("0123456789abc -", max_size=6),
    st.sampled_from([GATED, ECHO]),
)
@settings(max_examples=150)
def test_no_body_is_a_fault_of_the_server(
    shared: str, body: bytes, length: str | None, path: str
) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    heard = ask(shared, path, body, headers=headers)
    assert heard.status in (400, 413)
    assert heard.error


@given(
    st.lists(
        st.binary(max_size=80)
        | st.sampled_from(
            [
                *(b"GET ", b"POST ", b"/v2", b"/v2/models/gated/infer", b" HTTP/1.1", b"\r\n"),
                *(b"\r\n\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"),
                *(b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"5\r\nhello\r\n", b"0\r\n"),
                *(b"Expect: 100-continue\r\n", b"Content-Length: -1\r\n", b"PRI * HTTP/2.0"),
            ]
        ),
        max_size=10,
    )
)
@settings(max_examples=150)
def test_no_bytes_bring_the_server_down(shared: str, parts: list[bytes]) -> None:
    with raw_socket(shared) as sock, suppress(ConnectionError):
        for part in parts:
            sock.sendall(part)
    assert ask(shared, "/v2/health/ready").status == 200


def test_answers_on_one_connection_come_in_order(shared: str) -> None:
    request = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with raw_socket(shared) as sock:
        sock.sendall(request * 3)
        heard = b""
        while heard.count(b'{"live": true}') < 3:
            heard += sock.recv(1000)
    assert heard.count(b"HTTP/1.1 200 ") == 3
