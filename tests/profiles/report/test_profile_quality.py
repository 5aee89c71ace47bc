import dataclasses
import json
from pathlib import Path

from edgeclip.profiles.report.profile_data import NamedRun, SubjectQuality, subjects_of
from edgeclip.profiles.report.profile_quality import (
    quality_of,
    quality_of_bundle,
    quality_section,
    quality_text,
)
from edgeclip.profiles.report.sections import Note
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.report.profile_factory import BUNDLES, quality, quiet_run

EMOJI = Path(__file__).parents[3] / "export" / "emoji_bundle"


def test_the_gates_of_a_bundle_become_quality() -> None:
    found = quality_of_bundle(Bundle.open(EMOJI))
    sha256 = sha256_file(EMOJI / "edgeclip.json")
    assert {one.sha256 for one in found} == {sha256}
    gates = json.loads((EMOJI / "edgeclip.json").read_text(encoding="utf-8"))["gates"]
    int8 = next(gate for gate in gates if gate["name"] == "R@1 loss int8")
    lost = {one.precision: one.value for one in found if one.unit == "points"}
    assert lost["fp32"] == Interval(0.0, 0.0, 0.0)
    assert lost["int8"] == Interval(-int8["value"], -int8["high"], -int8["low"])
    cosines = [one for one in found if one.unit == "cosine"]
    assert {(one.part, one.precision) for one in cosines} == {
        (part, precision) for part in ("image", "text") for precision in ("fp32", "fp16", "int8")
    }
    assert all(0.99 < one.value.low <= one.value.value <= one.value.high <= 1 for one in cosines)


def test_quality_fits_the_bundle_precision_and_part_it_is_of() -> None:
    subjects = subjects_of((NamedRun(name="epyc", run=quiet_run()),))
    for subject in subjects:
        identity = subject.item.identity
        assert identity is not None
        found = quality_of(subject, quality())
        assert {one.sha256 for one in found} == {identity.sha256}
        assert {one.precision for one in found} == {identity.precision}
        cosines = [one for one in found if one.unit == "cosine"]
        wanted = subject.item.part == "image" and identity.sha256 == BUNDLES["student"]
        assert len(cosines) == wanted


def test_quality_without_identity_goes_by_the_name() -> None:
    item = dataclasses.replace(quiet_run().measurements[0], identity=None)
    run = dataclasses.replace(quiet_run(), measurements=(item,))
    (subject,) = subjects_of((NamedRun(name="epyc", run=run),))
    assert quality_of(subject, quality()) == []
    named = SubjectQuality(
        metric="R@1",
        value=Interval(0.92, 0.9, 0.94),
        unit="share",
        sha256=None,
        precision=None,
        part=None,
        subject=item.name,
    )
    assert quality_of(subject, [named]) == [named]
    assert quality_of(subject, [dataclasses.replace(named, subject="another")]) == []


def test_another_bundle_than_the_measured_one_is_told() -> None:
    subjects = subjects_of((NamedRun(name="epyc", run=quiet_run()),))
    assert quality_section(subjects, ()) is None
    section = quality_section(subjects, quality_of_bundle(Bundle.open(EMOJI)))
    assert section is not None
    (note,) = section.blocks
    assert isinstance(note, Note)
    assert "another hash" in note.text


def test_quality_is_printed_in_its_unit() -> None:
    assert quality_text(0.921, "share") == "92.1%"
    assert quality_text(0.9971234, "cosine") == "0.99712"
    assert quality_text(-0.35, "points") == "-0.35 points"
    assert quality_text(-0.0004, "points") == "0 points"
