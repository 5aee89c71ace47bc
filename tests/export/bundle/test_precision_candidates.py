"""int8 that misses a gate: what the export says of it, and the fine-tune that it may try."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import space_fingerprint
from edgeclip.compress.train.quantization_aware import finetune_settings
from edgeclip.export.bundle.build_bundle import build_bundle, require_named_precisions
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.bundle.precision_candidates import PrecisionCandidates, fine_tune_failed_int8
from edgeclip.export.cli.export import describe_build
from edgeclip.export.errors import GateError
from edgeclip.export.gates.gates import Gate, GateOutcome
from edgeclip.export.gates.judge_precisions import GateInputs, PrecisionVerdict
from edgeclip.export.quantizing.config import (
    Config,
    StaticInt8,
    WeightOnly,
    config_from_data,
)
from edgeclip.export.quantizing.qat_finetune import QAT_HINT, QatOptions
from tests.export.quantizing.test_qat_finetune import FACTOR, planted

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
CPU = StaticInt8(symmetric=False, reduce_range=True)


@pytest.fixture(scope="module")
def failing(plan: BundlePlan) -> BundlePlan:
    """A student whose image tower int8 ruins."""
    student = planted(plan.student, FACTOR, towers=("image",))
    return replace(plan, student=student, labels={}, workload=None)


@pytest.fixture
def qat(blobs: Make, tmp_path: Path) -> QatOptions:
    settings = replace(finetune_settings(40, batch_size=16), learning_rate=1e-3)
    return QatOptions(source=blobs(64, seed=2), settings=settings, folder=tmp_path / "qat")


def candidates(
    value: float, *, subject: str = "image int8", config: Config = CPU
) -> PrecisionCandidates:
    """What was judged, with one mean cosine."""
    record = Gate("mean cosine", ">=", 0.995, "cosine").judge_items(value)
    judged = PrecisionVerdict(judged=(GateOutcome(subject, record),), kept=frozenset(), left_out=())
    return PrecisionCandidates(
        graphs=(),
        configs={("image", "int8"): config},
        embeddings={},
        inputs=GateInputs(),
        verdict=judged,
    )


def test_the_message_of_a_missed_gate_ends_in_how_to_go_on(plan: BundlePlan) -> None:
    mended = fine_tune_failed_int8(plan, candidates(0.9), {})
    with pytest.raises(GateError, match=r"image int8: mean cosine is 0\.9") as caught:
        require_named_precisions(mended, accept_undecided=False)
    assert str(caught.value).endswith(QAT_HINT)


@pytest.mark.parametrize(
    "outcome",
    [
        candidates(0.999),
        candidates(0.9, subject="image fp16"),
        candidates(0.9, config=WeightOnly(bits=4)),
    ],
    ids=["passed", "not int8", "cannot be learnt for"],
)
def test_where_a_fine_tune_would_not_help_there_is_none(
    outcome: PrecisionCandidates, plan: BundlePlan, qat: QatOptions
) -> None:
    assert fine_tune_failed_int8(plan, outcome, {}).int8_hint == ""
    assert fine_tune_failed_int8(replace(plan, qat=qat), outcome, {}).int8_hint == ""
    assert not qat.folder.exists()


def test_what_is_left_out_says_how_to_go_on(failing: BundlePlan, tmp_path: Path) -> None:
    built = build_bundle(failing, tmp_path / "bundle")
    manifest = built.bundle.manifest
    assert "int8" not in manifest.tower("image").precisions
    assert "int8" in manifest.tower("text").precisions
    assert f"int8: {QAT_HINT}" in describe_build(built).splitlines()


def test_a_fine_tune_that_is_allowed_brings_int8_inside_its_gates(
    failing: BundlePlan, qat: QatOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="edgeclip.export")
    before = space_fingerprint(failing.student)
    allowed = replace(failing, precisions=("int8",), qat=qat)
    built = build_bundle(allowed, tmp_path / "bundle")
    assert any(
        line.startswith("fine-tuning for int8, because image int8") for line in caplog.messages
    )
    assert built.int8_hint == "fine-tuned for int8"
    manifest = built.bundle.manifest
    assert "int8 fine-tuned for 40 steps of 16 on 64 blobs" in manifest.provenance.data
    recipes = dict(manifest.recipes())
    assert recipes["image int8"].says == "int8, asymmetric, 7-bit weights, fine-tuned for it"
    assert recipes["text int8"].says == "int8, asymmetric, 7-bit weights"
    assert config_from_data(recipes["image int8"].config, source="manifest") == CPU
    # What it was held against is the student that was given.
    assert space_fingerprint(failing.student) == before
