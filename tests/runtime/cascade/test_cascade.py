"""The cascade's decisions, with real towers, real scores and a watch that really watches."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.bundle.manifest import FileRecord
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertificateError,
)
from edgeclip.runtime.cascade.drift import DriftRule, DriftWatch, WatchedShare
from edgeclip.runtime.cascade.scores import Entropy, Margin, Similarities
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval

NAMES = ("red", "green", "blue")
Pixels = NDArray[np.uint8]


def pictures(count: int, *, mixed: float, seed: int = 0) -> Pixels:
    """Flat pictures between two of red, green and blue; at `mixed` = 0.5 both are as strong."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 3, count)
    colours = np.eye(3)[first] * (1 - mixed) + np.eye(3)[(first + 1) % 3] * mixed
    colours += rng.normal(0, 0.05, colours.shape)
    flat = (255 * np.clip(colours, 0, 1)).astype(np.uint8)
    return np.broadcast_to(flat[:, None, None], (count, 8, 8, 3)).copy()


def evidence(encoder: Encoder, pixels: Pixels) -> Similarities:
    return Similarities.between(encoder.encode_pixels(pixels), encoder.encode_text(NAMES))


@pytest.fixture
def certificate(certificate: Certificate) -> Certificate:
    watched = WatchedShare(below=0.3, share=Interval(0.02, 0.0, 0.1))
    return dataclasses.replace(certificate, threshold=0.3, watched=(watched,))


@pytest.fixture
def certified_bundle(own_bundle: Path, certificate: Certificate) -> Path:
    """The tiny bundle with the certificate in it."""
    path = own_bundle / certificate.path
    path.parent.mkdir()
    path.write_text(certificate.to_json(), encoding="utf-8")
    manifest = Bundle.open(own_bundle).manifest
    record = FileRecord(certificate.path, path.stat().st_size, sha256_file(path))
    changed = dataclasses.replace(manifest, files=(*manifest.files, record))
    (own_bundle / "edgeclip.json").write_text(changed.to_json(), encoding="utf-8")
    return own_bundle


def test_mixed_pictures_are_the_unsure_ones(encoder: Encoder) -> None:
    cascade = Cascade(Margin(), 0.3)
    assert not cascade.select(evidence(encoder, pictures(20, mixed=0.0))).any()
    assert cascade.select(evidence(encoder, pictures(20, mixed=0.5))).mean() >= 0.9
    assert cascade.status == "not certified: queries with a score below 0.3 are escalated"
    assert cascade.revoked is None


def test_a_certificate_is_for_its_own_score_and_threshold(certificate: Certificate) -> None:
    Cascade(Margin(), 0.3, certificate)
    for score, threshold in ((Margin(), 0.2), (Entropy(logit_scale=10.0), 0.3)):
        with pytest.raises(CertificateError, match="use what it says, or certify again"):
            Cascade(score, threshold, certificate)


def test_comes_from_the_bundle(certified_bundle: Path, cpu_device: DeviceProfile) -> None:
    encoder = Encoder.open(certified_bundle, device=cpu_device)
    cascade = Cascade.certified(encoder)
    assert cascade.threshold == 0.3
    assert cascade.drift is not None
    assert cascade.status.startswith("Keeps at least 95%")
    assert Cascade.certified(encoder, drift=None).drift is None


def test_without_or_with_another_certificate_there_is_none(
    encoder: Encoder, certified_bundle: Path, cpu_device: DeviceProfile
) -> None:
    with pytest.raises(CertificateError, match=r"has no cascade/image\.json"):
        Cascade.certified(encoder)
    other = Encoder.open(certified_bundle, device=cpu_device, precision="fp32")
    with pytest.raises(CertificateError, match="runs in fp32"):
        Cascade.certified(other)
    with pytest.raises(CertificateError, match=r"has no cascade/text\.json"):
        Cascade.certified(other, query="text")


