"""Whether a student is in its teacher's space: judged with real towers on real pictures."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.errors import GateError
from edgeclip.export.gates.gates import judge_gates
from edgeclip.export.gates.teacher_agreement import (
    TeacherAgreement,
    TeacherBounds,
    judge_agreement,
    measure_kept,
)
from edgeclip.export.graph.embedders import PairEmbeddings
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.bundle.manifest import (
    COSINE_TO_TEACHER,
    P1_COSINE_TO_TEACHER,
    R1_KEPT,
    DataRecord,
    GateRecord,
    GateRemark,
)
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError, SpaceMismatchError
from edgeclip.runtime.quality.relevance import Relevance

Make = Callable[..., Source]
DATA = DataRecord("pairs", 100, "0" * 64)


def by_name(found: TeacherAgreement) -> dict[tuple[str, str], GateRecord]:
    return {(item.subject, item.record.name): item.record for item in found.judged}


def changed(
    model: DualEncoder, weight: str, change: Callable[[torch.Tensor], object]
) -> DualEncoder:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other.model.get_parameter(weight))
    return other


@pytest.fixture(scope="module")
def left(clip: DualEncoder) -> DualEncoder:
    """A student whose image tower turned away, which its R@1 against itself would not tell."""
    return changed(clip, "visual_projection.weight", torch.Tensor.neg_)


def test_a_student_that_equals_its_teacher_is_in_its_space(clip: DualEncoder, blobs: Make) -> None:
    found = judge_agreement(clip, clip, blobs(400), TeacherBounds())
    records = by_name(found)
    assert {name for name, _ in records} >= {"image fp32", "text fp32"}
    for tower in ("image fp32", "text fp32"):
        for name in (COSINE_TO_TEACHER, P1_COSINE_TO_TEACHER):
            assert records[tower, name].value == pytest.approx(1, abs=1e-6)
            assert records[tower, name].passed
            assert records[tower, name].data is not None
    # Weights without training find next to nothing, and a share of that says nothing.
    ((subject, gate, says),) = [(item.subject, item.gate, item.says) for item in found.remarks]
    assert (subject, gate) == ("bundle", R1_KEPT)
    assert "not judged: the teacher itself finds" in says


def test_each_tower_is_judged_by_itself(clip: DualEncoder, left: DualEncoder, blobs: Make) -> None:
    records = by_name(judge_agreement(left, clip, blobs(40), TeacherBounds()))
    image, text = (records[f"{tower} fp32", COSINE_TO_TEACHER] for tower in ("image", "text"))
    assert (image.passed, text.passed) == (False, True)
    assert image.value == pytest.approx(-1, abs=1e-6)
    assert image.low <= image.value <= image.high
    only = judge_agreement(left, clip, blobs(40), TeacherBounds(), text_tower=False)
    assert {subject for subject, _ in by_name(only)} == {"image fp32"}


def test_a_student_without_numbers_is_not_in_any_space(clip: DualEncoder, blobs: Make) -> None:
    broken = changed(clip, "visual_projection.weight", lambda weight: weight.fill_(torch.nan))
    records = by_name(judge_agreement(broken, clip, blobs(20), TeacherBounds()))
    assert not records["image fp32", "usable embeddings"].passed


def rows(count: int, seed: int = 0) -> FloatArray:
    drawn = np.random.default_rng(seed).normal(size=(count, 16))
    unit: FloatArray = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return unit


def kept(student: PairEmbeddings, teacher: PairEmbeddings) -> GateRecord | GateRemark:
    relevance = Relevance.of_pairs(len(teacher.image))
    found = measure_kept(student, teacher, relevance, TeacherBounds(), DATA)
    return found if isinstance(found, GateRemark) else judge_gates([found])[0]


def test_the_share_of_r1_that_is_kept_has_an_interval() -> None:
    teacher = PairEmbeddings(rows(100), rows(100))
    lost = rows(100)
    lost[:30] = np.roll(lost[:30], 1, axis=0)  # 30 of 100 pairs, in both directions
    found = kept(PairEmbeddings(lost, rows(100)), teacher)
    assert isinstance(found, GateRecord)
    assert found.value == pytest.approx(0.7)
    assert found.low < 0.7 < found.high
    assert found.outcome == "undecided"  # 100 pairs do not tell 0.7 from the bound of 0.8
    same = kept(teacher, teacher)
    assert isinstance(same, GateRecord)
    assert (same.value, same.outcome) == (1.0, "passed")
    assert same.low < 1.0


@pytest.mark.parametrize("count", [8, 100, 400])
def test_a_teacher_that_finds_no_more_than_chance_has_no_share_to_keep(count: int) -> None:
    stranger = PairEmbeddings(rows(count), rows(count, seed=1))
    found = kept(stranger, stranger)
    assert isinstance(found, GateRemark)
    assert f"of {count} pairs" in found.says


def test_bounds_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="mean_cosine is a cosine, from -1 to 1, not 80"):
        TeacherBounds(mean_cosine=80)
    with pytest.raises(ConfigError, match="r1_kept is a share"):
        TeacherBounds(r1_kept=-0.1)


@pytest.mark.slow
def test_a_bundle_claims_the_teachers_space_only_after_the_gate(
    fp32_plan: BundlePlan,
    clip: DualEncoder,
    left: DualEncoder,
    cpu_device: DeviceProfile,
    blobs: Make,
    tmp_path: Path,
) -> None:
    claims = DualEncoder(left.model, left.image_spec, left.tokenizer, space=clip.space)
    plan = replace(fp32_plan, student=claims, teacher=clip, labels={})
    with pytest.raises(GateError) as caught:
        build_bundle(plan, tmp_path / "bundle")
    message = str(caught.value)
    assert f"no bundle was written: image fp32: {COSINE_TO_TEACHER} is -1" in message
    assert "(bound >= 0.8 cosine, missed by 1.8)" in message
    assert "--own-space" in message
    assert list(tmp_path.iterdir()) == []

    anything = TeacherBounds(mean_cosine=-1, p1_cosine=-1, r1_kept=0)
    asked = build_bundle(replace(plan, teacher_bounds=anything), tmp_path / "asked").bundle
    assert asked.manifest.space == clip.space
    assert asked.manifest.held_to_teacher
    (gate,) = [item for _, item in asked.manifest.all_gates() if item.bound == -1 and item.value < 0
               and item.name == COSINE_TO_TEACHER]  # fmt: skip
    assert gate.low <= gate.value <= gate.high

    own = build_bundle(replace(plan, teacher=None), tmp_path / "own").bundle
    assert own.manifest.space == space_fingerprint(left) != clip.space
    assert not own.manifest.held_to_teacher
    encoder = Encoder(own, cpu_device)
    index = Index(("a",), encoder.encode_image(blobs(1)[0].image), clip.space)
    with pytest.raises(SpaceMismatchError, match="was made in the embedding space"):
        encoder.search("red", index)


@pytest.mark.slow
def test_the_gate_is_on_record(fp32_plan: BundlePlan, clip: DualEncoder, tmp_path: Path) -> None:
    built = build_bundle(replace(fp32_plan, teacher=clip), tmp_path / "bundle")
    manifest = built.bundle.manifest
    assert manifest.space == clip.space
    assert manifest.held_to_teacher
    for tower in manifest.towers:
        names = [gate.name for gate in tower.file("fp32").gates]
        assert names[-2:] == [COSINE_TO_TEACHER, P1_COSINE_TO_TEACHER]
    assert [remark.gate for remark in manifest.remarks if remark.gate == R1_KEPT] == [R1_KEPT]
