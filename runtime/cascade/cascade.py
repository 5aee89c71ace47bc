"""The cascade: the student answers, and says which of its answers the teacher should give."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertificateError,
    certificate_path,
    is_unsure,
    read_certificate,
)
from edgeclip.runtime.cascade.drift import DriftWatch
from edgeclip.runtime.cascade.scores import Evidence, Score
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.spec import Tower


class Cascade:
    """Decides which queries go to the teacher; how they get there is not its business.

    Threads may share one: scores are watched one batch after the other.

    Args:
        score: how sure the student is.
        threshold: queries with a lower score are escalated.
        certificate: what `score` and `threshold` were certified for, if they were.
        watch: looks at every score; once it raises the alarm the certificate is revoked, and
            all queries are escalated.
        say: told in one line of the revocation, once.

    Attributes:
        score: see above.
        threshold: see above.
        certificate: see above.
        watch: see above.

    Raises:
        CertificateError: the certificate is about another score or threshold.
    """

    def __init__(
        self,
        score: Score,
        threshold: float,
        certificate: Certificate | None = None,
        watch: DriftWatch | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if certificate and (certificate.score, certificate.threshold) != (score, threshold):
            raise CertificateError(
                f"the certificate is about {certificate.score} below {certificate.threshold:g}, "
                f"not {score} below {threshold:g}: use what it says, or certify again"
            )
        self.score, self.threshold = score, threshold
        self.certificate, self.watch = certificate, watch
        self._say = say
        self._said = False
        self._lock = threading.Lock()

    @classmethod
    def certified(
        cls,
        encoder: Encoder,
        *,
        query: Tower = "image",
        watch: Callable[[Certificate], DriftWatch] | None = lambda found: DriftWatch(found.sample),
        say: Callable[[str], None] = lambda line: None,
    ) -> "Cascade":
        """Take the certificate of an encoder's bundle, and check that it is about this encoder.

        The tower is loaded for it: only then it is known which precision runs.

        Args:
            encoder: the student.
            query: the tower whose queries may be escalated.
            watch: makes the watch, perhaps from a state that was kept; None for none.
            say: see the class.

        Raises:
            CertificateError: the bundle has no such certificate, or one of other towers.
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
        made = None if watch is None else watch(found)
        return cls(found.score, found.threshold, found, made, say)

    @property
    def revoked(self) -> str | None:
        """Why the certificate no longer holds, in one line; None as long as it does."""
        if self.watch is None or self.watch.alarm_at is None:
            return None
        return (
            f"the cascade's certificate is revoked: after {self.watch.alarm_at} queries their "
            "scores no longer look like those it was certified on; everything goes to the "
            "teacher until you certify again on such queries with edgeclip cascade"
        )

    @property
    def status(self) -> str:
        """One line for a person: revoked, certified, or neither."""
        if self.certificate is None:
            return f"not certified: queries with a score below {self.threshold:g} are escalated"
        return self.revoked or self.certificate.promise

    def unsure(self, evidence: Evidence) -> NDArray[np.bool_]:
        """Tell which queries the teacher should answer: bool [N].

        After a revocation these are all, those of the batch that brought it included.

        Raises:
            InputError: the evidence lacks the views that the score needs.
        """
        scores = self.score.of(evidence)
        if self.watch is not None:
            with self._lock:
                revoked = self.watch.see(scores)
                first, self._said = revoked and not self._said, self._said or revoked
            if first and self.revoked:
                self._say(self.revoked)
            if revoked:
                return np.ones(len(scores), dtype=np.bool_)
        return is_unsure(scores, self.threshold)


def _load(encoder: Encoder, query: Tower) -> None:
    """Run the tower once on nothing in particular."""
    if query == "text":
        encoder.encode_text("a")
        return
    size = encoder.spec.image.size
    encoder.encode_pixels(np.zeros((1, size, size, 3), dtype=np.uint8))
