"""A real bundle on the device, its real models behind a server that can misbehave."""

import dataclasses
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.index import Index, LabelSet
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.scores import Margin
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError, SpaceMismatchError
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.models import Registry
from edgeclip.runtime.serving.search_model import SearchModel
from edgeclip.runtime.serving.server import in_background
from edgeclip.runtime.split.errors import ServerError, WrongSpaceError
from edgeclip.runtime.split.escalation import Escalation
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.retries_and_breaker import BreakerRules, Deadline
from edgeclip.runtime.split.split_runtime import SplitRuntime
from edgeclip.runtime.wire.messages import SPACE_ID, InferRequest, InferResponse
from tests.conftest import DIM, SPACE
from tests.runtime.serving.models_of_bundle import (
    AMPLE_MS,
    COLOURS,
    answer_by,
    models_of,
    plan,
)
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import Behaviour, RawServer


@pytest.fixture
def runtime(encoder: Encoder, server: Server) -> SplitRuntime:
    return SplitRuntime(encoder, plan(), server)


def test_server_gives_what_the_device_would(
    runtime: SplitRuntime, encoder: Encoder, photos: Path, raw: RawServer
) -> None:
    files = sorted(photos.glob("*.png"))
    reply = runtime.encode_image(files, deadline_ms=AMPLE_MS)
    assert (reply.source, reply.degraded) == ("server", None)
    assert reply.ms > 0
    np.testing.assert_allclose(reply.value, encoder.encode_image(files), atol=1e-6)
    sent = raw.requests[0].inputs["images"]
    assert sent.tolist() == [file.read_bytes() for file in files]


@pytest.mark.parametrize("codec", ["file", "jpeg-90", "webp-lossless"])
def test_pixels_are_sent_compressed(
    encoder: Encoder, server: Server, raw: RawServer, codec: str
) -> None:
    runtime = SplitRuntime(encoder, plan(codec=codec), server)
    pixels = np.full((2, 8, 8, 3), (220, 20, 20), np.uint8)
    reply = runtime.encode_pixels(pixels, deadline_ms=AMPLE_MS)
    assert reply.source == "server"
    np.testing.assert_allclose(reply.value, encoder.encode_pixels(pixels), atol=0.02)
    (first, _) = raw.requests[0].inputs["images"]
    assert Image.open(io.BytesIO(first)).size == (8, 8)


def test_large_files_are_cut_to_size_first(runtime: SplitRuntime, raw: RawServer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    reply = runtime.encode_image(file.getvalue(), deadline_ms=AMPLE_MS)
    assert reply.source == "server"
    assert len(raw.requests[0].inputs["images"][0]) < 2000


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (raw_server.hang, "deadline"),
        (raw_server.trickling, "deadline"),
        (raw_server.drop, "unreachable"),
        (raw_server.truncated, "unreachable"),
        (raw_server.html, "bad reply"),
        (raw_server.status(503, "Retry-After: 9\r\n"), "server busy"),
        (raw_server.status(404), "refused"),
        (raw_server.status(409), "wrong space"),
    ],
)
def test_device_answers_by_the_deadline_where_the_server_does_not(
    runtime: SplitRuntime, encoder: Encoder, raw: RawServer, behaviour: Behaviour, reason: str
) -> None:
    raw.behave = behaviour
    picture = Image.new("RGB", (20, 20), (20, 200, 20))
    reply = runtime.encode_image(picture)
    assert (reply.source, reply.degraded) == ("device", reason)
    assert reply.ms < 400 + 1000  # a busy machine may be late
    np.testing.assert_array_equal(reply.value, encoder.encode_image(picture))


def test_open_breaker_costs_no_time(encoder: Encoder, raw: RawServer, photos: Path) -> None:
    raw.behave = raw_server.hang
    rules = ClientRules(breaker=BreakerRules(fewest_calls=1, window_calls=1), hedges=False)
    with Server(raw.url, rules=rules) as server:
        runtime = SplitRuntime(encoder, plan(), server)
        assert runtime.encode_image(photos / "red.png").degraded == "deadline"
        asked = len(raw.requests)
        for _ in range(20):
            reply = runtime.encode_image(photos / "red.png")
            assert reply.degraded == "breaker open"
        assert len(raw.requests) == asked
        raw.behave = raw_server.good
        end = time.monotonic() + 10
        while runtime.encode_image(photos / "red.png").degraded and time.monotonic() < end:
            time.sleep(0.02)
        assert runtime.encode_image(photos / "red.png", deadline_ms=AMPLE_MS).source == "server"


