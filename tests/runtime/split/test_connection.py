"""TLS against a real certificate, and the headers that need no server."""

import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from edgeclip.runtime.serving.security import TlsFiles, load_or_create_certificate
from edgeclip.runtime.split.connection import Address, CancelToken, is_confidential, open_pool
from edgeclip.runtime.split.errors import (
    DeadlineExceededError,
    ServerError,
    ServerUntrustedError,
)
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.http_exchange import HttpRequest, exchange, retry_after
from edgeclip.runtime.split.retries_and_breaker import Backoff, Deadline
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer, a_request, serving

ONCE = ClientRules(backoff=Backoff(attempts=1), hedges=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return load_or_create_certificate("127.0.0.1", tmp_path_factory.mktemp("tls"))


@pytest.fixture
def raw(files: TlsFiles) -> Iterator[RawServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with serving(RawServer(tls=context)) as server:
        yield server


def soon(ms: float = 5000) -> Deadline:
    return Deadline.after_ms(ms)


def test_the_certificate_that_was_pinned_is_trusted(raw: RawServer, files: TlsFiles) -> None:
    colons = ":".join(files.fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    for fingerprint in (files.fingerprint, colons):
        with Server(raw.url, fingerprint=fingerprint, token="secret", rules=ONCE) as server:
            for _ in range(2):
                server.infer(a_request(), soon())
    assert raw.connections == 2


def test_the_authority_that_was_given_is_trusted(raw: RawServer, files: TlsFiles) -> None:
    with Server(raw.url, ca=str(files.certificate), rules=ONCE) as server:
        server.infer(a_request(), soon())


@pytest.mark.parametrize("fingerprint", [None, "0" * 64])
def test_any_other_certificate_is_not(raw: RawServer, fingerprint: str | None) -> None:
    with Server(raw.url, fingerprint=fingerprint, token="secret", rules=ONCE) as server:
        with pytest.raises(ServerUntrustedError, match="fingerprint or CA"):
            server.infer(a_request(), soon())
        assert server.unavailable_reason() == "certificate"
    assert raw.requests == []


def test_tls_trickles_and_hangs_are_over_in_time(raw: RawServer, files: TlsFiles) -> None:
    for behaviour in (raw_server.trickling, raw_server.hang):
        raw.behave = behaviour
        with Server(raw.url, fingerprint=files.fingerprint, rules=ONCE) as server:
            began = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                server.infer(a_request(), soon(300))
            assert time.monotonic() - began < 1.5


def test_handshake_that_never_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with Server(url, rules=ONCE) as server, pytest.raises(DeadlineExceededError):
            server.infer(a_request(), soon(300))


def test_server_without_tls_is_not_trusted() -> None:
    with serving(RawServer()) as plain:
        url = plain.url.replace("http", "https")
        with Server(url, rules=ONCE) as server, pytest.raises(ServerError):
            server.infer(a_request(), soon(300))


def test_exchange_that_was_cancelled_before_it_began_is_not_made() -> None:
    with serving(RawServer()) as raw:
        pool, _ = open_pool(Address(url=raw.url), 1)
        token = CancelToken()
        token()
        request = HttpRequest(method="GET", path="/v2/health/ready", headers={})
        with pytest.raises(DeadlineExceededError):
            exchange(pool, request, soon(), token, max_bytes=100)
    assert raw.connections == 0


def test_late_cut_does_not_reach_the_next_exchange() -> None:
    with serving(RawServer()) as raw:
        pool, _ = open_pool(Address(url=raw.url), 1)
        request = HttpRequest(method="GET", path="/v2/health/ready", headers={})
        first = CancelToken()
        exchange(pool, request, soon(), first, max_bytes=100)
        first()
        exchange(pool, request, soon(), CancelToken(), max_bytes=100)
    assert raw.connections == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("99999999999999999999", 999999999.0),
        ("-1", None),
        ("soon", None),
        ("٣", None),
        ("Wed, 21 Oct 2015 07:28:10 GMT", 10.0),
        ("Wed, 21 Oct 2015 07:27:10 GMT", 0.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, now=1445412480.0) == seconds


def test_where_a_secret_may_be_sent() -> None:
    assert is_confidential("https://example.org")
    assert is_confidential("http://localhost:80")
    assert is_confidential("http://[::1]:80")
    assert not is_confidential("http://example.org")
