"""A certificate to change and to damage."""

from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cascade.certificate import Certificate, Quality, QuerySet, TowerIdentity
from edgeclip.runtime.cascade.drift import WatchedShare
from edgeclip.runtime.cascade.scores import Margin
from edgeclip.runtime.stats.interval import Interval

EMBEDDER = "e" * 64


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what the watch of another saw."""
    monkeypatch.setenv("EDGECLIP_STATE", str(tmp_path / "state"))


@pytest.fixture
def certificate(tiny_bundle: Path) -> Certificate:
    """About the int8 image tower of the tiny bundle, and an index of three texts."""
    manifest = Bundle.open(tiny_bundle).manifest
    near = Interval(0.9, 0.8, 1.0)
    return Certificate(
        query="image",
        bound=0.95,
        delta=0.05,
        tested_at=0.025,
        p_value=0.01,
        try_number=1,
        space=manifest.space,
        student=TowerIdentity.of(manifest, "image", "int8"),
        student_index=None,
        teacher=TowerIdentity.of(manifest, "image", "fp32"),
        score=Margin(),
        threshold=0.125,
        escalated=Interval(0.1, 0.05, 0.15),
        watched=(WatchedShare(below=0.2, share=Interval(0.3, 0.25, 0.35)),),
        disagreement=Interval(0.05, 0.0, 0.1),
        quality=Quality(student=near, teacher=near, cascade=near, kept=near),
        tested_on=QuerySet(
            data="pictures",
            identity="0" * 64,
            count=12,
            clusters=12,
            largest=1,
            cluster_by="none",
            assumed="all pictures are independent",
            entries=3,
            index_by="teacher",
            embedder=EMBEDDER,
            task="retrieval",
        ),
        created="2026-01-01T00:00:00+00:00",
        command="pytest",
    )
