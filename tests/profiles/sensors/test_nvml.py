"""An NVIDIA GPU through nvidia-ml-py, on a miniature of the driver's library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeclip.profiles.sensors.energy import CounterMeter, nvml_meter
from edgeclip.profiles.sensors.nvml import NvmlGpu, this_gpu
from tests.profiles.sensors.fake_nvml import BUSY, UUID, FakeNvml, MakeGpu, load_into_pynvml


def test_values_come_in_their_units(make_gpu: MakeGpu) -> None:
    gpu = make_gpu(BUSY)
    assert gpu.name() == "NVIDIA Test 1"
    assert (gpu.sm_mhz(), gpu.memory_mhz(), gpu.temperature_c()) == (1410, 1593, 71)
    assert gpu.power_w() == pytest.approx(251.4)
    assert gpu.energy_mj() == 2**40 + 5
    assert gpu.clock_reasons() == ("power cap", "hardware thermal slowdown")
    assert gpu.slowed_by_heat_ms() == pytest.approx(2500)


def test_what_a_gpu_does_not_report_is_none(make_gpu: MakeGpu) -> None:
    gpu = make_gpu({})
    reported = (
        *(gpu.sm_mhz(), gpu.memory_mhz(), gpu.temperature_c(), gpu.power_w(), gpu.energy_mj()),
        *(gpu.clock_reasons(), gpu.slowed_by_heat_ms()),
    )
    assert reported == (None,) * 7


def test_older_drivers_have_another_name_for_the_reasons(make_gpu: MakeGpu) -> None:
    newer = frozenset({"nvmlDeviceGetCurrentClocksEventReasons"})
    assert make_gpu({"reasons": 1}, newer).clock_reasons() == ("idle",)
    older = newer | {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    assert make_gpu({"reasons": 1}, older).clock_reasons() is None
    assert make_gpu({"reasons": 0}).clock_reasons() == ()


@pytest.mark.parametrize(
    ("visible", "opened"),
    [(None, 0), ("", 0), ("1,0", 1), (UUID.decode(), UUID), ("7", None), ("GPU-other", None)],
)
def test_the_gpu_is_the_first_visible_one(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, opened: int | bytes | None
) -> None:
    library = FakeNvml({})
    load_into_pynvml(monkeypatch, library)
    assert (NvmlGpu.open(visible) is None) == (opened is None)
    assert library.opened == ([] if opened is None else [opened])


def test_no_gpu_without_a_library_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    load_into_pynvml(monkeypatch, None)
    assert NvmlGpu.open() is None
    load_into_pynvml(monkeypatch, FakeNvml({}, lacks=frozenset({"nvmlInitWithFlags"})))
    assert NvmlGpu.open() is None


def test_no_gpu_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    load_into_pynvml(monkeypatch, FakeNvml(BUSY))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert NvmlGpu.open() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_shared_library_is_found_by_its_name(tmp_path: Path) -> None:
    source = """
    #include <string.h>
    int nvmlInitWithFlags(unsigned flags) { return 0; }
    int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = device; return 0; }
    int nvmlDeviceGetName(void *device, char *name, unsigned size) { strcpy(name, "C"); return 0; }
    int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 7; return 0; }
    """
    library = tmp_path / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    program = (
        "from edgeclip.profiles.sensors.nvml import this_gpu\n"
        "print(this_gpu().name(), this_gpu().power_w(), this_gpu().energy_mj())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "C 0.007 None\n"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA GPU")
def test_this_machine_has_none() -> None:
    assert this_gpu() is None


@pytest.mark.gpu
def test_a_real_gpu_reports_clock_and_power() -> None:
    gpu = this_gpu()
    assert gpu is not None
    assert gpu.name()
    assert (gpu.sm_mhz() or 0) > 0
    assert gpu.clock_reasons() is not None
    meter = nvml_meter(gpu)
    assert not isinstance(meter, str)
    if isinstance(meter, CounterMeter):
        assert meter.joules_during(meter.moves) > 0
