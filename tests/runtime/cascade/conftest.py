"""A certificate to change and to damage."""

from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cascade.certificate import Certificate, Quality, QuerySet, TowerIdentity
from edgeclip.runtime.cascade.drift import ScoreSample
from edgeclip.runtime.cascade.scores import Margin
from edgeclip.runtime.stats.interval import Interval


@pytest.fixture
def certificate(tiny_bundle: Path) -> Certificate:
    """About the int8 image tower of the tiny bundle."""
    manifest = Bundle.open(tiny_bundle).manifest
    near = Interval(0.9, 0.8, 1.0)
    return Certificate(
        query="image",
        bound=0.95,
        delta=0.05,
        p_value=0.01,
        space=manifest.space,
        student=TowerIdentity.of(manifest, "image", "int8"),
        student_index=None,
        teacher=TowerIdentity.of(manifest, "image", "fp32"),
        score=Margin(),
        threshold=0.125,
        escalated=Interval(0.1, 0.05, 0.15),
        quality=Quality(student=near, teacher=near, cascade=near, kept=near),
        sample=ScoreSample(edges=(0.1, 0.2), counts=(3, 4, 5)),
        tested_on=QuerySet(
            data="pictures",
            identity="0" * 64,
            count=12,
            entries=3,
            index_by="teacher",
            task="retrieval",
        ),
        created="2026-01-01T00:00:00+00:00",
        command="pytest",
    )
