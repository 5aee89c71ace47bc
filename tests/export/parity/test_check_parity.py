from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.export.graph.embed_pairs import graph_embedder
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.parity.explain_parity import check_parity
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Tower

BOUNDS = DEFAULT_BOUNDS["fp32"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_exported_tower_agrees_with_torch(
    tower: Tower,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
) -> None:
    embed = graph_embedder(clip_towers.graph(tower), clip.spec.image, cpu_device)
    records = check_parity(clip, tower, embed, blobs(6), BOUNDS)
    assert len(records) == 3
    assert all(record.passed for record in records)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_that_is_wrong_alone_only_is_found(
    tower: Tower,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    cpu_device: DeviceProfile,
) -> None:
    embed = graph_embedder(clip_towers.graph(tower), clip.spec.image, cpu_device)

    def fails_alone(values: NDArray[Any]) -> FloatArray:
        found = embed(values)
        return np.roll(found, 1, axis=1) if len(values) == 1 else found

    records = check_parity(clip, tower, fails_alone, blobs(6), BOUNDS)
    assert not all(record.passed for record in records)
