"""Decide which queries to escalate from the student to the teacher, while no drift is seen."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertificateError,
    certificate_path,
    needs_teacher,
    read_certificate,
)
from edgeclip.runtime.cascade.drift import DriftDetector
from edgeclip.runtime.cascade.scores import Score, Similarities
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.spec import Tower


class Cascade:
    """Decide which queries go to the teacher, by a score and a threshold.

    Threads may share one: scores are checked for drift batch by batch.

    Args:
        score: confidence of the student.
        threshold: queries with a lower score are escalated.
        certificate: what `score` and `threshold` were certified for, if they were.
        drift: checks every score; once it raises the alarm the certificate is revoked, and all
            queries are escalated.
        on_revoked: called once with a line that reports the revocation.

    Attributes:
        score, threshold, certificate, drift: see above.

    Raises:
        CertificateError: the certificate is for another score or threshold.
    """

    def __init__(
        self,
        score: Score,
        threshold: float,
        certificate: Certificate | None = None,
        drift: DriftDetector | None = None,
        on_revoked: Callable[[str], None] = lambda line: None,
    ) -> None:
        if certificate and (certificate.score, certificate.threshold) != (score, threshold):
            raise CertificateError(
                f"the certificate is for {certificate.score} below {certificate.threshold:g}, "
                f"not {score} below {threshold:g}: use what it says, or certify again"
            )
        self.score, self.threshold = score, threshold
        self.certificate, self.drift = certificate, drift
        self._on_revoked = on_revoked
        self._is_reported = False
        self._lock = threading.Lock()

    @classmethod
    def certified(
        cls,
        encoder: Encoder,
        *,
        query: Tower = "image",
        drift: Callable[[Certificate], DriftDetector] | None = lambda found: DriftDetector(
            found.sample
        ),
        on_revoked: Callable[[str], None] = lambda line: None,
    ) -> "Cascade":
        """Read the certificate of an encoder's bundle, and check that it is for this encoder.

        This loads the tower: only then its precision is known.

        Args:
            encoder: the student.
            query: the tower whose queries may be escalated.
            drift: makes the drift detector, perhaps from a saved state; None for none.
            on_revoked: see the class.

        Raises:
            CertificateError: the bundle has no such certificate, or one for other towers.
            BundleError: see `read_certificate`.
            EngineError: the tower cannot be run.
        """
        found = read_certificate(encoder.bundle, query)
        if found is None:
            raise CertificateError(
                f"{encoder.bundle.path} has no {certificate_path(query)}: make one with "
                "edgeclip cascade"
            )
        _load(encoder, query)
        found.check(encoder.bundle.manifest, encoder.precisions)
        detector = None if drift is None else drift(found)
        return cls(found.score, found.threshold, found, detector, on_revoked)

    @property
    def revoked(self) -> str | None:
        """Why the certificate no longer holds, in one line; None as long as it does."""
        if self.drift is None or self.drift.alarm_at is None:
            return None
        return (
            f"the cascade's certificate is revoked: after {self.drift.alarm_at} queries their "
            "scores no longer look like those it was certified on; everything goes to the "
            "teacher until you certify again on such queries with edgeclip cascade"
        )

    @property
    def status(self) -> str:
        """One line for a person: revoked, certified, or neither."""
        if self.certificate is None:
            return f"not certified: queries with a score below {self.threshold:g} are escalated"
        return self.revoked or self.certificate.promise

    def select(self, similarities: Similarities) -> NDArray[np.bool_]:
        """Select the queries that the teacher should answer: bool [N].

        After a revocation these are all, including the batch that caused it.

        Raises:
            InputError: the similarities lack the views that the score needs.
        """
        scores = self.score.of(similarities)
        if self.drift is not None:
            with self._lock:
                revoked = self.drift.update(scores)
                is_first = revoked and not self._is_reported
                self._is_reported = self._is_reported or revoked
            if is_first and self.revoked:
                self._on_revoked(self.revoked)
            if revoked:
                return np.ones(len(scores), dtype=np.bool_)
        return needs_teacher(scores, self.threshold)


def _load(encoder: Encoder, query: Tower) -> None:
    """Load the tower by one run on a dummy input."""
    if query == "text":
        encoder.encode_text("a")
        return
    size = encoder.spec.image.size
    encoder.encode_pixels(np.zeros((1, size, size, 3), dtype=np.uint8))
