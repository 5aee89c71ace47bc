"""Read the clocks, temperatures, load, throttling and memory use of this machine from the kernel.

Sources: Linux's /proc and /sys: cpufreq, hwmon, thermal zones, devfreq, thermal_throttle.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from edgeclip.profiles.record.conditions import MachineConditions
from edgeclip.profiles.sensors.nvml import NvmlGpu, this_gpu

_ROOT = Path("/")
_CPUS = "sys/devices/system/cpu"
# Degrees Celsius; a sensor input that nothing is connected to shows the end of its scale.
_PLAUSIBLE_C = (-55, 150)
# Names of a Jetson's GPU in /sys/class/devfreq: 17000000.gpu, 17000000.ga10b, gpu-gpc-0 ...
_GPU_NODES = (".gpu", ".ga10b", ".gv11b", ".gp10b", "gpu-gpc")


def read_line(path: Path) -> str | None:
    """Read a file without blanks around its text; None where it cannot be read, or is empty.

    Reading a sensor whose chip sleeps raises some `OSError`, though its file is there.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """Read the whole number that a file holds; None where it holds none."""
    try:
        return int(read_line(path) or "")
    except ValueError:
        return None


def listing(folder: Path, pattern: str) -> list[Path]:
    """List the paths in `folder` that match a pattern, ordered by the numbers in their names."""
    try:
        found = list(folder.glob(pattern))
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name))


def peak_memory_mb(root: Path = _ROOT) -> float | None:
    """Return the peak resident memory of this process in MB of 10^6 bytes; None if not reported.

    A GPU's own memory is not in it. Linux's VmHWM is preferred to `ru_maxrss`, which a child
    inherits: a small process started by one that holds torch would report torch's memory.

    Args:
        root: where `proc` is.
    """
    words = (read_line(root / "proc/self/status") or "").partition("VmHWM:")[2].split()
    if words and words[0].isdecimal():
        return int(words[0]) * 1024 / 1e6
    if sys.platform == "darwin" and root == _ROOT:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes there
    return None


def take_conditions(root: Path = _ROOT, *, gpu: NvmlGpu | None = None) -> MachineConditions:
    """Read the state of the machine now; what cannot be read stays empty or None.

    On macOS that is everything but the load. In a virtual machine the hypervisor decides what
    clock is shown, mostly the nominal one.

    Args:
        root: where `proc` and `sys` are: another one than `/` for a copy of a machine's.
        gpu: the GPU to read; by default the first one of this machine, where `root` is its own.
    """
    if gpu is None and root == _ROOT:
        gpu = this_gpu()
    allowed = _allowed_cpus()
    return MachineConditions(
        taken=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu_mhz=tuple(_clocks(root, allowed)),
        governor=_governor(root, allowed),
        load_1m=_load(root),
        temperatures_c=tuple(
            _number_duplicates([*_hwmon_temperatures(root), *_zone_temperatures(root)])
        ),
        throttle_counts=(*_x86_throttling(root), *_jetson_throttling(root)),
        gpu=(*_integrated_gpu(root), *(() if gpu is None else _nvidia_gpu(gpu))),
    )


