import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeclip.profiles.sensors.energy import (
    CountedEnergy,
    Counter,
    MeterError,
    SampledPower,
    amd_energy_meter,
    jetson_meter,
    mean_over_time,
    nvml_meter,
    rapl_meter,
)
from tests.profiles.sensors.fake_nvml import MakeGpu
from tests.profiles.sensors.kernel_trees import agx_orin, counting, orin_nano, rapl, write_tree


def test_packages_are_added_up_and_may_start_again(tmp_path: Path) -> None:
    first, second = rapl(tmp_path, (900_000, 5))
    with counting(second):
        meter = rapl_meter(tmp_path)
    assert isinstance(meter, CountedEnergy)
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


def test_all_packages_must_be_told(tmp_path: Path) -> None:
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
    assert isinstance(meter, CountedEnergy)
    file.write_text("3000000\n")
    assert meter.joules_during(lambda: file.write_text("4500000\n")) == pytest.approx(1.5)
    with pytest.raises(MeterError, match="fell from 4500000 to 7: measure again"):
        meter.joules_during(lambda: file.write_text("7\n"))


def test_a_counter_that_goes_away_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "energy"
    file.write_text("5")
    counters = (Counter(lambda: int(file.read_text())),)
    meter = CountedEnergy(name="this", covers="", least_s=0, counters=counters, per_joule=1)
    with pytest.raises(MeterError, match="this cannot be read"):
        meter.joules_during(file.unlink)


def test_a_jetson_s_power_times_its_time(tmp_path: Path) -> None:
    meter = jetson_meter(orin_nano(tmp_path))
    assert isinstance(meter, SampledPower)
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
    meter = SampledPower(name="", covers="", least_s=0, watts=lambda: next(values), period_s=0.001)
    began = time.perf_counter()
    joules = meter.joules_during(lambda: time.sleep(0.1))
    assert 0.1 * 2 < joules < 6 * (time.perf_counter() - began)
    assert mean_over_time([(0, 2.0), (1, 6.0), (3, 6.0)]) == pytest.approx((4 + 12) / 3)


def test_three_rails_make_up_an_agx_orin(tmp_path: Path) -> None:
    meter = jetson_meter(agx_orin(tmp_path))
    assert isinstance(meter, SampledPower)
    assert meter.name == "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert meter.watts() == pytest.approx(3.8 + 1.9 + 4.5)


def test_rails_of_which_nothing_is_known_are_no_meter(tmp_path: Path) -> None:
    assert jetson_meter(tmp_path) == "no INA3221 power monitor"
    root = orin_nano(tmp_path)
    rail = root / "sys/class/hwmon/hwmon1"
    (rail / "curr1_input").write_text("0\n")
    assert jetson_meter(root) == "the INA3221 tells 0.0 W, which cannot be"
    (rail / "curr1_input").unlink()
    assert "the INA3221 cannot be read" in str(jetson_meter(root))
    (rail / "in1_label").write_text("5V_MAIN\n")
    expected = "the INA3221 measures rails of an unknown board: 5V_MAIN, VDD_CPU_GPU_CV, VDD_SOC"
    assert jetson_meter(root) == expected


def test_a_sensor_that_fails_while_work_is_done_is_an_error(tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    meter = jetson_meter(root)
    assert isinstance(meter, SampledPower)

    def work() -> None:
        (root / "sys/class/hwmon/hwmon1/curr1_input").unlink()
        time.sleep(0.1)

    with pytest.raises(MeterError, match="INA3221 VDD_IN cannot be read"):
        meter.joules_during(work)


def test_work_that_fails_ends_the_samples(tmp_path: Path) -> None:
    meter = jetson_meter(orin_nano(tmp_path))
    assert isinstance(meter, SampledPower)
    with pytest.raises(ZeroDivisionError):
        meter.joules_during(lambda: 1 / 0)


def test_a_gpu_counts_its_energy(make_gpu: MakeGpu) -> None:
    told = iter(range(5000, 9000, 250))
    meter = nvml_meter(make_gpu({"millijoules": lambda: next(told)}))
    assert isinstance(meter, CountedEnergy)
    assert (meter.name, meter.covers) == ("NVML energy", "GPU board")
    assert meter.joules_during(lambda: next(told)) == pytest.approx(0.5)


def test_a_gpu_that_counts_none_tells_its_power(make_gpu: MakeGpu) -> None:
    for values in ({"milliwatts": 80_000}, {"milliwatts": 80_000, "millijoules": 77}):
        meter = nvml_meter(make_gpu(values))
        assert isinstance(meter, SampledPower)
        assert (meter.name, meter.watts()) == ("NVML power", 80.0)
    assert nvml_meter(make_gpu({})) == "this GPU tells NVML neither energy nor power"
    assert nvml_meter(None) == "no NVIDIA GPU that NVML knows"


def test_a_gpu_that_falls_silent_is_an_error(make_gpu: MakeGpu) -> None:
    values: dict[str, object] = {"milliwatts": 80_000}
    meter = nvml_meter(make_gpu(values))
    assert isinstance(meter, SampledPower)
    with pytest.raises(MeterError, match="NVML power cannot be read: the driver no longer"):
        meter.joules_during(values.clear)
