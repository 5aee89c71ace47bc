"""Escalate pictures of which the student is unsure to a teacher on the server."""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.scores import Similarities, embed_views
from edgeclip.runtime.encoder import Encoder
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


class Escalator:
    """Replace embeddings that a student is unsure about by the teacher's.

    Args:
        escalation: which teacher to ask, and about which pictures.
        encoder: the student.
        teacher: the model that `escalation` names.
        fallback: asks the teacher while there is time.
    """

    def __init__(
        self,
        escalation: Escalation,
        encoder: Encoder,
        teacher: RemoteModel,
        fallback: RemoteWithFallback,
    ) -> None:
        self._escalation, self._encoder, self._fallback = escalation, encoder, fallback
        self._teacher = RemoteImageTower(teacher, escalation.codec)
        # On a thread of its own: flushing to a disk may take longer than the deadline.
        self._deferring = ThreadPoolExecutor(1, "edgeclip-defer")

    def close(self) -> None:
        """Wait until deferred requests are stored."""
        self._deferring.shutdown()

    def embed(
        self, images: ImageBatch, compared_with: FloatArray, deadline: Deadline
    ) -> StepResult[FloatArray]:
        """Embed pictures, float32 [N, dim]; by the student alone if the teacher cannot be asked.

        Args:
            images: any number.
            compared_with: embeddings of the labels or index entries, float32 [K, dim]; how similar
                they are decides which pictures the student is unsure about.
            deadline: when the embeddings are needed.

        Raises:
            InputError: a picture that cannot be loaded.
            EngineError: the student failed.
        """
        student = self._encoder.encode_pixels(images.pixels)
        if not len(images) or len(compared_with) < 2:  # with no alternative, nothing is unsure
            return StepResult(student, "device")
        views = embed_views(
            self._encoder.encode_pixels, images.pixels, self._escalation.cascade.score.views
        )
        similarities = Similarities.between(student, compared_with, views)
        rows = np.flatnonzero(self._escalation.cascade.select(similarities))
        if not len(rows):
            return StepResult(student, "device")
        return self._ask(student, rows, images.select(rows), deadline)

    def _ask(
        self, student: FloatArray, rows: NDArray[np.intp], unsure: ImageBatch, deadline: Deadline
    ) -> StepResult[FloatArray]:
        def remote(until: Deadline) -> FloatArray:
            both = student.copy()
            both[rows] = self._teacher.embed(unsure, until)
            return both

        found = self._fallback.run(remote, lambda: student, ("nothing",), len(rows), deadline)
        if found.degraded is not None and self._escalation.defer is not None:
            try:
                self._deferring.submit(self._defer, self._escalation.defer, unsure)
            except RuntimeError:  # after `close`
                self._defer(self._escalation.defer, unsure)
        return found

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