def _allowed_cpus() -> list[int]:
    """Numbers of the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _clocks(root: Path, allowed: list[int]) -> Iterator[float]:
    """Clocks of the allowed processors in 10^6 Hz; cpufreq counts in kHz."""
    nominal = _cpuinfo_clocks(root)
    for number in allowed:
        kilohertz = read_number(root / _CPUS / f"cpu{number}/cpufreq/scaling_cur_freq")
        if kilohertz:
            yield kilohertz / 1e3
        elif number in nominal:
            yield nominal[number]


def _cpuinfo_clocks(root: Path) -> dict[int, float]:
    """Clock in 10^6 Hz by logical processor; empty on Arm, where /proc/cpuinfo has none."""
    found, number = {}, -1
    for line in (read_line(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor" and value.isdecimal():
            number = int(value)
        elif key == "cpu MHz" and value.replace(".", "", 1).isdecimal() and float(value) > 0:
            found[number] = float(value)
    return found


def _governor(root: Path, allowed: list[int]) -> str | None:
    """Frequency governor: one name, or several where clusters differ."""
    files = (root / _CPUS / f"cpu{number}/cpufreq/scaling_governor" for number in allowed)
    return ", ".join(sorted({name for name in map(read_line, files) if name})) or None


def _load(root: Path) -> float | None:
    try:
        return float((read_line(root / "proc/loadavg") or "").split()[0])
    except (IndexError, ValueError):
        pass
    try:
        return round(os.getloadavg()[0], 2) if root == _ROOT else None
    except (AttributeError, OSError):  # Windows has no such thing
        return None


def _hwmon_temperatures(root: Path) -> Iterator[tuple[str, float]]:
    """Temperatures of hwmon: (chip and label, degrees Celsius)."""
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        name = read_line(chip / "name") or chip.name
        for file in listing(chip, "temp*_input"):
            label = read_line(chip / file.name.replace("_input", "_label"))
            sensor = f"{name} {label or file.name.removesuffix('_input')}"
            yield from _plausible(sensor, read_number(file))


def _zone_temperatures(root: Path) -> Iterator[tuple[str, float]]:
    """Temperatures of the thermal zones that the kernel does not show in hwmon as well."""
    shown = {
        (read_line(chip / "name") or "").replace("_", "-")
        for chip in listing(root / "sys/class/hwmon", "hwmon*")
    }
    for zone in listing(root / "sys/class/thermal", "thermal_zone*"):
        kind = read_line(zone / "type") or zone.name
        if kind.replace("_", "-") not in shown:
            yield from _plausible(kind, read_number(zone / "temp"))


def _number_duplicates(found: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Number sensors of the same name, such as those of two disks of one kind."""
    seen = Counter[str]()
    for sensor, degrees in found:
        seen[sensor] += 1
        yield (f"{sensor} ({seen[sensor]})" if seen[sensor] > 1 else sensor), degrees


def _plausible(sensor: str, millidegrees: int | None) -> Iterator[tuple[str, float]]:
    if millidegrees is not None and _PLAUSIBLE_C[0] < millidegrees / 1e3 < _PLAUSIBLE_C[1]:
        yield sensor, millidegrees / 1e3


def _x86_throttling(root: Path) -> Iterator[tuple[str, int]]:
    """How often cores and packages were throttled, each counted once for all its threads."""
    for counter, parts in (
        ("core_throttle_count", ("physical_package_id", "core_id")),
        ("package_throttle_count", ("physical_package_id",)),
    ):
        found: dict[object, int] = {}
        for cpu in listing(root / _CPUS, "cpu[0-9]*"):
            count = read_number(cpu / "thermal_throttle" / counter)
            if count is not None:
                place = tuple(read_line(cpu / "topology" / part) for part in parts)
                found[place if None not in place else cpu.name] = count
        if found:
            yield counter, sum(found.values())


def _jetson_throttling(root: Path) -> Iterator[tuple[str, int]]:
    """How often a Jetson was throttled for its power supply.

    oc1 counts too low a voltage, oc2 and oc3 too high a current, on average and at once.
    """
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        for file in listing(chip, "oc*_event_cnt"):
            count = read_number(file)
            if count is not None:
                yield file.name, count


def _integrated_gpu(root: Path) -> Iterator[tuple[str, str]]:
    """Clock of a GPU on the same chip as the CPU."""
    for node in listing(root / "sys/class/devfreq", "*"):
        hertz = read_number(node / "cur_freq")
        if hertz and any(name in node.name for name in _GPU_NODES):
            yield f"{node.name} mhz", f"{hertz / 1e6:.0f}"


def _nvidia_gpu(gpu: NvmlGpu) -> Iterator[tuple[str, str]]:
    reasons, slowed = gpu.clock_reasons(), gpu.slowed_by_heat_ms()
    for name, value in (
        ("name", gpu.name()),
        ("sm mhz", gpu.sm_mhz()),
        ("memory mhz", gpu.memory_mhz()),
        ("temperature c", gpu.temperature_c()),
        ("power w", gpu.power_w()),
        ("clocks held by", None if reasons is None else ", ".join(reasons) or "nothing"),
        ("slowed by heat ms", None if slowed is None else f"{slowed:.1f}"),
    ):
        if value is not None:
            yield name, str(value)
