"""Clocks, temperatures, load, throttling and memory of this machine, as the kernel reports them."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from edgeclip.profiles.record.conditions import MachineConditions
from edgeclip.profiles.sensors.nvml import NvmlGpu, this_gpu


def read_line(path: Path) -> str | None:
    """What `path` says, without blanks around it; None where it cannot be read, or is empty.

    A sensor whose chip sleeps fails with some `OSError` when it is read, though its file is there.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """The whole number that `path` holds; None where it holds none."""
    try:
        return int(read_line(path) or "")
    except ValueError:
        return None


def listing(folder: Path, pattern: str) -> list[Path]:
    """Paths in `folder` that match a glob pattern, in the order of the numbers in their names."""
    try:
        found = list(folder.glob(pattern))
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name))


_ROOT = Path("/")


def peak_memory_mb(root: Path = _ROOT) -> float | None:
    """The most memory this process held so far, in MB of 10^6 bytes; None if not reported.

    Of a GPU's own memory it tells nothing. Linux's VmHWM is preferred to `ru_maxrss`, which a
    child inherits: a small process started by one that holds torch would report torch's memory.

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


_CPUS = "sys/devices/system/cpu"
# An input that nothing is connected to shows the end of its scale.
_LIKELY_C = (-55, 150)
# Of a Jetson's GPU in /sys/class/devfreq: 17000000.gpu, 17000000.ga10b, gpu-gpc-0 and so on.
_GPU_NODES = (".gpu", ".ga10b", ".gv11b", ".gp10b", "gpu-gpc")


def take_conditions(root: Path = _ROOT, *, gpu: NvmlGpu | None = None) -> MachineConditions:
    """Look now. Never fails: what cannot be found out stays empty or None.

    On macOS that is everything but the load. In a virtual machine the clock is what the
    hypervisor makes of it, mostly the nominal one.

    Args:
        root: where `proc` and `sys` are: another one than `/` for a copy of a machine's.
        gpu: whose values to add; the first one of this machine where `root` is its own.
    """
    if gpu is None and root == _ROOT:
        gpu = this_gpu()
    allowed = _allowed()
    return MachineConditions(
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu_mhz=tuple(_clocks(root, allowed)),
        governor=_governor(root, allowed),
        load_1m=_load(root),
        temperatures_c=tuple(_numbered([*_sensors(root), *_zones(root)])),
        throttle_counts=(*_x86_throttling(root), *_jetson_events(root)),
        gpu=(*_board_gpu(root), *(() if gpu is None else _nvml(gpu))),
    )


def _allowed() -> list[int]:
    """Numbers of the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _clocks(root: Path, allowed: list[int]) -> Iterator[float]:
    """In 10^6 Hz; cpufreq counts in kHz."""
    nominal = _cpuinfo_clocks(root)
    for number in allowed:
        kilohertz = read_number(root / _CPUS / f"cpu{number}/cpufreq/scaling_cur_freq")
        if kilohertz:
            yield kilohertz / 1e3
        elif number in nominal:
            yield nominal[number]


def _cpuinfo_clocks(root: Path) -> dict[int, float]:
    """Clock by logical processor; empty on Arm, where /proc/cpuinfo does not tell it."""
    found, number = {}, -1
    for line in (read_line(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor" and value.isdecimal():
            number = int(value)
        elif key == "cpu MHz" and value.replace(".", "", 1).isdecimal() and float(value) > 0:
            found[number] = float(value)
    return found


def _governor(root: Path, allowed: list[int]) -> str | None:
    """One name, or several where clusters differ."""
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


def _sensors(root: Path) -> Iterator[tuple[str, float]]:
    """Temperatures of hwmon; each chip has a name, and its inputs may have labels."""
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        name = read_line(chip / "name") or chip.name
        for file in listing(chip, "temp*_input"):
            label = read_line(chip / file.name.replace("_input", "_label"))
            sensor = f"{name} {label or file.name.removesuffix('_input')}"
            yield from _likely(sensor, read_number(file))


def _zones(root: Path) -> Iterator[tuple[str, float]]:
    """Temperatures of thermal zones; the kernel shows some of them in hwmon as well."""
    shown = {
        (read_line(chip / "name") or "").replace("_", "-")
        for chip in listing(root / "sys/class/hwmon", "hwmon*")
    }
    for zone in listing(root / "sys/class/thermal", "thermal_zone*"):
        kind = read_line(zone / "type") or zone.name
        if kind.replace("_", "-") not in shown:
            yield from _likely(kind, read_number(zone / "temp"))


def _numbered(found: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Each sensor under a name of its own, as two disks of one kind have not."""
    seen = Counter[str]()
    for sensor, degrees in found:
        seen[sensor] += 1
        yield (f"{sensor} ({seen[sensor]})" if seen[sensor] > 1 else sensor), degrees


def _likely(sensor: str, millidegrees: int | None) -> Iterator[tuple[str, float]]:
    if millidegrees is not None and _LIKELY_C[0] < millidegrees / 1e3 < _LIKELY_C[1]:
        yield sensor, millidegrees / 1e3


def _x86_throttling(root: Path) -> Iterator[tuple[str, int]]:
    """How often cores and packages were slowed, each counted once, however many threads it has."""
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


def _jetson_events(root: Path) -> Iterator[tuple[str, int]]:
    """How often a Jetson was slowed for its supply: oc1 for too low a voltage, oc2 and oc3 for
    too high a current, on average and at once."""
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        for file in listing(chip, "oc*_event_cnt"):
            count = read_number(file)
            if count is not None:
                yield file.name, count


def _board_gpu(root: Path) -> Iterator[tuple[str, str]]:
    """Clock of a GPU that is part of the chip."""
    for node in listing(root / "sys/class/devfreq", "*"):
        hertz = read_number(node / "cur_freq")
        if hertz and any(name in node.name for name in _GPU_NODES):
            yield f"{node.name} mhz", f"{hertz / 1e6:.0f}"


def _nvml(gpu: NvmlGpu) -> Iterator[tuple[str, str]]:
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
