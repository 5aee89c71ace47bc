"""The server under pressure: full queues, deadlines, clients that leave or dawdle, and its end."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.limits import BatchLimits, ServerLimits
from edgeclip.runtime.serving.models import FunctionModel, Registry
from edgeclip.runtime.serving.server import in_background
from edgeclip.runtime.wire.messages import InferRequest, encode_request
from tests.echo_function import echo
from tests.runtime.serving.ask_server import (
    PATIENCE,
    Heard,
    ask,
    connect,
    in_thread,
    infer,
    metric,
    raw_socket,
    until,
)
from tests.runtime.serving.odd_models import GatedModel, question

Start = Callable[..., AbstractContextManager[str]]
GATED, ECHO = "/v2/models/gated/infer", "/v2/models/echo/infer"


@pytest.fixture
def model() -> GatedModel:
    return GatedModel()


@pytest.fixture
def start(model: GatedModel) -> Start:
    """A function that serves the gated model and the echo in the background."""

    @contextmanager
    def serve(
        *, token: str | None = None, batches: BatchLimits | None = None, **limits: Any
    ) -> Iterator[str]:
        registry = Registry()
        registry.add(model)
        registry.add(FunctionModel(echo, "echo"))
        server = ServerLimits(**{"grace_seconds": 5.0, **limits})
        with in_background(App(registry, batches=batches, limits=server, token=token)) as url:
            try:
                yield url
            except BaseException:
                model.gate.set()  # or the end of the server would wait for it
                raise

    return serve


def waiting(url: str) -> float:
    return metric(url, 'edgeclip_waiting{model="gated"}')


def test_a_token_is_needed_for_all_but_health(start: Start) -> None:
    with start(token="a secret".replace(" ", "-")) as url:
        assert ask(url, "/v2/health/live").status == 200
        assert ask(url, "/v2/health/ready").status == 200
        for path in ("/v2", "/metrics", "/v2/models/gated", "/elsewhere"):
            heard = ask(url, path)
            assert (heard.status, heard.headers["www-authenticate"]) == (401, "Bearer")
        for shown in ("Bearer wrong", "Basic a-secret", "a-secret", "Bearer", "Bearer \xe9"):
            assert infer(url, question(1), {"Authorization": shown}).status == 401
        assert infer(url, question(1), {"Authorization": "bearer  a-secret "}).status == 200


def test_a_full_queue_is_said(start: Start, model: GatedModel) -> None:
    model.gate.clear()
    with start(batches=BatchLimits(queue=1)) as url:
        first, first_heard = in_thread(url, question(1))
        assert model.began.wait(PATIENCE)
        second, second_heard = in_thread(url, question(2))
        until(lambda: waiting(url) == 1)
        heard = infer(url, question(3))
        assert heard.status == 429
        assert int(heard.headers["retry-after"]) >= 1
        assert infer(url, InferRequest(model="echo", inputs={"data": np.zeros((1, 9), np.uint8)}))
        model.gate.set()
        first.join()
        second.join()
        assert [one.status for one in (*first_heard, *second_heard)] == [200, 200]
        assert metric(url, 'edgeclip_requests_total{model="gated",status="429"}') == 1
        assert metric(url, 'edgeclip_requests_total{model="gated",status="200"}') == 2
        assert metric(url, 'edgeclip_run_rows_count{model="gated"}') == 2


def test_a_deadline_ends_the_wait(start: Start, model: GatedModel) -> None:
    model.gate.clear()
    with start() as url:
        first, first_heard = in_thread(url, question(1))
        assert model.began.wait(PATIENCE)
        heard = infer(url, question(2, deadline_ms=50.0))
        assert heard.status == 504
        model.gate.set()
        first.join()
        assert first_heard[0].status == 200
        assert model.batches == [1]


def test_one_who_leaves_is_not_waited_for(start: Start, model: GatedModel) -> None:
    model.gate.clear()
    with start() as url:
        first, _ = in_thread(url, question(1))
        assert model.began.wait(PATIENCE)
        headers, body = encode_request(question(2))
        leaving = connect(url)
        leaving.request("POST", GATED, body, headers)
        until(lambda: waiting(url) == 1)
        leaving.close()
        until(lambda: waiting(url) == 0)
        model.gate.set()
        first.join()
        until(lambda: metric(url, 'edgeclip_requests_total{model="gated",status="499"}') == 1)
        assert model.batches == [1]


def test_a_slow_body_is_given_up(start: Start) -> None:
    with start(body_seconds=0.1) as url, raw_socket(url) as sock:
        sock.sendall(f"POST {ECHO} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc".encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_slow_head_is_given_up(start: Start) -> None:
    with start(head_seconds=0.1) as url, raw_socket(url) as silent, raw_socket(url) as slow:
        slow.sendall(b"GET /v2 HTTP/1.1\r\n")
        assert slow.recv(1000) == b""
        assert silent.recv(1000) == b""


def test_bodies_share_a_bounded_memory(start: Start, model: GatedModel) -> None:
    model.gate.clear()
    with start(max_memory=10_000) as url:
        first, first_heard = in_thread(url, question(1))
        assert model.began.wait(PATIENCE)
        heard = ask(url, ECHO, bytes(9_990))
        assert (heard.status, "retry-after" in heard.headers) == (429, True)
        assert ask(url, ECHO, bytes(5_000)).status == 400
        model.gate.set()
        first.join()
        assert first_heard[0].status == 200
        until(lambda: ask(url, ECHO, bytes(9_990)).status == 400)


def test_the_end_waits_for_what_is_under_way(start: Start, model: GatedModel) -> None:
    model.gate.clear()
    with start(grace_seconds=PATIENCE) as url:
        thread, heard = in_thread(url, question(1))
        assert model.began.wait(PATIENCE)
        refused: list[Heard] = []

        def watch() -> None:
            until(lambda: ask(url, "/v2/health/ready").status == 503)
            refused.append(infer(url, question(2)))
            model.gate.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
    thread.join()
    watcher.join()
    assert (refused[0].status, refused[0].headers["retry-after"]) == (503, "1")
    assert heard[0].status == 200
    assert heard[0].headers["connection"] == "close"
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(url, "/v2/health/live")
