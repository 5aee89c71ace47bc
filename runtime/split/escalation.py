"""Escalate pictures of which the student is unsure to a teacher on the server."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import Hit, Index, LabelSet
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.scores import Similarities, embed_views
from edgeclip.runtime.encoder import Encoder, LabelScore
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.remote_models import ImageBatch, RemoteImageTower, RemoteModel
from edgeclip.runtime.split.remote_with_fallback import RemoteWithFallback, StepResult
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import InferRequest

_log = logging.getLogger(__name__)

Defer = Callable[[str, InferRequest], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalation:
    """Which teacher to ask, and about which pictures.

    Attributes:
        model: the teacher's name on the server; it takes pictures and embeds them in the
            embedding space of the student.
        cascade: decides which pictures are sent to it.
        codec: how they are sent, see `codec.encode_picture`.
        defer: called with a key and a request if the teacher could not be asked, such as
            `Outbox.put`, on a thread of its own. The same picture and model have the same key.
    """

    model: str
    cascade: Cascade
    codec: str = "file"
    defer: Defer | None = None


@dataclass(frozen=True, slots=True)
class _Choices:
    """What pictures choose among: K names, where copies share one, and float32 [K, dim]."""

    names: tuple[str, ...]
    embeddings: FloatArray

    def first_names(self, pictures: FloatArray) -> list[str]:
        """Return the name of the nearest entry of each picture, [N, dim]."""
        return [self.names[at] for at in (pictures @ self.embeddings.T).argmax(axis=1).tolist()]


@dataclass(frozen=True, slots=True)
class _Embedded:
    """Embeddings of pictures, float32 [N, dim], and which of them are the teacher's: bool [N]."""

    embeddings: FloatArray
    is_teachers: NDArray[np.bool_]


