"""Real calls on real sockets: the same models, queues, token and limits as over HTTP."""

import json
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.serving.bundle_models import bundle_models
from edgeclip.runtime.serving.grpc_codec import message_type
from edgeclip.runtime.serving.security import load_or_create_certificate
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import DEADLINE_MS, SPACE_ID, InferRequest
from tests.runtime.serving.grpc_parts import (
    SPACE,
    Broken,
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


def named(name: str, model: str, version: str = "") -> Any:
    return message_type(f"{name}Request")(name=model, version=version)


def page(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def bundle(encoder: Encoder) -> Iterator[Served]:
    with serving(*bundle_models(encoder, "tiny")) as served:
        yield served


def test_the_server_describes_itself(bundle: Served) -> None:
    assert call(bundle.channel, "ServerLive").live
    assert call(bundle.channel, "ServerReady").ready
    found, wanted = call(bundle.channel, "ServerMetadata"), page(f"{bundle.url}/v2")
    assert (found.name, found.version) == (wanted["name"], wanted["version"])


@pytest.mark.parametrize("model", ["tiny-image", "tiny-pixels", "tiny-text"])
def test_models_are_described_as_over_http(bundle: Served, model: str) -> None:
    wanted = page(f"{bundle.url}/v2/models/{model}")
    found = call(bundle.channel, "ModelMetadata", named("ModelMetadata", model))
    assert (found.name, found.platform) == (wanted["name"], wanted["platform"])
    assert list(found.versions) == wanted["versions"]
    for key in ("inputs", "outputs"):
        specs = [
            {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
            for spec in getattr(found, key)
        ]
        assert specs == wanted[key]


def test_only_models_that_are_there_are_ready(bundle: Served) -> None:
    asked = [("tiny-text", ""), ("tiny-text", "1"), ("tiny-text", "2"), ("none", "")]
    ready = [call(bundle.channel, "ModelReady", named("ModelReady", *it)).ready for it in asked]
    assert ready == [True, True, False, False]
    unknown = named("ModelMetadata", "none")
    assert refusal(lambda: call(bundle.channel, "ModelMetadata", unknown)).code() == Code.NOT_FOUND


def test_embeddings_are_those_of_the_encoder_and_of_http(bundle: Served, encoder: Encoder) -> None:
    texts = np.array([b"a red apple", b"the blue sea"], object)
    message = infer_message("tiny-text", {"texts": texts}, {SPACE_ID: SPACE}, id="9")
    response = call(bundle.channel, "ModelInfer", message)
    assert (response.model_name, response.model_version, response.id) == ("tiny-text", "1", "9")
    found = outputs_of(response)["text_embeds"]
    np.testing.assert_array_equal(found, encoder.encode_text([text.decode() for text in texts]))
    with Server(bundle.url) as server:
        request = InferRequest(model="tiny-text", inputs={"texts": texts})
        over_http = server.infer(request, Deadline.after_ms(20_000)).outputs
    np.testing.assert_array_equal(found, over_http["text_embeds"])


def test_calls_and_http_requests_share_a_batch() -> None:
    held = Held()
    with serving(held) as served, Server(served.url) as server:
        first = begin(served.channel, "ModelInfer", rows_message("held"))
        assert held.began.acquire(timeout=20)
        second = begin(served.channel, "ModelInfer", rows_message("held", rows=2))
        request = InferRequest(model="held", inputs={"data": np.zeros((3, 1), np.uint8)})
        third = threading.Thread(target=server.infer, args=(request, Deadline.after_ms(20_000)))
        third.start()
        wait_for(lambda: 'edgeclip_waiting{model="held"} 2.0' in metrics(served))
        held.go.set()
        assert outputs_of(first.result())["data"].tolist() == [[7]]
        assert outputs_of(second.result())["data"].tolist() == [[7], [7]]
        third.join()
        wait_for(lambda: 'requests_total{model="held",status="200"} 3.0' in metrics(served))
    assert held.runs == [1, 5]


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (infer_message("held", {}), Code.INVALID_ARGUMENT, "takes the inputs 'data'"),
        (infer_message("none", {}), Code.NOT_FOUND, "no model 'none'"),
        (rows_message("held", model_version="2"), Code.NOT_FOUND, "version 1 only"),
        (rows_message("held", outputs=[{"name": "a"}]), Code.INVALID_ARGUMENT, "no output 'a'"),
        (rows_message("held", parameters={DEADLINE_MS: "1"}), Code.INVALID_ARGUMENT, "a number"),
        (rows_message("held", parameters={DEADLINE_MS: 0}), Code.DEADLINE_EXCEEDED, "passed"),
        (rows_message("held", parameters={SPACE_ID: "6" * 64}), Code.FAILED_PRECONDITION, "space"),
        (rows_message("broken"), Code.INTERNAL, "the model failed (RuntimeError)"),
    ],
)
def test_what_cannot_be_answered_is_refused(message: Any, code: Code, words: str) -> None:
    with serving(Held(), Broken()) as served:
        error = refusal(lambda: call(served.channel, "ModelInfer", message))
    assert error.code() == code
    assert words in error.details()
    assert "secret" not in error.details()


def test_the_token_is_needed_for_all_but_health() -> None:
    with serving(Held(), token="correct-horse") as served:
        assert call(served.channel, "ServerLive").live
        assert call(served.channel, "ServerReady").ready
        shown = [(), (("authorization", "Bearer wrong-horse"),), (("token", "correct-horse"),)]
        for name in ("ServerMetadata", "ModelMetadata", "ModelReady", "ModelInfer"):
            for metadata in shown:
                future = begin(served.channel, name, metadata=metadata)
                assert refusal(future.result).code() == Code.UNAUTHENTICATED
        right = (("authorization", "Bearer correct-horse"),)
        assert call(served.channel, "ServerMetadata", metadata=right).name == "edgeclip"


def test_tls_has_the_certificate_of_http(tmp_path: Path) -> None:
    files = load_or_create_certificate("127.0.0.1", tmp_path)
    trusted = grpc.ssl_channel_credentials(files.certificate.read_bytes())
    with serving(Held(), tls=files) as served:
        with grpc.secure_channel(served.address, trusted) as channel:
            assert call(channel, "ServerReady").ready
        host, port = served.address.split(":")
        over_grpc = ssl.get_server_certificate((host, int(port)))
        assert over_grpc == ssl.get_server_certificate((host, int(served.url.rpartition(":")[2])))
        plain = refusal(lambda: call(served.channel, "ServerReady", timeout=5))
        assert plain.code() in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
