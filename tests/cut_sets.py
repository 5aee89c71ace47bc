"""Cut sets for tests of the runtime, which is also tested where nothing can cut a bundle."""

from collections.abc import Collection
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.planning.cut_set import CutSet


def write_cut_set(
    bundle: Bundle,
    out: Path,
    *,
    device: DeviceProfile,
    points: Collection[int] | None = None,
    count: int = 1,
) -> CutSet:
    """Cut `bundle` at `points`, None for all, with `count` pictures; skip a test without torch."""
    pytest.importorskip("torch", reason="only the runtime is installed, which does not cut")
    from edgeclip.export.cuts.write_cuts import write_cuts

    return write_cuts(bundle, out, device=device, points=points, count=count).cuts
