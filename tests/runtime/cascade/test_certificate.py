"""The certificate: its round trip, and all that it must not be used with."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.bundle.index import Index, LabelSet
from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertificateError,
    TowerIdentity,
    certified_labels_path,
    read_certificate,
    read_labels,
)
from edgeclip.runtime.cascade.scores import Agreement, Entropy, Margin
from edgeclip.runtime.errors import BundleError, ConfigError
from edgeclip.runtime.spec import Precision, Tower
from tests.conftest import SPACE
from tests.runtime.cascade.conftest import EMBEDDER

PRECISIONS: dict[Tower, Precision] = {"image": "int8", "text": "fp32"}
Edit = Callable[[dict[str, Any]], None]
EditManifest = Callable[[Path, Edit], None]


def test_round_trip_with_every_score(certificate: Certificate) -> None:
    for score in (Margin(), Entropy(logit_scale=40.5), Agreement(views=3, measure="answer")):
        made = dataclasses.replace(certificate, score=score)
        assert Certificate.from_json(made.to_json(), source="x") == made
    assert certificate.digest != dataclasses.replace(certificate, threshold=0.25).digest


def test_says_what_it_promises(certificate: Certificate) -> None:
    for words in (
        "at least 95% of the quality of tiny at finding the caption of a picture among 3 entries",
        f"embedded by the teacher (tower {EMBEDDER[:12]})",
        "on queries like those of pictures (wrong with probability 0.05 at most)",
        "asking it for 10.0% of them",
        "assumes that all pictures are independent",
        "cannot be reached the student's own answers stand, without a promise: 90.0%",
    ):
        assert words in certificate.promise
    assert "belong together" not in certificate.promise


@pytest.mark.parametrize(("largest", "words"), [(1, "none belong"), (3, "at most 3 belong")])
def test_promises_for_clusters_no_larger_than_those_seen(
    certificate: Certificate, largest: int, words: str
) -> None:
    grouped = dataclasses.replace(certificate.tested_on, cluster_by="embedding", largest=largest)
    assert (
        f"of which {words} together" in dataclasses.replace(certificate, tested_on=grouped).promise
    )


def an_index(count: int, embedder: str = EMBEDDER) -> Index:
    embeddings = np.tile(np.eye(1, 8, dtype=np.float32), (count, 1))
    return Index(tuple(map(str, range(count))), embeddings, SPACE, embedder)


def some_labels(*names: str, embedder: str = EMBEDDER) -> LabelSet:
    embeddings = np.eye(len(names), 8, dtype=np.float32)
    return LabelSet(names=names, embeddings=embeddings, space=SPACE, embedder=embedder)


@pytest.fixture
def zero_shot(certificate: Certificate) -> Certificate:
    digest = some_labels("red", "green", "blue").digest
    tested = dataclasses.replace(
        certificate.tested_on, task="zero-shot", labels=digest, teacher_labels=digest
    )
    return dataclasses.replace(certificate, tested_on=tested)


def test_binds_the_index(certificate: Certificate) -> None:
    tested = dataclasses.replace(certificate.tested_on, entries=100)
    certificate = dataclasses.replace(certificate, tested_on=tested)
    for count in (90, 100, 110):
        certificate.check_index(an_index(count))
    for count in (89, 111):
        with pytest.raises(CertificateError, match=f"not for an index of {count} entries"):
            certificate.check_index(an_index(count))
    with pytest.raises(CertificateError, match="embedded by the tower ffff"):
        certificate.check_index(an_index(100, "f" * 64))
    with pytest.raises(CertificateError, match="does not say what embedded it: make it with"):
        certificate.check_index(an_index(100, ""))


def test_binds_the_labels(zero_shot: Certificate) -> None:
    zero_shot.check_labels(some_labels("red", "green", "blue"))
    for other in (some_labels("red", "green", "teal"), some_labels("red", "green")):
        with pytest.raises(CertificateError, match=r"3 labels .* not for classifying by"):
            zero_shot.check_labels(other)


def test_binds_the_task(certificate: Certificate, zero_shot: Certificate) -> None:
    with pytest.raises(CertificateError, match="not for classifying by 3 labels"):
        certificate.check_labels(some_labels("red", "green", "blue"))
    with pytest.raises(CertificateError, match="not for searching an index"):
        zero_shot.check_index(an_index(3))


def test_binds_the_kind_of_queries(certificate: Certificate) -> None:
    certificate.check_queries("image")
    with pytest.raises(CertificateError, match="not for queries that are texts"):
        certificate.check_queries("text")


def test_label_sets_belong_to_zero_shot(certificate: Certificate) -> None:
    with pytest.raises(ValueError, match="label sets belong"):
        dataclasses.replace(certificate.tested_on, labels="0" * 64)
    with pytest.raises(ValueError, match="label sets belong"):
        dataclasses.replace(certificate.tested_on, task="zero-shot")


def test_labels_lie_beside_the_certificate(
    zero_shot: Certificate, certificate: Certificate, own_bundle: Path
) -> None:
    bundle = Bundle.open(own_bundle)
    assert read_labels(bundle, certificate) is None
    with pytest.raises(CertificateError, match="does not exist"):
        read_labels(bundle, zero_shot)
    path = own_bundle / certified_labels_path("teacher")
    some_labels("red", "green", "blue").save(path)
    found = read_labels(bundle, zero_shot)
    assert found is not None
    assert found.teacher.names == found.entries.names == ("red", "green", "blue")
    some_labels("red", "green", "teal").save(path)
    with pytest.raises(CertificateError, match="does not hold the labels that were certified"):
        read_labels(bundle, zero_shot)


def test_fits_the_bundle_it_was_made_for(certificate: Certificate, tiny_bundle: Path) -> None:
    certificate.check(Bundle.open(tiny_bundle).manifest, PRECISIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": "6" * 64}, "another embedding space"),
        ({"precision": "fp32"}, "is for fp32, but the image tower runs in int8"),
        ({"sha256": "0" * 64}, "another image tower"),
    ],
)
def test_refused_with_another_student(
    certificate: Certificate, tiny_bundle: Path, change: dict[str, str], message: str
) -> None:
    student = certificate.student
    if "sha256" in change:
        (file,) = student.files
        student = dataclasses.replace(
            student, files=(dataclasses.replace(file, sha256=change["sha256"]),)
        )
    elif "precision" in change:
        student = TowerIdentity.of(Bundle.open(tiny_bundle).manifest, "image", "fp32")
    other = dataclasses.replace(
        certificate, student=student, space=change.get("space", certificate.space)
    )
    with pytest.raises(CertificateError, match=message):
        other.check(Bundle.open(tiny_bundle).manifest, PRECISIONS)


def test_the_indexing_tower_counts_too(certificate: Certificate, tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    other = dataclasses.replace(
        certificate, student_index=TowerIdentity.of(manifest, "text", "fp32")
    )
    other.check(manifest, PRECISIONS)
    with pytest.raises(CertificateError, match="text tower runs in int8"):
        other.check(manifest, {"image": "int8", "text": "int8"})


def test_a_bundle_without_one_has_none(tiny_bundle: Path) -> None:
    assert read_certificate(Bundle.open(tiny_bundle)) is None


def write(bundle: Path, content: bytes, edit: EditManifest) -> Bundle:
    """Put a certificate into a bundle, declared as it is."""
    path = bundle / "cascade" / "image.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)

    def declare(data: dict[str, Any]) -> None:
        data["files"].append(
            {"path": "cascade/image.json", "bytes": len(content), "sha256": sha256_file(path)}
        )

    edit(bundle, declare)
    return Bundle.open(bundle)


def test_is_read_from_a_bundle(
    certificate: Certificate, own_bundle: Path, edit_manifest: EditManifest
) -> None:
    bundle = write(own_bundle, certificate.to_json().encode(), edit_manifest)
    assert read_certificate(bundle) == certificate
    assert read_certificate(bundle, "text") is None
    path = own_bundle / "cascade" / "image.json"
    path.write_bytes(path.read_bytes().replace(b"0.125", b"0.025"))
    with pytest.raises(BundleError, match="altered"):
        read_certificate(bundle)


def changed(certificate: Certificate, **change: object) -> bytes:
    return json.dumps(json.loads(certificate.to_json()) | change).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema 2 of a certificate is not 3"),
        ({"more": 1}, "more: unknown key"),
        ({"p_value": 0.03}, "certifies nothing at 0.025"),
        ({"tested_at": 0.06}, "a part of 0.05"),
        ({"try_number": 0}, "try_number"),
        ({"bound": 1.5}, "1 at most"),
        ({"delta": 0.0}, "delta"),
        ({"threshold": "low"}, "threshold"),
        ({"score": {"kind": "luck"}}, "score"),
    ],
)
def test_damage_is_one_clear_error(
    certificate: Certificate, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Certificate.from_json(changed(certificate, **change).decode(), source="x")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_what_is_no_certificate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="certify again"):
        Certificate.from_json(text, source="x")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"text"])
def test_damage_in_a_bundle_names_the_file(
    own_bundle: Path, edit_manifest: EditManifest, content: bytes
) -> None:
    bundle = write(own_bundle, content, edit_manifest)
    with pytest.raises(CertificateError, match=r"cascade/image\.json is not"):
        read_certificate(bundle)


def test_a_certificate_in_the_wrong_place_is_refused(
    certificate: Certificate, own_bundle: Path, edit_manifest: EditManifest
) -> None:
    bundle = write(own_bundle, changed(certificate, query="text"), edit_manifest)
    with pytest.raises(CertificateError, match="is for text queries"):
        read_certificate(bundle)