class Escalator:
    """Classify and search with a student, and with its teacher where the student is unsure.

    What a certificate was not made for is refused: another task, label set or kind of queries, or
    an index of another embedder or size.

    Args:
        escalation: which teacher to ask, and about which pictures.
        encoder: the student.
        teacher: the model that `escalation` names.
        fallback: asks the teacher while there is time.

    Raises:
        CertificateError: the certificate is for texts.
    """

    def __init__(
        self,
        escalation: Escalation,
        encoder: Encoder,
        teacher: RemoteModel,
        fallback: RemoteWithFallback,
    ) -> None:
        self._escalation, self._encoder, self._fallback = escalation, encoder, fallback
        self._certificate = escalation.cascade.certificate
        if self._certificate is not None:
            self._certificate.check_queries("image")
        self._teacher = RemoteImageTower(teacher, escalation.codec)
        # On a thread of its own: flushing to a disk may take longer than the deadline.
        self._deferring = ThreadPoolExecutor(1, "edgeclip-defer")

    def close(self) -> None:
        """Wait until deferred requests are stored, and the state of the drift watch is."""
        self._deferring.shutdown()
        self._escalation.cascade.close()

    def classify(
        self,
        images: ImageBatch,
        labels: LabelSet | Sequence[str] | None,
        top: int,
        deadline: Deadline,
    ) -> StepResult[list[tuple[LabelScore, ...]]]:
        """Classify pictures; by the student alone where the teacher cannot be asked.

        Under a zero-shot certificate the teacher's pictures choose among the teacher's labels.

        Args:
            images: any number.
            labels: a label set, or names for the student to embed. None, or the certified names,
                are the certified label set.
            top: how many labels of each.
            deadline: when the answers are needed.

        Raises:
            CertificateError: the certificate is for another task or label set.
            SpaceMismatchError: the label set was made in another embedding space.
            InputError: no labels, or a picture that cannot be loaded.
            EngineError: the student failed.
        """
        entries = self._entries(labels)
        entries.check_space(self._encoder.space)
        certified = self._escalation.cascade.labels
        teachers = entries if certified is None else certified.teacher
        among, among_theirs = (_Choices(one.names, one.embeddings) for one in (entries, teachers))
        found = self._embed(images, among, among_theirs, deadline)
        embeddings, theirs = found.value.embeddings, found.value.is_teachers
        answers = self._encoder.classify_embeddings(embeddings, entries, top=top)
        if teachers is not entries and theirs.any():
            by_teacher = self._encoder.classify_embeddings(embeddings[theirs], teachers, top=top)
            for row, answer in zip(np.flatnonzero(theirs).tolist(), by_teacher, strict=True):
                answers[row] = answer
        return StepResult(answers, found.source, found.degraded)

    def search(
        self, images: ImageBatch, index: Index, top: int, deadline: Deadline
    ) -> StepResult[list[tuple[Hit, ...]]]:
        """Find the entries of an index nearest to pictures, likewise.

        Raises:
            CertificateError: the certificate is for another task, or for other entries.
            InputError: a picture that cannot be loaded.
            EngineError: the student failed.
        """
        if self._certificate is not None:
            self._certificate.check_index(index)
        choices = _Choices(index.keys, index.embeddings)
        found = self._embed(images, choices, choices, deadline)
        hits = self._encoder.search(found.value.embeddings, index, top=top)
        return StepResult(hits, found.source, found.degraded)

    def check_search_by_text(self) -> None:
        """Raise if a certificate is for pictures alone: a text is never escalated.

        Raises:
            CertificateError: there is a certificate.
        """
        if self._certificate is not None:
            self._certificate.check_queries("text")

    def _entries(self, labels: LabelSet | Sequence[str] | None) -> LabelSet:
        certified = self._escalation.cascade.labels
        if isinstance(labels, LabelSet):
            entries = labels
        elif certified is not None and (labels is None or tuple(labels) == certified.entries.names):
            return certified.entries
        elif labels is None:
            raise InputError("no labels were given, and no certificate has them")
        else:
            entries = self._encoder.bake_labels(labels)
        if self._certificate is not None:
            self._certificate.check_labels(entries)
        return entries

    def _embed(
        self,
        images: ImageBatch,
        compared_with: _Choices,
        teachers: _Choices,
        deadline: Deadline,
    ) -> StepResult[_Embedded]:
        """Embed pictures, by the teacher where the student is unsure and the teacher answers.

        Audited pictures are the teacher's as well, where it answers. `compared_with` and
        `teachers` are what student and teacher choose among.
        """
        cascade = self._escalation.cascade
        student = self._encoder.encode_pixels(images.pixels)
        alone = _Embedded(student, np.zeros(len(student), np.bool_))
        if (
            not len(images) or len(compared_with.names) < 2
        ):  # with no alternative, nothing is unsure
            return StepResult(alone, "device")
        views = embed_views(self._encoder.encode_pixels, images.pixels, cascade.score.views)
        seen = Similarities.between(student, compared_with.embeddings, views)
        escalated = cascade.select(seen)
        audited = cascade.select_audits(escalated)
        rows = np.flatnonzero(escalated | audited)
        if not len(rows):
            return StepResult(alone, "device")
        found = self._ask(alone, rows, images.select(rows), deadline)
        if found.degraded is None:
            # By name: of several copies of an entry either may come first.
            ours = compared_with.first_names(student[audited])
            theirs = teachers.first_names(found.value.embeddings[audited])
            differ = [one != other for one, other in zip(ours, theirs, strict=True)]
            cascade.add_audits(np.array(differ, dtype=np.bool_))
        elif not escalated.any():  # an answer that was only to be audited is as certified
            return StepResult(alone, "device")
        elif self._escalation.defer is not None:
            self._put_off(self._escalation.defer, images.select(np.flatnonzero(escalated)))
        return found

    def _ask(
        self, alone: _Embedded, rows: NDArray[np.intp], asked: ImageBatch, deadline: Deadline
    ) -> StepResult[_Embedded]:
        def remote(until: Deadline) -> _Embedded:
            both, theirs = alone.embeddings.copy(), alone.is_teachers.copy()
            both[rows], theirs[rows] = self._teacher.embed(asked, until), True
            return _Embedded(both, theirs)

        return self._fallback.run(remote, lambda: alone, ("nothing",), len(rows), deadline)

    def _put_off(self, defer: Defer, unsure: ImageBatch) -> None:
        try:
            self._deferring.submit(self._defer, defer, unsure)
        except RuntimeError:  # after `close`
            self._defer(defer, unsure)

    def _defer(self, defer: Defer, unsure: ImageBatch) -> None:
        try:
            for row in range(len(unsure)):
                request = self._teacher.request(unsure.select(np.array([row])))
                defer(request_key(request), request)
        except Exception as error:
            _log.warning("an escalation could not be stored: %s", error)


def request_key(request: InferRequest) -> str:
    """Return an idempotency key: SHA-256 of the model and the inputs of a request."""
    digest = hashlib.sha256(request.model.encode())
    for name, array in sorted(request.inputs.items()):
        items = array.ravel().tolist() if array.dtype == object else [array.tobytes()]
        for part in (name.encode(), *items):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
