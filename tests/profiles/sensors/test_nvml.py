import shutil

import pytest

from edgeclip.profiles.sensors.energy import CountedEnergy, nvml_meter
from edgeclip.profiles.sensors.nvml import NvmlGpu, this_gpu
from tests.profiles.sensors.fake_nvml import UUID, FakeNvml

BUSY = {
    "sm": 1410,
    "memory": 1593,
    "temperature": 71,
    "milliwatts": 251_400,
    "millijoules": 2**40 + 5,
    "reasons": 0x44,
    "violation_ns": 2_500_000_000,
}


def gpu_of(library: FakeNvml) -> NvmlGpu:
    gpu = NvmlGpu.open(library)
    assert gpu is not None
    return gpu


def test_values_come_in_their_units() -> None:
    gpu = gpu_of(FakeNvml(BUSY))
    assert gpu.name() == "NVIDIA Test 1"
    assert (gpu.sm_mhz(), gpu.memory_mhz(), gpu.temperature_c()) == (1410, 1593, 71)
    assert gpu.power_w() == pytest.approx(251.4)
    assert gpu.energy_mj() == 2**40 + 5
    assert gpu.clock_reasons() == ("power cap", "hardware thermal slowdown")
    assert gpu.slowed_by_heat_ms() == pytest.approx(2500)


def test_what_a_gpu_does_not_tell_is_none() -> None:
    gpu = gpu_of(FakeNvml({}))
    told = (
        *(gpu.sm_mhz(), gpu.memory_mhz(), gpu.temperature_c(), gpu.power_w(), gpu.energy_mj()),
        *(gpu.clock_reasons(), gpu.slowed_by_heat_ms()),
    )
    assert told == (None,) * 7


def test_older_drivers_have_another_name_for_the_reasons() -> None:
    newer = frozenset({"nvmlDeviceGetCurrentClocksEventReasons"})
    assert gpu_of(FakeNvml({"reasons": 1}, lacks=newer)).clock_reasons() == ("idle",)
    older = newer | {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    assert gpu_of(FakeNvml({"reasons": 1}, lacks=older)).clock_reasons() is None
    assert gpu_of(FakeNvml({"reasons": 0})).clock_reasons() == ()


@pytest.mark.parametrize(
    ("visible", "opened"),
    [(None, 0), ("", 0), ("1,0", 1), (UUID.decode(), UUID), ("7", None), ("GPU-other", None)],
)
def test_the_gpu_is_the_first_visible_one(visible: str | None, opened: int | bytes | None) -> None:
    library = FakeNvml({})
    gpu = NvmlGpu.open(library, visible)
    assert (gpu is None) == (opened is None)
    assert library.opened == ([] if opened is None else [opened])


def test_no_gpu_without_a_library_that_works() -> None:
    def no_library(name: str) -> FakeNvml:
        raise OSError(f"{name}: cannot open shared object file")

    assert this_gpu(no_library) is None
    assert NvmlGpu.open(FakeNvml({}, lacks=frozenset({"nvmlInit_v2"}))) is None


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA GPU")
def test_this_machine_has_none() -> None:
    assert this_gpu() is None


@pytest.mark.gpu
def test_a_real_gpu_tells_its_clock_and_its_power() -> None:
    gpu = this_gpu()
    assert gpu is not None
    assert gpu.name()
    assert (gpu.sm_mhz() or 0) > 0
    assert gpu.clock_reasons() is not None
    meter = nvml_meter(gpu)
    assert not isinstance(meter, str)
    if isinstance(meter, CountedEnergy):
        assert meter.joules_during(meter.moves) > 0
