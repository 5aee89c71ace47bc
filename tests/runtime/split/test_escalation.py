"""A student asks a teacher, both real, through a server that may be away."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertificateError,
    CertifiedLabels,
    Quality,
    QuerySet,
    TowerIdentity,
)
from edgeclip.runtime.cascade.drift import DriftWatch, WatchedShare
from edgeclip.runtime.cascade.scores import Agreement, Margin
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.escalation import Escalation, request_key
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.outbox import Entry, Outbox
from edgeclip.runtime.split.replayer import Replayer
from edgeclip.runtime.split.split_runtime import SplitRuntime
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.wire.messages import InferRequest, InferResponse
from tests.conftest import SPACE
from tests.runtime.serving.models_of_bundle import (
    AMPLE_MS,
    COLOURS,
    answer_by,
    models_of,
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


@pytest.fixture
def certificate(encoder: Encoder) -> Certificate:
    """Of the tiny bundle as its own teacher, for finding a caption among three."""
    manifest, near = encoder.bundle.manifest, Interval(0.9, 0.8, 1.0)
    image = TowerIdentity.of(manifest, "image", "int8")
    return Certificate(
        query="image",
        bound=0.95,
        delta=0.05,
        tested_at=0.05,
        p_value=0.01,
        try_number=None,
        space=SPACE,
        student=image,
        student_index=None,
        teacher=image,
        score=Margin(),
        threshold=3.0,
        escalated=near,
        watched=(WatchedShare(below=0.0, share=Interval(0.1, 0.0, 0.2)),),
        disagreement=Interval(0.05, 0.0, 0.1),
        quality=Quality(student=near, teacher=near, cascade=near, kept=near),
        tested_on=QuerySet(
            data="colours",
            identity="0" * 64,
            count=9,
            clusters=9,
            largest=1,
            cluster_by="none",
            assumed="all pictures are independent",
            entries=3,
            index_by="teacher",
            embedder=encoder.embedder("text"),
            task="retrieval",
        ),
        created="2026-01-01T00:00:00+00:00",
        command="pytest",
    )


def test_a_certificate_for_retrieval_searches_its_index_only(
    encoder: Encoder, server: Server, photos: Path, certificate: Certificate
) -> None:
    cascade = Cascade(Margin(), 3.0, certificate)
    escalation = Escalation(model="tiny-image", cascade=cascade)
    embeddings, embedder = encoder.encode_text(COLOURS), encoder.embedder("text")
    with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
        picture = photos / "red.png"
        index = Index(COLOURS, embeddings, SPACE, embedder)
        reply = runtime.search(picture, index, top=1, deadline_ms=AMPLE_MS)
        assert (reply.value[0][0].key, reply.source) == ("red", "server")
        with pytest.raises(CertificateError, match="not for classifying by 3 labels"):
            runtime.classify(picture, COLOURS)
        with pytest.raises(CertificateError, match="does not say what embedded it"):
            runtime.search(picture, Index(COLOURS, embeddings, SPACE))
        with pytest.raises(CertificateError, match="an index of 2 entries"):
            runtime.search(picture, Index(COLOURS[:2], embeddings[:2], SPACE, embedder))
        with pytest.raises(CertificateError, match="queries that are texts"):
            runtime.search("a red apple", index)


def test_a_certificate_for_texts_is_refused_at_once(
    encoder: Encoder, server: Server, certificate: Certificate
) -> None:
    for_texts = replace(certificate, query="text")
    escalation = Escalation(model="tiny-image", cascade=Cascade(Margin(), 3.0, for_texts))
    with pytest.raises(CertificateError, match="not for queries that are pictures"):
        SplitRuntime(encoder, plan("device"), server, escalation=escalation)


@pytest.fixture
def labels(encoder: Encoder) -> CertifiedLabels:
    """A teacher that calls every colour by the next one's name, to tell its answers."""
    entries = encoder.bake_labels(COLOURS)
    return CertifiedLabels(
        entries=entries, teacher=replace(entries, embeddings=np.roll(entries.embeddings, 1, axis=0))
    )


def zero_shot(certificate: Certificate, labels: CertifiedLabels, threshold: float) -> Certificate:
    tested = replace(
        certificate.tested_on,
        task="zero-shot",
        labels=labels.entries.digest,
        teacher_labels=labels.teacher.digest,
    )
    return replace(certificate, threshold=threshold, tested_on=tested)


