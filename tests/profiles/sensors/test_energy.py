import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeclip.profiles.record.measurement import Energy
from edgeclip.profiles.sensors.energy import (
    CountedEnergy,
    Counter,
    EnergyMeter,
    MeterError,
    energy_or_reason,
    find_meter,
    joules_of,
    measure_energy,
    meter_or_reason,
)
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.errors import InputError
from tests.profiles.sensors.fake_nvml import MakeGpu
from tests.profiles.sensors.kernel_trees import counting, orin_nano, rapl


def meter_of(read: Callable[[], int], per_joule: float = 1.0) -> CountedEnergy:
    return CountedEnergy(
        name="meter", covers="all", least_s=0.002, counters=(Counter(read),), per_joule=per_joule
    )


def test_energy_of_a_run_is_that_of_its_blocks() -> None:
    spent = 0

    def run() -> None:
        nonlocal spent
        spent += 3

    found = measure_energy(meter_of(lambda: spent, per_joule=12), run, seconds=0.02, blocks=5)
    assert (found.sensor, found.covers) == ("meter", "all")
    assert found.idle_watts is None  # it stood still
    assert found.joules.value == pytest.approx(0.25)
    assert found.joules.low == pytest.approx(0.25)
    assert found.joules.high == pytest.approx(0.25)


def test_the_interval_is_that_of_the_blocks() -> None:
    """Each block is one run; they spend 1 to 8 joules, 4.5 in the mean."""
    spent = runs = 0

    def run() -> None:
        nonlocal spent, runs
        runs += 1
        spent += runs
        time.sleep(0.01)  # longer than the block is to last

    found = measure_energy(meter_of(lambda: spent), run, seconds=0.01, blocks=8)
    assert runs == 8
    assert found.joules.value == pytest.approx(4.5)
    assert 1 < found.joules.low < 4.5 < found.joules.high < 8
    assert found.joules.high - found.joules.low > 2


def test_idle_power_is_read_before() -> None:
    """A sensor of 5 W, whatever is done."""
    meter = meter_of(time.perf_counter_ns, per_joule=1e9 / 5)
    found = measure_energy(meter, lambda: time.sleep(0.002), seconds=0.1, blocks=4)
    assert found.idle_watts == pytest.approx(5, rel=0.2)
    assert found.joules.value >= 5 * 0.002


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MeterError, match="stood still while there was work"):
        measure_energy(meter_of(lambda: 5), lambda: None, seconds=0.01, blocks=3)
    with pytest.raises(InputError, match="2 blocks tell no interval of energy: take 3"):
        measure_energy(meter_of(lambda: 5), lambda: None, seconds=0.01, blocks=2)


def test_joules_of_one_run() -> None:
    runs: list[None] = []
    assert joules_of(meter_of(lambda: 2 * len(runs)), lambda: runs.append(None)) == 2
    assert joules_of(meter_of(lambda: 7), lambda: None) is None
    assert joules_of(meter_of(lambda: -len(runs)), lambda: runs.append(None)) is None


def test_the_engine_decides_which_meter(
    cpu_device: DeviceProfile, tmp_path: Path, make_gpu: MakeGpu
) -> None:
    (file,) = rapl(tmp_path, (5,), limit=2**38)
    told = iter(range(10**6))
    gpu = make_gpu({"millijoules": lambda: next(told)})
    with counting(file):
        on_cpu = find_meter(cpu_device, tmp_path, gpu=gpu)
        on_gpu = find_meter(load_device("rtx-4000-ada"), tmp_path, gpu=gpu)
    assert on_cpu is not None
    assert on_gpu is not None
    assert (on_cpu.name, on_gpu.name) == ("RAPL packages", "NVML energy")


@pytest.mark.parametrize("name", ["jetson-orin-nano", "arm64-dotprod"])
def test_a_jetson_has_one_meter_for_all(name: str, tmp_path: Path, make_gpu: MakeGpu) -> None:
    device, root = load_device(name), orin_nano(tmp_path)
    meter = find_meter(device, root)
    assert meter is not None
    assert meter.name == "INA3221 VDD_IN"
    silent = find_meter(device, root, gpu=make_gpu({}))  # as JetPack's library is
    assert silent is not None
    assert silent.name == "INA3221 VDD_IN"


def test_why_there_is_no_meter(cpu_device: DeviceProfile, tmp_path: Path) -> None:
    gpu_device = load_device("rtx-4000-ada")
    assert find_meter(cpu_device, tmp_path) is None
    assert meter_or_reason(cpu_device, tmp_path) == (
        "no RAPL counters in /sys/class/powercap; no amd_energy sensor; no INA3221 power monitor"
    )
    expected = "no NVIDIA GPU that NVML knows; no INA3221 power monitor"
    assert meter_or_reason(gpu_device, tmp_path) == expected


def test_energy_or_the_reason(cpu_device: DeviceProfile, tmp_path: Path) -> None:
    none = energy_or_reason(cpu_device, lambda: None, seconds=0.1, blocks=3, root=tmp_path)
    assert "no RAPL counters" in str(none)
    (file,) = rapl(tmp_path, (5,), limit=2**38)
    with counting(file):
        found = energy_or_reason(
            cpu_device, lambda: time.sleep(0.01), seconds=0.3, blocks=3, root=tmp_path
        )
    assert isinstance(found, Energy)
    assert found.sensor == "RAPL packages"
    assert found.joules.value > 0
    assert found.idle_watts is not None


def test_a_sensor_that_fails_is_a_reason(tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    current = root / "sys/class/hwmon/hwmon1/curr1_input"
    found = energy_or_reason(
        load_device("jetson-orin-nano"),
        lambda: current.unlink(missing_ok=True),
        seconds=0.3,
        blocks=3,
        root=root,
    )
    assert "INA3221 VDD_IN cannot be read" in str(found)


def test_this_machine_tells_its_energy_or_why_not(cpu_device: DeviceProfile) -> None:
    found: EnergyMeter | str = meter_or_reason(cpu_device)
    if isinstance(found, str):
        assert found
    else:
        assert found.joules_during(lambda: time.sleep(found.least_s)) > 0
