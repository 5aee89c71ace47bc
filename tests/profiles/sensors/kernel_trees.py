"""Copies of what kernels show in /proc and /sys, made to be read in place of this machine's."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def write_tree(root: Path, files: Mapping[str, object]) -> Path:
    """Write files below `root`, each ending with a line feed as the kernel's do."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def laptop(root: Path) -> Path:
    """An Intel laptop with cpufreq, coretemp, thermal zones and throttle counters."""
    files: dict[str, object] = {
        "proc/loadavg": "0.52 0.58 0.59 1/813 20817",
        "sys/class/hwmon/hwmon0/name": "acpitz",
        "sys/class/hwmon/hwmon0/temp1_input": 27800,
        "sys/class/hwmon/hwmon1/name": "nvme",
        "sys/class/hwmon/hwmon1/temp1_input": 39850,
        "sys/class/hwmon/hwmon1/temp1_label": "Composite",
        "sys/class/hwmon/hwmon2/name": "nvme",
        "sys/class/hwmon/hwmon2/temp1_input": 44850,
        "sys/class/hwmon/hwmon2/temp1_label": "Composite",
        "sys/class/hwmon/hwmon4/name": "coretemp",
        "sys/class/hwmon/hwmon4/temp1_input": 61000,
        "sys/class/hwmon/hwmon4/temp1_label": "Package id 0",
        "sys/class/hwmon/hwmon4/temp2_input": 58000,
        "sys/class/hwmon/hwmon4/temp2_label": "Core 0",
        "sys/class/hwmon/hwmon5/name": "nct6798",
        "sys/class/hwmon/hwmon5/temp9_input": -62000,  # nothing is connected
        "sys/class/thermal/thermal_zone0/type": "acpitz",
        "sys/class/thermal/thermal_zone0/temp": 27800,
        "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp",
        "sys/class/thermal/thermal_zone1/temp": 61000,
    }
    for place, number in enumerate(CPUS):
        cpu = f"sys/devices/system/cpu/cpu{number}"
        files |= {
            f"{cpu}/cpufreq/scaling_cur_freq": 2_400_000 + 100_000 * place,
            f"{cpu}/cpufreq/scaling_governor": "powersave",
        }
    for number in range(4):  # two cores with two threads each
        cpu = f"sys/devices/system/cpu/cpu{number}"
        files |= {
            f"{cpu}/topology/physical_package_id": 0,
            f"{cpu}/topology/core_id": number // 2,
            f"{cpu}/thermal_throttle/core_throttle_count": 3 + 4 * (number // 2),
            f"{cpu}/thermal_throttle/package_throttle_count": 11,
        }
    return write_tree(root, files)


def orin_nano(root: Path) -> Path:
    """A Jetson Orin Nano with JetPack 6: rails, events, zones of which one sleeps, GPU clock."""
    hwmon = "sys/class/hwmon"
    write_tree(
        root,
        {
            "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd asimddp\n",
            "proc/loadavg": "1.02 0.77 0.60 2/412 9012",
            f"{hwmon}/hwmon0/name": "tmp451",
            f"{hwmon}/hwmon0/temp1_input": 41000,
            f"{hwmon}/hwmon1/name": "ina3221",
            f"{hwmon}/hwmon1/in1_label": "VDD_IN",
            f"{hwmon}/hwmon1/in1_input": 4984,
            f"{hwmon}/hwmon1/curr1_input": 1856,
            f"{hwmon}/hwmon1/in2_label": "VDD_CPU_GPU_CV",
            f"{hwmon}/hwmon1/in2_input": 4976,
            f"{hwmon}/hwmon1/curr2_input": 640,
            f"{hwmon}/hwmon1/in3_label": "VDD_SOC",
            f"{hwmon}/hwmon1/in3_input": 4976,
            f"{hwmon}/hwmon1/curr3_input": 320,
            f"{hwmon}/hwmon1/in7_label": "sum of shunt voltages",
            f"{hwmon}/hwmon1/in7_input": 14120,
            f"{hwmon}/hwmon3/name": "soctherm_oc",
            f"{hwmon}/hwmon3/oc1_event_cnt": 0,
            f"{hwmon}/hwmon3/oc1_throt_en": 1,
            f"{hwmon}/hwmon3/oc3_event_cnt": 2,
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": 48500,
            "sys/class/thermal/thermal_zone2/type": "cv0-thermal",
            "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
            "sys/class/devfreq/15340000.vic/cur_freq": 115200000,
        },
    )
    # Reading the zone of a unit without power fails.
    (root / "sys/class/thermal/thermal_zone2/temp").mkdir()
    return root


def agx_orin(root: Path) -> Path:
    """The two power monitors of a Jetson AGX Orin."""
    first, second = "sys/class/hwmon/hwmon3", "sys/class/hwmon/hwmon4"
    return write_tree(
        root,
        {
            f"{first}/name": "ina3221",
            f"{first}/in1_label": "VDD_GPU_SOC",
            f"{first}/in1_input": 19000,
            f"{first}/curr1_input": 200,
            f"{first}/in2_label": "VDD_CPU_CV",
            f"{first}/in2_input": 19000,
            f"{first}/curr2_input": 100,
            f"{first}/in3_label": "VIN_SYS_5V0",
            f"{first}/in3_input": 5000,
            f"{first}/curr3_input": 900,
            f"{second}/name": "ina3221",
            f"{second}/in1_label": "NC",
            f"{second}/in1_input": 0,
            f"{second}/curr1_input": 0,
            f"{second}/in2_label": "VDDQ_VDD2_1V8AO",  # part of VIN_SYS_5V0
            f"{second}/in2_input": 5000,
            f"{second}/curr2_input": 300,
        },
    )


def rapl(root: Path, microjoules: tuple[int, ...], limit: int = 1_000_000) -> list[Path]:
    """Counters of packages, and beside them zones that hold them or are part of them."""
    folder, files = "sys/class/powercap", []
    for number, value in enumerate(microjoules):
        zone = f"{folder}/intel-rapl:{number}"
        write_tree(
            root,
            {
                f"{zone}/name": f"package-{number}",
                f"{zone}/max_energy_range_uj": limit,
                f"{zone}/energy_uj": value,
                f"{zone}:0/name": "core",
                f"{zone}:0/energy_uj": 1,
            },
        )
        files.append(root / zone / "energy_uj")
    psys = f"{folder}/intel-rapl:{len(microjoules)}"
    write_tree(root, {f"{psys}/name": "psys", f"{psys}/energy_uj": 1, f"{folder}/x": ""})
    return files


@contextmanager
def counting(file: Path) -> Iterator[None]:
    """Let a counter rise, as a real one does, while the block runs."""
    ended, value = threading.Event(), int(file.read_text())

    def count() -> None:
        at = value
        while not ended.wait(0.002):
            at += 100
            other = file.with_name("new")
            other.write_text(f"{at}\n")
            os.replace(other, file)  # whoever reads meanwhile never sees half a number

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