def watch_of(certificate: Certificate, path: Path | None = None) -> DriftWatch:
    return DriftWatch(certificate.digest, certificate.watched, path=path)


def test_drift_revokes_and_everything_is_escalated(
    encoder: Encoder, certificate: Certificate
) -> None:
    said: list[str] = []
    cascade = Cascade(Margin(), 0.3, certificate, watch_of(certificate), on_revoked=said.append)
    usual = evidence(encoder, pictures(100, mixed=0.2, seed=1))
    assert not cascade.select(usual).any()
    assert cascade.status == certificate.promise
    strange = evidence(encoder, pictures(200, mixed=0.5, seed=2))
    assert cascade.select(strange).all()
    assert cascade.revoked is not None
    assert "below 0.3, and when it was certified 0.0% to 10.0%" in cascade.revoked
    assert "certify again" in cascade.revoked
    assert cascade.status == cascade.revoked
    assert cascade.select(usual).all()
    assert said == [cascade.revoked]


def test_audits_need_a_watch(certificate: Certificate) -> None:
    with pytest.raises(InputError, match="give drift, or leave audit out"):
        Cascade(Margin(), 0.3, certificate, audit=0.5)
    with pytest.raises(InputError, match="give drift, or leave audit out"):
        Cascade(Margin(), 0.3, audit=0.5)


@pytest.mark.parametrize(
    ("disagreement", "drawn"),
    [(None, 0), (Interval(0.5, 0.1, 1.0), 0), (Interval(0.05, 0.0, 0.1), 9)],
)
def test_audits_that_tell_nothing_are_not_drawn(
    certificate: Certificate,
    disagreement: Interval | None,
    drawn: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = DriftWatch(certificate.digest, certificate.watched, disagreement=disagreement)
    cascade = Cascade(Margin(), 0.3, certificate, watch, audit=1.0)
    escalated = np.arange(10) == 0
    assert np.flatnonzero(cascade.select_audits(escalated)).tolist() == [*range(1, 1 + drawn)]
    assert ("no audits are drawn" in caplog.text) == (not drawn)


def test_a_revocation_survives_a_restart(
    encoder: Encoder, certified_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    strange = evidence(encoder, pictures(200, mixed=0.5))
    opened = Encoder.open(certified_bundle, device=cpu_device)
    assert Cascade.certified(opened).select(strange).all()
    assert Cascade.certified(opened).revoked is not None
    own = tmp_path / "own.json"
    assert Cascade.certified(opened, state=own).revoked is None
    in_memory = Cascade.certified(opened, state=None)
    assert in_memory.select(strange).all()
    assert Cascade.certified(opened, state=None).revoked is None
    assert not own.exists()


def test_what_was_seen_is_kept_when_it_closes(
    encoder: Encoder, certified_bundle: Path, cpu_device: DeviceProfile
) -> None:
    opened = Encoder.open(certified_bundle, device=cpu_device)
    cascade = Cascade.certified(opened)
    cascade.select(evidence(encoder, pictures(7, mixed=0.1)))
    cascade.close()
    again = Cascade.certified(opened, drift=DriftRule(alpha=0.5))
    assert again.drift is not None
    assert again.drift.seen == 7


def test_a_damaged_state_says_what_to_do(
    certified_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    own = tmp_path / "own.json"
    own.write_text("{")
    with pytest.raises(InputError, match="delete it to watch anew"):
        Cascade.certified(Encoder.open(certified_bundle, device=cpu_device), state=own)


def test_many_threads_lose_no_query(encoder: Encoder, certificate: Certificate) -> None:
    said: list[str] = []
    anything = (WatchedShare(below=0.3, share=Interval(0.5, 0.0, 0.99)),)
    watch = watch_of(dataclasses.replace(certificate, watched=anything))
    cascade = Cascade(Margin(), 0.3, certificate, watch, on_revoked=said.append)
    part = evidence(encoder, pictures(25, mixed=0.2))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cascade.select, [part] * 40))
    assert watch.seen == 1000
    assert not said
