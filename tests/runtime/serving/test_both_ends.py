"""The device's client against the real server, through TLS with a pinned certificate."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.models import Registry
from edgeclip.runtime.serving.security import TlsFiles, load_or_create_certificate
from edgeclip.runtime.serving.server import in_background
from edgeclip.runtime.split.errors import (
    ServerRefusedError,
    ServerUntrustedError,
    WrongSpaceError,
)
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.outbox import Outbox
from edgeclip.runtime.split.replayer import Replayer
from edgeclip.runtime.split.retries_and_breaker import Deadline
from tests.runtime.serving.ask_server import PATIENCE
from tests.runtime.serving.odd_models import SPACE, GatedModel, question

TOKEN = "a-long-token"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return load_or_create_certificate("127.0.0.1", tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def url(tls: TlsFiles) -> Iterator[str]:
    registry = Registry()
    registry.add(GatedModel())
    with in_background(App(registry, token=TOKEN), tls=tls) as address:
        yield address


def soon() -> Deadline:
    return Deadline.after_ms(1000 * PATIENCE)


def test_a_pinned_certificate_and_a_token_are_enough(url: str, tls: TlsFiles) -> None:
    assert url.startswith("https://127.0.0.1:")
    with Server(url, token=TOKEN, fingerprint=tls.fingerprint) as server:
        assert server.ready(soon())
        for number in range(3):
            response = server.infer(question(number, space_id=SPACE), soon())
            assert response.outputs["sum"].tolist() == [number + 1]


def connect(url: str, tls: TlsFiles) -> Server:
    return Server(url, token=TOKEN, fingerprint=tls.fingerprint)


def test_a_mistake_is_that_of_the_request(url: str, tls: TlsFiles) -> None:
    with connect(url, tls) as server:
        with pytest.raises(ServerRefusedError, match="a row begins with NaN") as found:
            server.infer(question(np.nan), soon())
        assert found.value.status == 400
        assert server.infer(question(1), soon()).id == "q1"


def test_another_space_is_refused(url: str, tls: TlsFiles) -> None:
    with connect(url, tls) as server, pytest.raises(WrongSpaceError):
        server.infer(question(1, space_id="b" * 64), soon())


def test_another_certificate_is_refused(url: str, tls: TlsFiles, tmp_path: Path) -> None:
    other = load_or_create_certificate("127.0.0.1", tmp_path)
    with connect(url, other) as server, pytest.raises(ServerUntrustedError):
        server.infer(question(1), soon())
    with Server(url, token=TOKEN, ca=str(tls.certificate)) as server:
        assert server.infer(question(1), soon()).outputs["sum"].tolist() == [2]


def test_another_token_is_refused(url: str, tls: TlsFiles) -> None:
    with Server(url, token="another-token", fingerprint=tls.fingerprint) as server:
        with pytest.raises(ServerRefusedError) as found:
            server.infer(question(1), soon())
        assert found.value.status == 401


def test_what_is_replayed_takes_effect_once(tmp_path: Path) -> None:
    """As after a crash between the server's answer and the outbox's note of it."""
    model = GatedModel()
    registry = Registry()
    registry.add(model)
    with in_background(App(registry)) as url, Server(url) as server:
        for name in ("first.db", "as it was before.db"):
            with Outbox(tmp_path / name) as outbox:
                outbox.put("key", question(7, space_id=SPACE))
                assert Replayer(outbox, server).step() == "sent"
                assert outbox.oldest() is None
    assert model.batches == [1]
