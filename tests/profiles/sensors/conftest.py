"""A GPU that a miniature of the driver's library reports."""

from typing import Any

import pytest

from edgeclip.profiles.sensors.nvml import NvmlGpu
from tests.profiles.sensors.fake_nvml import FakeNvml, MakeGpu, load_into_pynvml


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch) -> MakeGpu:
    """Makes the GPU of a `FakeNvml`; the last one made is the one that is asked."""

    def make(values: dict[str, Any], lacks: frozenset[str] = frozenset()) -> NvmlGpu:
        load_into_pynvml(monkeypatch, FakeNvml(values, lacks))
        gpu = NvmlGpu.open()
        assert gpu is not None
        return gpu

    return make
