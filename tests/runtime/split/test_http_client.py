"""Against real sockets: every way to misbehave, and the deadline that holds whatever happens."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import (
    BadReplyError,
    BreakerOpenError,
    ClientBusyError,
    DeadlineExceededError,
    ServerBusyError,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
    WrongSpaceError,
)
from edgeclip.runtime.split.http_client import ClientRules, Server, Transfer
from edgeclip.runtime.split.retries_and_breaker import Backoff, BreakerRules, Deadline
from edgeclip.runtime.wire.messages import DEADLINE_MS, SPACE_ID, InferResponse, WireError
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import Behaviour, RawServer, a_request, serving

SPACE = "5" * 64
SLACK_S = 1.0  # a busy machine may wake a thread late
ONCE = ClientRules(
    backoff=Backoff(attempts=1),
    hedges=False,
    breaker=BreakerRules(fewest_calls=10),
    max_reply_bytes=1 << 20,
)
EAGER = ClientRules(breaker=BreakerRules(fewest_calls=1, window_calls=1), hedges=False)


@pytest.fixture
def raw() -> Iterator[RawServer]:
    with serving(RawServer()) as server:
        yield server


def soon(ms: float = 300.0) -> Deadline:
    return Deadline.after_ms(ms)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.005)


def test_answers_come_back_over_kept_connections(raw: RawServer) -> None:
    seen: list[Transfer] = []
    with Server(raw.url + "/", token="secret", watch=seen.append) as server:
        for _ in range(3):
            response = server.infer(a_request(), soon(5000))
            np.testing.assert_array_equal(response.outputs["x"], [[0, 1, 2, 3]])
    assert raw.connections == 1
    assert raw.heads[0]["authorization"] == "Bearer secret"
    assert [traffic.model for traffic in seen] == ["echo"] * 3
    assert min(min(traffic.sent, traffic.received, traffic.ms) for traffic in seen) > 0
    left = raw.requests[0].parameters[DEADLINE_MS]
    assert isinstance(left, float)
    assert 0 < left <= 5000


def test_observers_are_told_of_requests_that_were_given_up(raw: RawServer) -> None:
    answered: list[Transfer] = []
    all_of_them: list[Transfer] = []
    raw.script = [raw_server.good, raw_server.hang]
    with Server(raw.url, rules=ClientRules(hedges=False), watch=answered.append) as server:
        server.add_observer(all_of_them.append)
        server.infer(a_request(), soon(5000))
        with pytest.raises(DeadlineExceededError):
            server.infer(a_request(), soon(100))
    assert [transfer.timed_out for transfer in answered] == [False]
    assert [transfer.timed_out for transfer in all_of_them] == [False, True]
    assert all_of_them[1].sent >= all_of_them[0].sent
    assert 90 < all_of_them[1].ms < 5000


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (raw_server.hang, DeadlineExceededError),
        (raw_server.trickling, DeadlineExceededError),
        (raw_server.slow(20), DeadlineExceededError),
        (raw_server.drop, ServerUnreachableError),
        (raw_server.truncated, ServerUnreachableError),
        (raw_server.garbage, BadReplyError),
        (raw_server.html, BadReplyError),
        (raw_server.endless, BadReplyError),
        (raw_server.gigantic, BadReplyError),
        (raw_server.status(503), ServerBusyError),
        (raw_server.status(429, "Retry-After: 7\r\n"), ServerBusyError),
        (raw_server.status(500, body=b"oh no"), ServerRefusedError),
        (raw_server.status(404), ServerRefusedError),
        (raw_server.status(302, "Location: /elsewhere\r\n"), BadReplyError),
        (raw_server.status(409), WrongSpaceError),
    ],
)
def test_every_fault_is_an_error_of_its_own_by_the_deadline(
    raw: RawServer, behaviour: Behaviour, expected: type[ServerError]
) -> None:
    raw.behave = behaviour
    with Server(raw.url, rules=ONCE) as server:
        began = time.monotonic()
        with pytest.raises(expected):
            server.infer(a_request(), soon())
        assert time.monotonic() - began < 0.3 + SLACK_S
        # Threads of calls that were given up come free.
        wait_for(lambda: server._endpoint.busy == 0)


def test_nobody_listens() -> None:
    with (
        Server(raw_server.refusing_address(), rules=ONCE) as server,
        pytest.raises(ServerUnreachableError, match="is it running"),
    ):
        server.infer(a_request(), soon())


def test_name_that_nobody_knows() -> None:
    with Server("http://edgeclip.invalid", rules=ONCE) as server, pytest.raises(ServerError):
        server.infer(a_request(), soon(2000))


def test_connection_attempts_that_vanish() -> None:
    with raw_server.dropping_syn() as url, Server(url, rules=ONCE) as server:
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            server.infer(a_request(), soon())
        assert time.monotonic() - began < 0.3 + SLACK_S


def test_what_the_server_says_is_told(raw: RawServer) -> None:
    raw.behave = raw_server.status(429, "Retry-After: 7\r\n")
    with Server(raw.url, rules=ONCE) as server, pytest.raises(ServerBusyError) as caught:
        server.infer(a_request(), soon())
    assert caught.value.retry_after == 7
    assert "429: because" in str(caught.value)


def test_passing_faults_are_tried_again(raw: RawServer) -> None:
    raw.script = [raw_server.status(503), raw_server.truncated]
    with Server(raw.url) as server:
        server.infer(a_request(), soon(5000))
    assert len(raw.requests) == 3


@pytest.mark.parametrize(
    "behaviour", [raw_server.status(400), raw_server.status(503, "Retry-After: 60\r\n")]
)
def test_what_cannot_do_better_in_time_is_not_tried_again(
    raw: RawServer, behaviour: Behaviour
) -> None:
    raw.behave = behaviour
    with Server(raw.url) as server, pytest.raises(ServerError):
        server.infer(a_request(), soon(3000))
    assert len(raw.requests) == 1


def test_what_must_not_be_sent_twice_is_not(raw: RawServer) -> None:
    raw.behave = raw_server.status(503)
    with Server(raw.url) as server, pytest.raises(ServerBusyError):
        server.infer(a_request(), soon(3000), idempotent=False)
    assert len(raw.requests) == 1


def test_retries_are_a_tenth_of_the_calls(raw: RawServer) -> None:
    raw.behave = raw_server.status(503)
    never_opens = BreakerRules(fewest_calls=10, window_s=1e-9)
    rules = ClientRules(breaker=never_opens, backoff=Backoff(first_s=1e-4, longest_s=1e-4))
    with Server(raw.url, rules=rules) as server:
        for _ in range(200):
            with pytest.raises(ServerBusyError):
                server.infer(a_request(), soon(3000))
    assert 200 < len(raw.requests) <= 200 + 20 + 5


def test_slow_call_is_made_twice_and_the_first_answer_counts(raw: RawServer) -> None:
    with Server(raw.url) as server:
        for _ in range(20):
            server.infer(a_request(), soon(5000))
        raw.script = [raw_server.hang]
        server.infer(a_request(), soon(5000))
        wait_for(lambda: server._endpoint.busy == 0)
    assert len(raw.requests) == 22


def test_open_breaker_asks_nothing_and_closes_when_the_server_is_back(raw: RawServer) -> None:
    raw.behave = raw_server.status(503)
    with Server(raw.url, rules=EAGER) as server:
        assert server.unavailable_reason() is None
        with pytest.raises(ServerBusyError):
            server.infer(a_request(), soon(), idempotent=False)
        assert server.unavailable_reason() == "breaker open"
        asked = len(raw.requests)
        with pytest.raises(BreakerOpenError):
            server.infer(a_request(), soon())
        wait_for(lambda: raw.probes >= 2)
        assert len(raw.requests) == asked
        raw.behave = raw_server.good
        wait_for(lambda: server.unavailable_reason() is None)
        server.infer(a_request(), soon(5000))
        assert server.unavailable_reason() is None
        probes = raw.probes
        time.sleep(0.05)
        assert raw.probes == probes


def test_wrong_space_is_refused_and_remembered(raw: RawServer) -> None:
    def elsewhere(request: object) -> InferResponse:
        outputs = {"x": np.zeros((1, 2), np.float32)}
        return InferResponse(model="echo", outputs=outputs, parameters={SPACE_ID: "6" * 64})

    raw.answer = elsewhere
    raw.ready = raw_server.status(503)
    with Server(raw.url) as server:
        with pytest.raises(WrongSpaceError, match="666666666666, not 555555555555"):
            server.infer(a_request(space_id=SPACE), soon(5000))
        assert server.unavailable_reason() == "wrong space"
        with pytest.raises(BreakerOpenError) as caught:
            server.infer(a_request(space_id=SPACE), soon())
        assert caught.value.reason == "wrong space"
    assert len(raw.requests) == 1


def test_reply_without_a_space_is_refused(raw: RawServer) -> None:
    raw.answer = lambda request: InferResponse(model="echo", outputs=request.inputs)
    with Server(raw.url, rules=ONCE) as server, pytest.raises(WrongSpaceError, match="no embed"):
        server.infer(a_request(space_id=SPACE), soon(5000))


def test_reply_that_is_not_accepted_is_a_failure(raw: RawServer) -> None:
    def read(response: InferResponse) -> None:
        raise BadReplyError("not what I wanted")

    with Server(raw.url, rules=EAGER) as server:
        with pytest.raises(BadReplyError, match="not what I wanted"):
            server.ask(a_request(), soon(5000), read)
        assert server.unavailable_reason() == "breaker open"


def test_request_that_cannot_be_sent_is_the_callers_mistake(raw: RawServer) -> None:
    with Server(raw.url, rules=EAGER) as server:
        request = a_request(odd=float("nan"))  # type: ignore[arg-type]
        with pytest.raises(WireError):
            server.infer(request, soon(5000))
        assert server.unavailable_reason() is None


def test_when_all_threads_hang_calls_fail_at_once(raw: RawServer) -> None:
    raw.behave = raw_server.hang
    rules = ClientRules(connections=2, hedges=False, breaker=BreakerRules(fewest_calls=10))
    with Server(raw.url, rules=rules) as server:
        ends: list[Exception] = []

        def call() -> None:
            try:
                server.infer(a_request(), soon(3000))
            except ServerError as error:
                ends.append(error)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server._endpoint.busy == 2)
        began = time.monotonic()
        with pytest.raises(ClientBusyError):
            server.infer(a_request(), soon(3000))
        assert time.monotonic() - began < SLACK_S
        raw.stopped.set()
        for thread in threads:
            thread.join()


def test_restarted_server_is_found_again_over_old_connections() -> None:
    with serving(RawServer()) as first, Server(first.url) as server:
        server.infer(a_request(), soon(5000))
        port = int(first.url.rpartition(":")[2])
        first.behave = raw_server.drop
        with pytest.raises(ServerError):
            server.infer(a_request(), soon(100))
    with serving(RawServer(), port) as second, Server(second.url) as server:
        server.infer(a_request(), soon(5000))


def test_ready(raw: RawServer) -> None:
    with Server(raw.url) as server:
        assert server.ready(soon(5000))
        raw.ready = raw_server.status(503)
        assert not server.ready(soon(5000))
        raw.ready = raw_server.trickling
        assert not server.ready(soon(100))


def test_closed_server() -> None:
    server = Server("http://127.0.0.1:9")
    server.close()
    server.close()
    with pytest.raises(ClientBusyError, match="closed"):
        server.infer(a_request(), soon())


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("127.0.0.1:8000", {}, "not the address"),
        ("ftp://host", {}, "not the address"),
        ("http://", {}, "not the address"),
        ("http://user:word@host", {}, "give a token"),
        ("http://host", {"fingerprint": "0" * 64}, "https"),
        ("https://host", {"fingerprint": "abc"}, "SHA-256"),
        ("http://host", {"token": "secret"}, "in the clear"),
        ("https://host", {"token": "a\nb"}, "ASCII"),
    ],
)
def test_addresses_and_secrets_that_cannot_be_used(
    url: str, options: dict[str, str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Server(url, **options)  # type: ignore[arg-type]
