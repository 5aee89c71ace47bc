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
from edgeclip.runtime.cascade.scores import Evidence, embed_views
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.split.remote_models import FarModel, Pictures, PictureTower
from edgeclip.runtime.split.remote_with_fallback import Outcome, ServerOrDevice
from edgeclip.runtime.split.resilience import Deadline
from edgeclip.runtime.wire.messages import InferRequest

_log = logging.getLogger(__name__)

Defer = Callable[[str, InferRequest], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalation:
    """Whom to ask for a second opinion, and when.

    Attributes:
        model: the teacher's name on the server; it takes pictures and embeds them in the
            embedding space of the student.
        cascade: decides which pictures are shown to it.
        codec: how they are sent, see `codec_image`.
        defer: called with a key and a request where the teacher could not be asked, such as
            `Outbox.put`, on a thread of its own. The key is the same for the same picture and
            model.
    """

    model: str
    cascade: Cascade
    codec: str = "file"
    defer: Defer | None = None


class SecondOpinion:
    """Replaces the embeddings of which a student is unsure by a teacher's.

    Args:
        escalation: whom to ask, and when.
        encoder: the student.
        teacher: the model that `escalation` names.
        chooser: decides whether there is time.
    """

    def __init__(
        self,
        escalation: Escalation,
        encoder: Encoder,
        teacher: FarModel,
        chooser: ServerOrDevice,
    ) -> None:
        self._escalation, self._encoder, self._chooser = escalation, encoder, chooser
        self._teacher = PictureTower(teacher, escalation.codec)
        # Flushing to a disk may take longer than there is time.
        self._deferring = ThreadPoolExecutor(1, "edgeclip-defer")

    def close(self) -> None:
        """Wait until all that was deferred is kept."""
        self._deferring.shutdown()

    def embed(
        self, pictures: Pictures, entries: FloatArray, deadline: Deadline
    ) -> Outcome[FloatArray]:
        """Embed pictures; float32 [N, dim].

        Where the teacher cannot be asked, the student's embeddings are the answer.

        Args:
            pictures: any number.
            entries: what the embeddings will be held against, float32 [K, dim].
            deadline: of all of it.

        Raises:
            InputError: a picture that cannot be loaded.
            EngineError: the student failed.
        """
        student = self._encoder.encode_pixels(pictures.pixels)
        if not len(pictures) or len(entries) < 2:  # no choice is no doubt
            return Outcome(student, "device")
        views = embed_views(
            self._encoder.encode_pixels, pictures.pixels, self._escalation.cascade.score.views
        )
        evidence = Evidence.against(student, entries, views)
        rows = np.flatnonzero(self._escalation.cascade.unsure(evidence))
        if not len(rows):
            return Outcome(student, "device")
        return self._asked(student, rows, pictures.some(rows), deadline)

    def _asked(
        self, student: FloatArray, rows: NDArray[np.intp], unsure: Pictures, deadline: Deadline
    ) -> Outcome[FloatArray]:
        def far(until: Deadline) -> FloatArray:
            both = student.copy()
            both[rows] = self._teacher.embed(unsure, until)
            return both

        found = self._chooser.run(far, lambda: student, ("nothing",), len(rows), deadline)
        if found.degraded is not None and self._escalation.defer is not None:
            try:
                self._deferring.submit(self._defer, self._escalation.defer, unsure)
            except RuntimeError:  # after `close`
                self._defer(self._escalation.defer, unsure)
        return found

    def _defer(self, defer: Defer, unsure: Pictures) -> None:
        try:
            for row in range(len(unsure)):
                request = self._teacher.request(unsure.some(np.array([row])))
                defer(request_key(request), request)
        except Exception as error:
            _log.warning("an escalation is lost: %s", error)


def request_key(request: InferRequest) -> str:
    """SHA-256 of the model and the inputs of a request: an idempotency key."""
    digest = hashlib.sha256(request.model.encode())
    for name, array in sorted(request.inputs.items()):
        items = array.ravel().tolist() if array.dtype == object else [array.tobytes()]
        for part in (name.encode(), *items):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
