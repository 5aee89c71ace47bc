"""Clocks, temperatures, throttling and peak memory, read from copies of kernel trees."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from edgeclip.profiles.sensors.machine_state import peak_memory_mb, take_conditions
from tests.profiles.sensors.fake_nvml import BUSY, MakeGpu
from tests.profiles.sensors.kernel_trees import CPUS, laptop, orin_nano, write_tree


def test_a_laptop(tmp_path: Path) -> None:
    found = take_conditions(laptop(tmp_path))
    assert found.cpu_mhz == tuple(2400 + 100 * place for place in range(len(CPUS)))
    assert found.governor == "powersave"
    assert found.load_1m == 0.52
    assert found.temperatures_c == (
        ("acpitz temp1", 27.8),
        ("nvme Composite", 39.85),
        ("nvme Composite (2)", 44.85),
        ("coretemp Package id 0", 61.0),
        ("coretemp Core 0", 58.0),
        ("x86_pkg_temp", 61.0),
    )
    assert found.throttle_counts == (("core_throttle_count", 10), ("package_throttle_count", 11))
    assert found.gpu == ()


def test_a_jetson(tmp_path: Path) -> None:
    found = take_conditions(orin_nano(tmp_path))
    assert found.cpu_mhz == ()
    assert found.governor is None
    assert found.load_1m == 1.02
    assert found.temperatures_c == (("tmp451 temp1", 41.0), ("cpu-thermal", 48.5))
    assert found.throttle_counts == (("oc1_event_cnt", 0), ("oc3_event_cnt", 2))
    assert found.gpu == (("17000000.gpu mhz", "306"),)


def test_a_gpu(tmp_path: Path, make_gpu: MakeGpu) -> None:
    found = take_conditions(tmp_path, gpu=make_gpu(BUSY))
    assert found.gpu == (
        ("name", "NVIDIA Test 1"),
        ("sm mhz", "1410"),
        ("memory mhz", "1593"),
        ("temperature c", "71"),
        ("power w", "251.4"),
        ("clocks held by", "power cap, hardware thermal slowdown"),
        ("slowed by heat ms", "2500.0"),
    )
    silent = take_conditions(tmp_path, gpu=make_gpu({"reasons": 0}))
    assert silent.gpu == (("name", "NVIDIA Test 1"), ("clocks held by", "nothing"))


def test_clocks_of_cpuinfo_where_there_is_no_cpufreq(tmp_path: Path) -> None:
    blocks = (f"processor\t: {n}\nmodel name\t: X\ncpu MHz\t\t: {2596 + n}.5" for n in (*CPUS, 999))
    write_tree(tmp_path, {"proc/cpuinfo": "\n\n".join(blocks)})
    assert take_conditions(tmp_path).cpu_mhz == tuple(2596.5 + number for number in CPUS)


def test_a_cpu_without_values_is_left_out(tmp_path: Path) -> None:
    cpu = f"sys/devices/system/cpu/cpu{CPUS[0]}/cpufreq"
    files = {"scaling_cur_freq": "<unknown>", "scaling_governor": ""}
    write_tree(tmp_path, {f"{cpu}/{name}": content for name, content in files.items()})
    found = take_conditions(tmp_path)
    assert (found.cpu_mhz, found.governor) == ((), None)


def test_nothing_is_reported_without_sensors(tmp_path: Path) -> None:
    found = take_conditions(tmp_path)
    assert (found.cpu_mhz, found.governor, found.load_1m) == ((), None, None)
    assert (found.temperatures_c, found.throttle_counts, found.gpu) == ((), (), ())


def test_this_machine() -> None:
    found = take_conditions()
    assert datetime.fromisoformat(found.taken).tzinfo is not None
    assert len(found.cpu_mhz) <= len(CPUS)
    assert all(clock > 0 for clock in found.cpu_mhz)
    if hasattr(os, "getloadavg"):
        assert found.load_1m == pytest.approx(os.getloadavg()[0], abs=0.5)


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ("Name:\tpython\nVmPeak:\t 900000 kB\nVmHWM:\t  500000 kB\nVmRSS:\t  400000 kB", 512.0),
        ("Name:\tkthreadd", None),
    ],
)
def test_peak_memory_is_resident_memory(tmp_path: Path, status: str, found: float | None) -> None:
    write_tree(tmp_path, {"proc/self/status": status})
    assert peak_memory_mb(tmp_path) == found


def test_peak_memory_is_unknown_without_proc(tmp_path: Path) -> None:
    assert peak_memory_mb(tmp_path) is None


@pytest.mark.skipif(peak_memory_mb() is None, reason="peak memory is not reported here")
def test_peak_memory_does_not_fall() -> None:
    before = peak_memory_mb()
    ballast = bytearray(b"1") * 50_000_000
    after = peak_memory_mb()
    assert before is not None
    assert after is not None
    assert after >= max(before, len(ballast) / 1e6)
