"""Decide which queries to escalate from the student to the teacher, while no drift is seen."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertificateError,
    CertifiedLabels,
    certificate_path,
    needs_teacher,
    read_certificate,
    read_labels,
)
from edgeclip.runtime.cascade.drift import DriftRule, DriftWatch, default_state_path
from edgeclip.runtime.cascade.scores import Score, Similarities
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Tower

_log = logging.getLogger(__name__)

_DEFAULT_RULE = DriftRule()


class Cascade:
    """Decide which queries go to the teacher, by a score and a threshold.

    Threads may share one: scores are watched for drift batch by batch.

    Args:
        score: confidence of the student.
        threshold: queries with a lower score are escalated.
        certificate: what `score` and `threshold` were certified for, if they were.
        drift: watches every score; once it raises the alarm the certificate is revoked, and all
            queries are escalated.
        on_revoked: called once with a line that reports the revocation.
        labels: the label sets of a zero-shot certificate.
        audit: share of the queries that the student answers alone, drawn by chance, which go to
            the teacher too: how often it disagrees is watched as well. Where no share of
            disagreements below 1 was certified, an audit would tell nothing and none is drawn.

    Attributes:
        score, threshold, certificate, drift, labels: see above.

    Raises:
        CertificateError: the certificate is for another score or threshold, or lacks its labels.
        InputError: `audit` is no share, or there is no watch for it.
    """

    def __init__(
        self,
        score: Score,
        threshold: float,
        certificate: Certificate | None = None,
        drift: DriftWatch | None = None,
        on_revoked: Callable[[str], None] = lambda line: None,
        *,
        labels: CertifiedLabels | None = None,
        audit: float = 0.0,
    ) -> None:
        if not 0 <= audit <= 1:
            raise InputError(f"audit is {audit:g}: give the share of queries to audit, 0 to 1")
        if audit and drift is None:
            raise InputError(
                f"audit is {audit:g}, but without a drift watch nothing looks at audits: give "
                "drift, or leave audit out"
            )
        if audit and drift is not None and not drift.bets_on_audits:
            _log.warning(
                "no audits are drawn, since they would tell nothing: no share of disagreements "
                "below 1 was certified; certify with more queries to audit"
            )
        if certificate and (certificate.score, certificate.threshold) != (score, threshold):
            raise CertificateError(
                f"the certificate is for {certificate.score} below {certificate.threshold:g}, "
                f"not {score} below {threshold:g}: use what it says, or certify again"
            )
        if certificate and certificate.tested_on.task == "zero-shot" and labels is None:
            raise CertificateError(
                "a zero-shot certificate needs its label sets: give those of `read_labels`"
            )
        self.score, self.threshold = score, threshold
        self.certificate, self.drift, self.labels = certificate, drift, labels
        self._audit, self._chance = audit, np.random.default_rng()
        self._on_revoked = on_revoked
        self._is_reported = False
        self._lock = threading.Lock()

    @classmethod
    def certified(
        cls,
        encoder: Encoder,
        *,
        query: Tower = "image",
        drift: DriftRule | None = _DEFAULT_RULE,
        state: Path | Literal["default"] | None = "default",
        audit: float = 0.0,
        on_revoked: Callable[[str], None] = lambda line: None,
    ) -> "Cascade":
        """Read the certificate of an encoder's bundle, and check that it is for this encoder.

        This loads the tower: only then its precision is known.

        Args:
            encoder: the student.
            query: the tower whose queries may be escalated.
            drift: when the watch raises the alarm; None for no watch.
            state: the file that the watch is kept in, so that it goes on after a restart; by
                default one for each certificate in the user's folder of state (see `state_root`).
                None keeps it in memory: then its promise is one of each process alone.
            audit, on_revoked: see the class.

        Raises:
            CertificateError: the bundle has no such certificate, or one for other towers.
            BundleError: see `read_certificate`.
            EngineError: the tower cannot be run.
            InputError: the state is damaged, cannot be read, or is of another certificate; or
                `audit` is no share, or has no watch.
        """
        found = read_certificate(encoder.bundle, query)
        if found is None:
            raise CertificateError(
                f"{encoder.bundle.path} has no {certificate_path(query)}: make one with "
                "edgeclip cascade"
            )
        _load(encoder, query)
        found.check(encoder.bundle.manifest, encoder.precisions)
        labels, watch = read_labels(encoder.bundle, found), None
        if drift is not None:
            path = default_state_path(found.digest) if state == "default" else state
            watch = DriftWatch(
                found.digest, found.watched, drift, disagreement=found.disagreement, path=path
            )
        given = (found.score, found.threshold, found, watch, on_revoked)
        return cls(*given, labels=labels, audit=audit)

    @property
    def revoked(self) -> str | None:
        """Why the certificate no longer holds, in one line; None as long as it does."""
        if self.drift is None or self.drift.alarm_at is None:
            return None
        return (
            f"the cascade's certificate is revoked: {self.drift.finding}; everything goes to the "
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
        escalated = needs_teacher(scores, self.threshold)
        if self.drift is not None:
            with self._lock:
                revoked = self.drift.update(scores)
            self._report()
            if revoked:
                return np.ones(len(escalated), dtype=np.bool_)
        return escalated

    def select_audits(self, escalated: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Draw the queries to audit among those that are not escalated: bool [N]."""
        if self._audit == 0 or self.drift is None or not self.drift.bets_on_audits:
            return np.zeros(len(escalated), dtype=np.bool_)
        with self._lock:
            drawn: NDArray[np.bool_] = self._chance.random(len(escalated)) < self._audit
        return drawn & ~escalated

    def add_audits(self, disagreed: NDArray[np.bool_]) -> None:
        """Take the outcomes of audits: whether the teacher had another first entry, bool [M]."""
        if self.drift is not None:
            with self._lock:
                self.drift.update_audits(disagreed.tolist())
            self._report()

    def _report(self) -> None:
        """Say once that the certificate is revoked."""
        with self._lock:
            is_first = self.revoked is not None and not self._is_reported
            self._is_reported = self._is_reported or is_first
        if is_first and self.revoked:
            self._on_revoked(self.revoked)

    def close(self) -> None:
        """Write what the watch saw to its file; the cascade may go on."""
        if self.drift is not None:
            with self._lock:
                self.drift.close()


def _load(encoder: Encoder, query: Tower) -> None:
    """Load the tower by one run on a dummy input."""
    if query == "text":
        encoder.encode_text("a")
        return
    size = encoder.spec.image.size
    encoder.encode_pixels(np.zeros((1, size, size, 3), dtype=np.uint8))