@pytest.mark.parametrize("threshold", [3.0, -2.0])
def test_escalated_pictures_choose_among_the_teachers_labels(
    encoder: Encoder,
    server: Server,
    raw: RawServer,
    photos: Path,
    certificate: Certificate,
    labels: CertifiedLabels,
    threshold: float,
) -> None:
    found = zero_shot(certificate, labels, threshold)
    watch = DriftWatch(found.digest, found.watched)
    cascade = Cascade(Margin(), threshold, found, watch, labels=labels)
    files = sorted(photos.glob("*.png"))
    by_student = encoder.classify(files, labels.entries, top=1)
    by_teacher = encoder.classify(files, labels.teacher, top=1)
    assert [one[0].label for one in by_student] != [one[0].label for one in by_teacher]
    escalation = Escalation(model="tiny-image", cascade=cascade)
    with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
        for given in (None, COLOURS, labels.entries):
            reply = runtime.classify(files, given, top=1, deadline_ms=AMPLE_MS)
            expected = by_teacher if threshold == 3.0 else by_student
            assert [one[0].label for one in reply.value] == [one[0].label for one in expected]
        watch.update([-1.0] * 100)
        assert cascade.revoked is not None
        reply = runtime.classify(files, top=1, deadline_ms=AMPLE_MS)
        assert [one[0].label for one in reply.value] == [one[0].label for one in by_teacher]
        raw.behave = raw_server.drop
        reply = runtime.classify(files, top=1)
        assert reply.degraded is not None
        assert [one[0].label for one in reply.value] == [one[0].label for one in by_student]


def test_audits_ask_the_teacher_about_what_the_student_is_sure_of(
    encoder: Encoder,
    server: Server,
    raw: RawServer,
    photos: Path,
    certificate: Certificate,
    labels: CertifiedLabels,
) -> None:
    found = zero_shot(certificate, labels, -2.0)
    watch = DriftWatch(found.digest, found.watched, disagreement=found.disagreement)
    cascade = Cascade(Margin(), -2.0, found, watch, labels=labels, audit=1.0)
    kept: dict[str, InferRequest] = {}
    escalation = Escalation(model="tiny-image", cascade=cascade, defer=kept.__setitem__)
    files = sorted(photos.glob("*.png"))
    by_student = encoder.classify(files, labels.entries, top=1)
    with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
        raw.behave = raw_server.drop
        reply = runtime.classify(files, top=1)  # as certified: the student was sure
        assert (reply.source, reply.degraded) == ("device", None)
        assert [one[0].label for one in reply.value] == [one[0].label for one in by_student]
        assert watch.state.audited == 0
        raw.behave = raw_server.good
        for _ in range(20):
            reply = runtime.classify(files, top=1, deadline_ms=AMPLE_MS)
            if reply.source == "server" and cascade.revoked:
                break
        assert cascade.revoked is not None
        assert "the teacher disagreed with 100.0%" in cascade.revoked
    assert not kept
    with pytest.raises(InputError, match="share of queries to audit"):
        Cascade(Margin(), -2.0, found, watch, labels=labels, audit=1.1)


@pytest.mark.parametrize(("keys", "disagreed"), [(("a", "a", "b"), 0), (("a", "c", "b"), 1)])
def test_copies_of_an_entry_are_no_disagreement(
    encoder: Encoder,
    tiny_bundle: Path,
    cpu_device: DeviceProfile,
    server: Server,
    raw: RawServer,
    certificate: Certificate,
    tmp_path: Path,
    keys: tuple[str, ...],
    disagreed: int,
) -> None:
    teacher = Encoder.open(tiny_bundle, device=cpu_device, precision="fp32")
    raw.answer = answer_by(models_of(teacher, tmp_path))
    picture = tmp_path / "mixed.png"
    Image.new("RGB", (8, 8), (201, 90, 33)).save(picture)
    ours, theirs = (one.encode_image(picture) for one in (encoder, teacher))
    assert not np.array_equal(ours, theirs)  # int8 and fp32, so each has its own copy nearest
    entries = np.concatenate([ours, theirs, -ours])
    index = Index(keys, entries, SPACE, encoder.embedder("text"))
    alone = replace(certificate, threshold=-2.0)
    watch = DriftWatch(alone.digest, alone.watched, disagreement=alone.disagreement)
    cascade = Cascade(Margin(), -2.0, alone, watch, audit=1.0)
    escalation = Escalation(model="tiny-image", cascade=cascade)
    with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
        runtime.search(picture, index, top=1, deadline_ms=AMPLE_MS)
    assert (watch.state.audited, watch.state.disagreed) == (1, disagreed)


def test_other_labels_are_refused(
    encoder: Encoder,
    server: Server,
    photos: Path,
    certificate: Certificate,
    labels: CertifiedLabels,
) -> None:
    cascade = Cascade(Margin(), 3.0, zero_shot(certificate, labels, 3.0), labels=labels)
    escalation = Escalation(model="tiny-image", cascade=cascade)
    index = Index(COLOURS, encoder.encode_text(COLOURS), SPACE, encoder.embedder("text"))
    with SplitRuntime(encoder, plan("device"), server, escalation=escalation) as runtime:
        for other in (("red", "green"), ("red", "green", "teal"), labels.teacher):
            with pytest.raises(CertificateError, match="give no labels to take those"):
                runtime.classify(photos / "red.png", other)
        with pytest.raises(CertificateError, match="not for searching an index"):
            runtime.search(photos / "red.png", index)
    with pytest.raises(CertificateError, match="needs its label sets"):
        Cascade(Margin(), 3.0, cascade.certificate)


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