def test_embeddings_of_another_space_are_never_used(
    runtime: SplitRuntime, encoder: Encoder, raw: RawServer, photos: Path
) -> None:
    answer = raw.answer
    raw.ready = raw_server.status(503)
    raw.answer = lambda request: dataclasses.replace(
        answer(request), parameters={SPACE_ID: "6" * 64}
    )
    for _ in range(3):
        reply = runtime.encode_image(photos / "red.png", deadline_ms=AMPLE_MS)
        assert (reply.source, reply.degraded) == ("device", "wrong space")
        np.testing.assert_array_equal(reply.value, encoder.encode_image(photos / "red.png"))
    assert len(raw.requests) == 1


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"image_embeds": np.zeros((1, 3), np.float32)},
        {"image_embeds": np.zeros((2, 8), np.float32)},
        {"image_embeds": np.full((1, 8), np.nan, np.float32)},
        {"image_embeds": np.ones((1, 8), np.float32)},
        {"image_embeds": np.eye(1, 8, dtype=np.float64)},
    ],
)
def test_what_is_no_embedding_is_never_used(
    runtime: SplitRuntime, raw: RawServer, photos: Path, outputs: dict[str, Any]
) -> None:
    raw.answer = lambda request: InferResponse(
        model=request.model, outputs=outputs, parameters={SPACE_ID: SPACE}
    )
    reply = runtime.encode_image(photos / "red.png", deadline_ms=AMPLE_MS)
    assert (reply.source, reply.degraded) == ("device", "bad reply")


