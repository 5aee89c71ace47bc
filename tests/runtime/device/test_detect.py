import os
import sys
from pathlib import Path

import pytest

from edgeclip.runtime.device.machine import (
    cgroup_cores,
    cgroup_memory,
    detect_memory_mb,
    detect_processor,
    linux_processor,
    macos_processor,
    memory_total,
)

# Two cores with two threads each, as /proc/cpuinfo numbers them.
INTEL = "\n\n".join(
    f"processor\t: {number}\nmodel name\t: Intel(R) Xeon(R)\nphysical id\t: 0\n"
    f"core id\t\t: {number % 2}\nflags\t\t: fpu avx2 fma avx512f avx512_vnni"
    for number in range(4)
)
RASPBERRY = "\n\n".join(
    [
        *(
            f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd asimdhp asimddp"
            for number in range(4)
        ),
        "Revision\t: c04170\nModel\t\t: Raspberry Pi 5",
    ]
)
APPLE = {
    "hw.perflevel0.physicalcpu": "4",
    "hw.physicalcpu": "8",
    "machdep.cpu.brand_string": "Apple M1",
    "hw.optional.neon": "1",
    "hw.optional.arm.FEAT_DotProd": "1",
    "hw.optional.arm.FEAT_I8MM": "0",
}


def test_hyper_threads_of_a_core_count_once() -> None:
    found = linux_processor(INTEL, {0, 1, 2, 3})
    assert found.model == "Intel(R) Xeon(R)"
    assert found.cores == 2
    assert found.flags == ("avx2", "fma", "avx512f", "avx512_vnni")


@pytest.mark.parametrize(("allowed", "cores"), [({0, 2}, 1), ({1, 2}, 2), ({3}, 1)])
def test_only_allowed_processors_count(allowed: set[int], cores: int) -> None:
    assert linux_processor(INTEL, allowed).cores == cores


def test_two_packages_may_number_their_cores_alike() -> None:
    second = INTEL.replace("physical id\t: 0", "physical id\t: 1")
    for number in range(4):
        second = second.replace(f"processor\t: {number}", f"processor\t: {number + 4}", 1)
    assert linux_processor(f"{INTEL}\n\n{second}", set(range(8))).cores == 4


def test_arm_without_core_numbers() -> None:
    found = linux_processor(RASPBERRY, {0, 1, 2})
    assert found.cores == 3
    assert found.model == ""
    assert found.flags == ("asimd", "asimdhp", "asimddp")


def test_an_empty_cpuinfo_leaves_the_allowed_processors() -> None:
    assert linux_processor("", {0, 1}).cores == 2


def test_macos_counts_performance_cores() -> None:
    found = macos_processor(lambda name: APPLE.get(name, ""))
    assert (found.model, found.cores) == ("Apple M1", 4)
    assert found.flags == ("asimd", "asimddp")


def test_macos_without_answers_does_not_fail() -> None:
    found = macos_processor(lambda name: "")
    assert found.cores == os.cpu_count()
    assert found.model
    assert found.flags == ()


def test_memory_total_is_read_in_bytes() -> None:
    assert memory_total("MemTotal:       24681236 kB\nMemFree: 1 kB\n") == 24681236 * 1024
    assert memory_total("") is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "512000000\n"}, 512000000),
        ({"memory/memory.limit_in_bytes": "1000\n"}, 1000),
    ],
)
def test_memory_limit_of_a_container(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    _write(tmp_path, files)
    assert cgroup_memory(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_cpu_quota_of_a_container(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    _write(tmp_path, files)
    assert cgroup_cores(tmp_path) == expected


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what Linux says")
def test_this_computer_is_seen_as_the_system_sees_it() -> None:
    found = detect_processor()
    assert 1 <= found.cores <= len(os.sched_getaffinity(0))
    assert found.model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found_mb = detect_memory_mb()
    assert found_mb is not None
    assert 0 < found_mb <= memory // 10**6 + 1
