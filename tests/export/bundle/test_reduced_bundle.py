"""A student whose embeddings can be cut, exported: forms inside their gates, and no others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Form, make_basis
from edgeclip.runtime.encoder import Encoder

pytestmark = pytest.mark.slow


def test_forms_that_hold_are_in_the_bundle(plan: BundlePlan, tmp_path: Path) -> None:
    model = DualEncoder.load(BUILT_IN_TEACHER)
    size = model.image_spec.size
    test = EmojiSource("test", 60, size=size, distinct=True)
    rows = np.concatenate([part.numpy() for part in embed_source(model, test)]).astype(np.float64)
    model.basis = make_basis(rows.T @ rows, space_fingerprint(model), (64, 2))
    wanted = replace(
        plan,
        student=model,
        labels={},
        calibration=EmojiSource("calibration", 16, size=size),
        test=test,
        precisions=(),
        workload=None,
    )
    built = build_bundle(wanted, tmp_path / "bundle")
    forms = [item.form for item in built.bundle.manifest.reduced]
    assert Form(64, "float32") in forms
    assert Form(256, "binary") in forms
    assert not [form for form in forms if form.length == 2]
    assert any(line.startswith("2 float32: R@1 kept") for line in built.left_out)
    encoder = Encoder(built.bundle, plan.device)
    assert encoder.encode_text("a red apple", dim=64).shape == (1, 64)


def test_forms_that_could_not_be_judged_are_not(fp32_plan: BundlePlan, tmp_path: Path) -> None:
    student = fp32_plan.student
    basis = make_basis(np.eye(student.spec.dim), fp32_plan.space, (8,))
    student.basis = basis
    try:
        built = build_bundle(fp32_plan, tmp_path / "bundle")
    finally:
        student.basis = None  # others read it
    manifest = built.bundle.manifest
    assert not manifest.reduced
    assert not (built.bundle.path / BASIS_NAME).exists()
    assert any("not judged" in remark.says for remark in manifest.remarks)