def test_picture_that_nobody_can_read_is_the_callers_mistake(runtime: SplitRuntime) -> None:
    for bad in (b"no picture", "missing.png"):
        with pytest.raises(InputError):
            runtime.encode_image(bad, deadline_ms=AMPLE_MS)
    with pytest.raises(InputError, match="uint8"):
        runtime.encode_pixels(np.zeros((1, 3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="deadline"):
        runtime.encode_image(b"", deadline_ms=0)


def test_no_pictures_ask_nobody(runtime: SplitRuntime, raw: RawServer) -> None:
    reply = runtime.encode_image([])
    assert reply.value.shape == (0, 8)
    assert (reply.source, raw.requests) == ("device", [])


def test_classify_and_search_by_the_servers_embeddings(
    runtime: SplitRuntime, encoder: Encoder, photos: Path
) -> None:
    index = Index(COLOURS, encoder.encode_text(COLOURS), SPACE)
    red = photos / "red.png"
    answers = runtime.classify(red, COLOURS, top=1, deadline_ms=AMPLE_MS)
    assert answers.source == "server"
    assert answers.value[0][0].label == encoder.classify(red, COLOURS, top=1)[0][0].label
    hits = runtime.search(red, index, top=2, deadline_ms=AMPLE_MS)
    assert hits.source == "server"
    assert [hit.key for hit in hits.value[0]] == [
        hit.key for hit in encoder.search(red, index, top=2)[0]
    ]
    texts = runtime.search("a red car", index, top=1)
    assert (texts.source, texts.degraded) == ("device", None)


def test_all_on_the_device(encoder: Encoder, photos: Path) -> None:
    runtime = SplitRuntime(encoder, plan("device"))
    reply = runtime.encode_image(photos / "red.png")
    assert (reply.source, reply.degraded) == ("device", None)
    assert runtime.encode_text(["a red car"]).value.shape == (1, 8)
    assert runtime.classify(photos / "red.png", COLOURS).source == "device"


def test_servers_index_answers_for_the_devices_embeddings(
    encoder: Encoder, server: Server, raw: RawServer, photos: Path
) -> None:
    runtime = SplitRuntime(encoder, plan("embedding", model="colours"), server)
    local = Index(("only",), encoder.encode_text("red"), SPACE)
    for query in (photos / "red.png", "a red car", encoder.encode_text("a red car")):
        reply = runtime.search(query, local, top=2, deadline_ms=AMPLE_MS)
        assert (reply.source, reply.degraded) == ("server", None)
        assert len(reply.value[0]) == 2
    assert runtime.search("red", top=1, deadline_ms=AMPLE_MS).source == "server"
    assert runtime.encode_image(photos / "red.png").source == "device"
    assert runtime.classify(photos / "red.png", COLOURS).degraded is None
    raw.behave = raw_server.drop
    reply = runtime.search("red", local)
    assert (reply.source, reply.degraded) == ("device", "unreachable")
    assert reply.value[0][0].key == "only"
    with pytest.raises(ServerError):
        runtime.search("red")


def test_servers_labels_answer_for_the_devices_embeddings(
    encoder: Encoder, server: Server, raw: RawServer, photos: Path
) -> None:
    runtime = SplitRuntime(encoder, plan("embedding", model="tiny-labels-colours"), server)
    reply = runtime.classify(photos / "red.png", top=1, deadline_ms=AMPLE_MS)
    assert reply.source == "server"
    assert reply.value == encoder.classify(photos / "red.png", COLOURS, top=1)
    raw.behave = raw_server.status(500)
    reply = runtime.classify(photos / "red.png", COLOURS, top=1)
    assert (reply.source, reply.degraded) == ("device", "refused")
    with pytest.raises(InputError, match="no index"):
        runtime.search("red")


@pytest.mark.parametrize(
    "outputs",
    [
        {"key": np.array([[b"a"]], object)},
        {"key": np.array([[b"a"]], object), "score": np.zeros((1, 2), np.float32)},
        {"key": np.zeros((1, 1), np.float32), "score": np.zeros((1, 1), np.float32)},
        {"key": np.array([b"a"], object), "score": np.zeros(1, np.float32)},
    ],
)
def test_hits_that_are_none_are_refused(
    encoder: Encoder, server: Server, raw: RawServer, outputs: dict[str, Any]
) -> None:
    raw.answer = lambda request: InferResponse(
        model=request.model, outputs=outputs, parameters={SPACE_ID: SPACE}
    )
    runtime = SplitRuntime(encoder, plan("embedding", model="colours"), server)
    with pytest.raises(ServerError) as caught:
        runtime.search("red", deadline_ms=AMPLE_MS)
    assert caught.value.reason == "bad reply"


def test_a_key_that_is_not_utf8_is_the_name_of_its_file(
    encoder: Encoder, server: Server, raw: RawServer, tmp_path: Path
) -> None:
    keys = (os.fsdecode(b"caf\xe9.png"), "b.png")
    index = Index(keys, np.eye(2, DIM, dtype=np.float32), SPACE)
    raw.answer = answer_by({"colours": SearchModel(index, "colours", tmp_path)})
    runtime = SplitRuntime(encoder, plan("embedding", model="colours"), server)
    reply = runtime.search(np.eye(1, DIM, dtype=np.float32), deadline_ms=AMPLE_MS)
    assert [hit.key for hit in reply.value[0]] == list(keys)


def test_against_the_server_that_comes_with_it(
    encoder: Encoder, photos: Path, tmp_path: Path
) -> None:
    registry = Registry()
    for model in models_of(encoder, tmp_path).values():
        registry.add(model)
    with in_background(App(registry)) as url, Server(url) as server:
        reply = SplitRuntime(encoder, plan(), server).encode_image(
            photos / "red.png", deadline_ms=AMPLE_MS
        )
        assert (reply.source, reply.degraded) == ("server", None)
        with pytest.raises(WrongSpaceError):
            server.infer(
                InferRequest(
                    model="tiny-image",
                    inputs={"images": np.array([b""], object)},
                    parameters={SPACE_ID: "6" * 64},
                ),
                Deadline.after_ms(AMPLE_MS),
            )


def test_plan_of_another_space_is_refused(encoder: Encoder, server: Server) -> None:
    with pytest.raises(SpaceMismatchError):
        SplitRuntime(encoder, plan(space="6" * 64), server)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (plan(), "needs a server"),
        (plan(codec="jpeg-0"), "needs a server"),
        (plan("cut", model="tiny-tail-1", codec="int8", cut=1), "needs a server"),
    ],
)
def test_plan_without_its_server(encoder: Encoder, given: SplitPlan, says: str) -> None:
    with pytest.raises(InputError, match=says):
        SplitRuntime(encoder, given)


def test_plan_that_lacks_something(encoder: Encoder, server: Server, photos: Path) -> None:
    with pytest.raises(InputError, match="no picture codec"):
        SplitRuntime(encoder, plan(codec="jpeg-0"), server)
    cut = plan("cut", model="tiny-tail-1", codec="int8", cut=1)
    with pytest.raises(InputError, match="cut set"):
        SplitRuntime(encoder, cut, server)
    escalation = Escalation(model="tiny-image", cascade=Cascade(Margin(), 0.1))
    with pytest.raises(InputError, match="kind 'device'"):
        SplitRuntime(encoder, plan(), server, escalation=escalation)
    runtime = SplitRuntime(encoder, plan("device"))
    with pytest.raises(InputError, match="no labels"):
        runtime.classify(photos / "red.png")
    with pytest.raises(InputError, match="no index"):
        runtime.search("red")
    with pytest.raises(InputError, match="top"):
        runtime.classify(photos / "red.png", COLOURS, top=0)
    other = LabelSet(names=("a",), embeddings=np.eye(1, 8, dtype=np.float32), space="6" * 64)
    with pytest.raises(SpaceMismatchError):
        runtime.classify(photos / "red.png", other)
