"""Energy meters on copies of kernel trees, and the energy of a run."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeclip.profiles.record.measurement import Energy
from edgeclip.profiles.sensors.energy import (
    CounterMeter,
    EnergyCounter,
    EnergyMeter,
    MeterError,
    PowerMeter,
    amd_energy_meter,
    energy_or_reason,
    find_meter,
    jetson_meter,
    joules_of,
    mean_over_time,
    measure_energy,
    meter_or_reason,
    nvml_meter,
    rapl_meter,
)
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.errors import InputError
from tests.profiles.sensors.fake_nvml import MakeGpu
from tests.profiles.sensors.kernel_trees import agx_orin, counting, orin_nano, rapl, write_tree


def meter_of(read: Callable[[], int], per_joule: float = 1.0) -> CounterMeter:
    return CounterMeter(
        name="meter",
        covers="all",
        least_s=0.002,
        counters=(EnergyCounter(read),),
        per_joule=per_joule,
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


def test_too_few_blocks_and_a_sensor_that_stands_still_are_refused() -> None:
    with pytest.raises(MeterError, match="stood still while there was work"):
        measure_energy(meter_of(lambda: 5), lambda: None, seconds=0.01, blocks=3)
    with pytest.raises(InputError, match="2 blocks tell no interval of energy: take 3"):
        measure_energy(meter_of(lambda: 5), lambda: None, seconds=0.01, blocks=2)


def test_joules_of_one_call() -> None:
    runs: list[None] = []
    assert joules_of(meter_of(lambda: 2 * len(runs)), lambda: runs.append(None)) == 2
    assert joules_of(meter_of(lambda: 7), lambda: None) is None
    assert joules_of(meter_of(lambda: -len(runs)), lambda: runs.append(None)) is None


def test_the_engine_decides_which_meter(
    cpu_device: DeviceProfile, tmp_path: Path, make_gpu: MakeGpu
) -> None:
    (file,) = rapl(tmp_path, (5,), limit=2**38)
    readings = iter(range(10**6))
    gpu = make_gpu({"millijoules": lambda: next(readings)})
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


def test_this_machine_has_a_meter_or_a_reason(cpu_device: DeviceProfile) -> None:
    found: EnergyMeter | str = meter_or_reason(cpu_device)
    if isinstance(found, str):
        assert found
    else:
        assert found.joules_during(lambda: time.sleep(found.least_s)) > 0


def test_packages_are_added_up_and_may_start_again(tmp_path: Path) -> None:
    first, second = rapl(tmp_path, (900_000, 5))
    with counting(second):
        meter = rapl_meter(tmp_path)
    assert isinstance(meter, CounterMeter)
    assert (meter.name, meter.covers) == ("RAPL packages", "processor packages")
    first.write_text("900000\n")
    second.write_text("5\n")

    def work() -> None:
        first.write_text("100000\n")
        second.write_text("300005\n")

    assert meter.joules_during(work) == pytest.approx(0.2 + 0.3)


def test_a_counter_that_stands_still_is_no_meter(tmp_path: Path) -> None:
    rapl(tmp_path, (900_000,))
    assert rapl_meter(tmp_path) == "RAPL packages stand still, as in many virtual machines"


def test_no_packages_no_meter(tmp_path: Path) -> None:
    assert rapl_meter(tmp_path) == "no RAPL counters in /sys/class/powercap"
    rapl(tmp_path, ())  # the whole platform alone
    assert rapl_meter(tmp_path) == "no RAPL counters in /sys/class/powercap"


def test_every_package_must_be_readable(tmp_path: Path) -> None:
    _, second = rapl(tmp_path, (5, 5))
    second.write_text("\n")
    assert "RAPL packages cannot be read" in str(rapl_meter(tmp_path))


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder to make trees in; leaving root's rights behind is the test's own business."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX rights")
def test_counters_for_root_only_say_so(nobody: Path) -> None:
    (file,) = rapl(nobody, (5,))
    file.chmod(0o400 if os.geteuid() == 0 else 0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        found = rapl_meter(nobody)
    finally:
        if root:
            os.seteuid(0)
    assert found == f"RAPL packages may not be read: run as root, or let others read {file}"


def test_amd_energy_counts_its_sockets(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon2"
    assert amd_energy_meter(tmp_path) == "no amd_energy sensor"
    write_tree(
        tmp_path,
        {
            f"{chip}/name": "amd_energy",
            f"{chip}/energy1_label": "Ecore000",
            f"{chip}/energy1_input": 10,
            f"{chip}/energy17_label": "Esocket0",
            f"{chip}/energy17_input": 2_000_000,
        },
    )
    file = tmp_path / chip / "energy17_input"
    with counting(file):
        meter = amd_energy_meter(tmp_path)
    assert isinstance(meter, CounterMeter)
    file.write_text("3000000\n")
    assert meter.joules_during(lambda: file.write_text("4500000\n")) == pytest.approx(1.5)
    with pytest.raises(MeterError, match="fell from 4500000 to 7: measure again"):
        meter.joules_during(lambda: file.write_text("7\n"))


def test_a_counter_that_goes_away_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "energy"
    file.write_text("5")
    counters = (EnergyCounter(lambda: int(file.read_text())),)
    meter = CounterMeter(name="this", covers="", least_s=0, counters=counters, per_joule=1)
    with pytest.raises(MeterError, match="this cannot be read"):
        meter.joules_during(file.unlink)


def test_jetson_energy_is_power_times_time(tmp_path: Path) -> None:
    meter = jetson_meter(orin_nano(tmp_path))
    assert isinstance(meter, PowerMeter)
    assert meter.name == "INA3221 VDD_IN"
    assert meter.covers == "module (CPU, GPU and memory)"
    watts, inside = 4.984 * 1.856, 0.0

    def work() -> None:
        nonlocal inside
        began = time.perf_counter()
        time.sleep(0.1)
        inside = time.perf_counter() - began

    began = time.perf_counter()
    joules = meter.joules_during(work)
    outside = time.perf_counter() - began
    assert watts * inside * 0.999 <= joules <= watts * outside * 1.001


def test_the_samples_follow_the_power() -> None:
    values = itertools.chain([2.0], itertools.repeat(6.0))
    meter = PowerMeter(name="", covers="", least_s=0, watts=lambda: next(values), period_s=0.001)
    began = time.perf_counter()
    joules = meter.joules_during(lambda: time.sleep(0.1))
    assert 0.1 * 2 < joules < 6 * (time.perf_counter() - began)
    assert mean_over_time([(0, 2.0), (1, 6.0), (3, 6.0)]) == pytest.approx((4 + 12) / 3)


def test_three_rails_make_up_an_agx_orin(tmp_path: Path) -> None:
    meter = jetson_meter(agx_orin(tmp_path))
    assert isinstance(meter, PowerMeter)
    assert meter.name == "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert meter.watts() == pytest.approx(3.8 + 1.9 + 4.5)


def test_unknown_rails_are_no_meter(tmp_path: Path) -> None:
    assert jetson_meter(tmp_path) == "no INA3221 power monitor"
    root = orin_nano(tmp_path)
    rail = root / "sys/class/hwmon/hwmon1"
    (rail / "curr1_input").write_text("0\n")
    assert jetson_meter(root) == "the INA3221 reads 0.0 W, which is impossible"
    (rail / "curr1_input").unlink()
    assert "the INA3221 cannot be read" in str(jetson_meter(root))
    (rail / "in1_label").write_text("5V_MAIN\n")
    expected = "the INA3221 measures rails of an unknown board: 5V_MAIN, VDD_CPU_GPU_CV, VDD_SOC"
    assert jetson_meter(root) == expected


def test_a_sensor_that_fails_while_work_is_done_is_an_error(tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    meter = jetson_meter(root)
    assert isinstance(meter, PowerMeter)

    def work() -> None:
        (root / "sys/class/hwmon/hwmon1/curr1_input").unlink()
        time.sleep(0.1)

    with pytest.raises(MeterError, match="INA3221 VDD_IN cannot be read"):
        meter.joules_during(work)


def test_work_that_fails_ends_the_samples(tmp_path: Path) -> None:
    meter = jetson_meter(orin_nano(tmp_path))
    assert isinstance(meter, PowerMeter)
    with pytest.raises(ZeroDivisionError):
        meter.joules_during(lambda: 1 / 0)


def test_a_gpu_counts_its_energy(make_gpu: MakeGpu) -> None:
    readings = iter(range(5000, 9000, 250))
    meter = nvml_meter(make_gpu({"millijoules": lambda: next(readings)}))
    assert isinstance(meter, CounterMeter)
    assert (meter.name, meter.covers) == ("NVML energy", "GPU board")
    assert meter.joules_during(lambda: next(readings)) == pytest.approx(0.5)


def test_a_gpu_without_energy_counter_reports_its_power(make_gpu: MakeGpu) -> None:
    for values in ({"milliwatts": 80_000}, {"milliwatts": 80_000, "millijoules": 77}):
        meter = nvml_meter(make_gpu(values))
        assert isinstance(meter, PowerMeter)
        assert (meter.name, meter.watts()) == ("NVML power", 80.0)
    assert nvml_meter(make_gpu({})) == "this GPU reports neither energy nor power to NVML"
    assert nvml_meter(None) == "no NVIDIA GPU that NVML knows"


def test_a_gpu_that_stops_reporting_is_an_error(make_gpu: MakeGpu) -> None:
    values: dict[str, object] = {"milliwatts": 80_000}
    meter = nvml_meter(make_gpu(values))
    assert isinstance(meter, PowerMeter)
    with pytest.raises(MeterError, match="NVML power cannot be read: the driver no longer"):
        meter.joules_during(values.clear)
