"""A student asks a teacher, both real, through a server that may be away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.scores import Agreement, Margin
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.split.escalation import Escalation, request_key
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.outbox import Entry, Outbox
from edgeclip.runtime.split.replayer import Replayer
from edgeclip.runtime.split.split_runtime import SplitRuntime
from edgeclip.runtime.wire.messages import InferRequest, InferResponse
from tests.conftest import SPACE
from tests.runtime.serving.models_of_bundle import (
    AMPLE_MS,
    COLOURS,
    plan,
)
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer


@pytest.mark.parametrize("score", [Margin(), Agreement(views=2)])
def test_teacher_is_asked_about_what_the_student_is_unsure_of(
    encoder: Encoder, server: Server, raw: RawServer, photos: Path, score: Margin | Agreement
) -> None:
    files = sorted(photos.glob("*.png"))
    always = Escalation(model="tiny-image", cascade=Cascade(score, 3.0))
    reply = SplitRuntime(encoder, plan("device"), server, escalation=always).classify(
        files, COLOURS, top=1, deadline_ms=AMPLE_MS
    )
    assert (reply.source, reply.degraded) == ("server", None)
    assert len(raw.requests[0].inputs["images"]) == 3
    never = Escalation(model="tiny-image", cascade=Cascade(score, -2.0))
    reply = SplitRuntime(encoder, plan("device"), server, escalation=never).classify(
        files, COLOURS, top=1
    )
    assert (reply.source, reply.degraded) == ("device", None)
    assert len(raw.requests) == 1


def test_students_answer_stands_where_the_teacher_cannot_be_asked(
    encoder: Encoder, server: Server, raw: RawServer, photos: Path
) -> None:
    raw.behave = raw_server.drop
    kept: dict[str, InferRequest] = {}
    escalation = Escalation(
        model="tiny-image", cascade=Cascade(Margin(), 3.0), defer=kept.__setitem__
    )
    index = Index(COLOURS, encoder.encode_text(COLOURS), SPACE)
    files = sorted(photos.glob("*.png"))
    with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
        for _ in range(2):
            reply = runtime.search(files, index, top=1)
            assert (reply.source, reply.degraded) == ("device", "unreachable")
            assert reply.value == encoder.search(files, index, top=1)
    assert len(kept) == 3
    assert all(request.model == "tiny-image" for request in kept.values())


def test_what_was_deferred_is_answered_when_the_server_is_back(
    encoder: Encoder, server: Server, raw: RawServer, photos: Path, tmp_path: Path
) -> None:
    raw.behave = raw_server.drop
    replies: dict[str, NDArray[Any]] = {}

    def keep(entry: Entry, response: InferResponse) -> None:
        replies[entry.key] = response.outputs["image_embeds"]

    with Outbox(tmp_path / "outbox.db") as outbox:
        escalation = Escalation(
            model="tiny-image", cascade=Cascade(Margin(), 3.0), defer=outbox.put
        )
        with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
            runtime.classify(photos / "red.png", COLOURS)
        raw.behave = raw_server.good
        replayer = Replayer(outbox, server, on_reply=keep)
        assert [replayer.step(), replayer.step()] == ["sent", "nothing waits"]
    (embedding,) = replies.values()
    np.testing.assert_allclose(embedding, encoder.encode_image(photos / "red.png"), atol=1e-6)


def a_request(*images: bytes, model: str = "T-image") -> InferRequest:
    return InferRequest(model=model, inputs={"images": np.array(images, object)})


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=3))
def test_keys_tell_requests_apart(images: list[bytes]) -> None:
    key = request_key(a_request(*images))
    assert key == request_key(a_request(*images))
    others = [a_request(*images, b""), a_request(*images, model="other")]
    if len(images) > 1:
        others.append(a_request(images[0] + images[1], *images[2:]))
    assert key not in map(request_key, others)
