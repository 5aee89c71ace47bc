"""A real outbox emptied into a real server, with outages between."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.outbox import Entry, Outbox
from edgeclip.runtime.split.replayer import Replayer, ReplayRules
from edgeclip.runtime.split.retries_and_breaker import BreakerRules
from edgeclip.runtime.wire.messages import InferRequest, InferResponse
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer, serving

FAST = ReplayRules(per_second=1000, pause_s=0.02, deadline_ms=300, max_failures=2)


@pytest.fixture
def raw() -> Iterator[RawServer]:
    with serving(RawServer()) as server:
        yield server


@pytest.fixture
def server(raw: RawServer) -> Iterator[Server]:
    rules = ClientRules(breaker=BreakerRules(fewest_calls=2), hedges=False)
    with Server(raw.url, rules=rules) as server:
        yield server


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db") as outbox:
        yield outbox


def fill(outbox: Outbox, *keys: str) -> None:
    for key in keys:
        request = InferRequest(model="sink", inputs={"x": np.zeros(1, np.float32)})
        outbox.put(key, request)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.005)


def test_everything_is_sent_in_order_and_replies_are_handed_on(
    outbox: Outbox, server: Server, raw: RawServer
) -> None:
    replies: list[tuple[str, str]] = []

    def keep(entry: Entry, response: InferResponse) -> None:
        replies.append((entry.key, response.id))

    fill(outbox, "a", "b")
    with Replayer(outbox, server, on_reply=keep, rules=FAST):
        fill(outbox, "c")
        wait_for(lambda: outbox.counts().sent == 3)
        fill(outbox, "d")
        wait_for(lambda: outbox.counts().sent == 4)
    assert [request.id for request in raw.requests] == ["a", "b", "c", "d"]
    assert replies == [(key, key) for key in "abcd"]


def test_outage_keeps_everything(outbox: Outbox, server: Server, raw: RawServer) -> None:
    raw.behave = raw_server.drop
    with Replayer(outbox, server, rules=FAST):
        fill(outbox, "a", "b", "c")
        wait_for(lambda: server.unavailable_reason() is not None)
        assert outbox.counts().escalations == 3
        raw.behave = raw_server.good
        wait_for(lambda: outbox.counts().sent == 3)
    ids = [request.id for request in raw.requests]
    assert list(dict.fromkeys(ids)) == ["a", "b", "c"]


def test_entry_that_the_server_never_takes_blocks_nothing(
    outbox: Outbox, server: Server, raw: RawServer
) -> None:
    raw.script = [raw_server.status(400)]
    fill(outbox, "bad", "good")
    replayer = Replayer(outbox, server, rules=FAST)
    assert [replayer.step() for _ in range(3)] == ["set aside", "sent", "nothing waits"]
    assert outbox.counts().refused == 1


def test_entry_that_fails_again_and_again_is_given_up(
    outbox: Outbox, server: Server, raw: RawServer
) -> None:
    raw.behave = raw_server.status(500)
    fill(outbox, "bad", "good")
    replayer = Replayer(outbox, server, rules=FAST)
    assert [replayer.step() for _ in range(2)] == ["no server", "no server"]
    raw.behave = raw_server.good
    wait_for(lambda: server.unavailable_reason() is None)
    assert [replayer.step(), replayer.step()] == ["sent", "nothing waits"]
    assert outbox.counts().refused == 1


def test_outage_gives_nothing_up(outbox: Outbox, server: Server, raw: RawServer) -> None:
    raw.behave = raw_server.drop
    fill(outbox, "a")
    replayer = Replayer(outbox, server, rules=FAST)
    assert {replayer.step() for _ in range(20)} == {"no server"}
    assert outbox.counts().escalations == 1


def test_answer_to_something_else_confirms_nothing(
    outbox: Outbox, server: Server, raw: RawServer
) -> None:
    raw.answer = lambda request: InferResponse(model="sink", outputs={}, id="other")
    fill(outbox, "a")
    assert Replayer(outbox, server, rules=FAST).step() == "no server"
    assert outbox.counts().escalations == 1


def test_handler_that_fails_stops_nothing(outbox: Outbox, server: Server) -> None:
    def fails(entry: Entry, response: InferResponse) -> None:
        raise RuntimeError("no")

    fill(outbox, "a")
    assert Replayer(outbox, server, on_reply=fails, rules=FAST).step() == "sent"


def test_two_replayers_take_turns(outbox: Outbox, server: Server, raw: RawServer) -> None:
    fill(outbox, *map(str, range(20)))
    with (
        Outbox(outbox.path) as other,
        Replayer(outbox, server, rules=FAST),
        Replayer(other, server, rules=FAST),
    ):
        wait_for(lambda: outbox.counts().sent == 20)
    assert [request.id for request in raw.requests] == [str(number) for number in range(20)]


def test_rate_is_bounded(outbox: Outbox, server: Server, raw: RawServer) -> None:
    fill(outbox, *map(str, range(5)))
    began = time.monotonic()
    with Replayer(outbox, server, rules=ReplayRules(per_second=20)):
        wait_for(lambda: outbox.counts().sent == 5)
    assert time.monotonic() - began >= 4 / 20


def test_close_before_start_and_twice(outbox: Outbox, server: Server) -> None:
    Replayer(outbox, server).close()
    with Replayer(outbox, server, rules=FAST) as replayer:
        replayer.close()
    assert "edgeclip-replay" not in {thread.name for thread in threading.enumerate()}


def test_rules_that_make_no_sense() -> None:
    with pytest.raises(InputError):
        ReplayRules(per_second=0)
