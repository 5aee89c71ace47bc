"""Energy of x86 processors ("Running Average Power Limit"), which their packages count themselves.

Sources: https://docs.kernel.org/power/powercap/powercap.html; the kernel shows AMD's counters
under the name intel-rapl too. Where an `amd_energy` driver is loaded instead, its sockets are in
hwmon. Both count microjoules of whole packages, without the memory, and most systems let only
root read them (CVE-2020-8694). Tested on copies of such folders; not yet on a real counter.
"""

from functools import partial
from pathlib import Path

from edgeclip.runtime.sensing.energy_meter import CountedEnergy, Counter
from edgeclip.runtime.sensing.kernel_files import listing, read_line, read_number

_LEAST_S = 0.2  # counters move about once a millisecond
_MICROJOULES = 1e6


def rapl_meter(root: Path = Path("/")) -> CountedEnergy | str:
    """The packages of this machine, or why there is no such meter.

    Other zones are left out: parts of a package (intel-rapl:0:0), and "psys", which holds the
    packages and more.

    Args:
        root: where `sys` is.
    """
    zones = listing(root / "sys/class/powercap", "intel-rapl:*")
    packages = [zone for zone in zones if (read_line(zone / "name") or "").startswith("package")]
    if not packages:
        return "no RAPL counters in /sys/class/powercap"
    counters = []
    for package in packages:
        limit = read_number(package / "max_energy_range_uj")
        counters.append(Counter(partial(_number, package / "energy_uj"), limit))
    return _checked("RAPL packages", "processor packages", counters, packages[0] / "energy_uj")


def amd_energy_meter(root: Path = Path("/")) -> CountedEnergy | str:
    """The sockets of this machine, or why there is no such meter.

    Args:
        root: where `sys` is.
    """
    files = [
        chip / label.name.replace("_label", "_input")
        for chip in listing(root / "sys/class/hwmon", "hwmon*")
        if read_line(chip / "name") == "amd_energy"
        for label in listing(chip, "energy*_label")
        if (read_line(label) or "").startswith("Esocket")
    ]
    if not files:
        return "no amd_energy sensor"
    counters = [Counter(partial(_number, file)) for file in files]
    return _checked("amd_energy sockets", "processor packages", counters, files[0])


def _checked(name: str, covers: str, counters: list[Counter], file: Path) -> CountedEnergy | str:
    """The meter, if all its counters can be read and move."""
    try:
        for counter in counters:
            counter.read()
    except PermissionError:
        return f"{name} may not be read: run as root, or let others read {file}"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    meter = CountedEnergy(
        name=name,
        covers=covers,
        least_s=_LEAST_S,
        counters=tuple(counters),
        per_joule=_MICROJOULES,
    )
    return meter if meter.moves() else f"{name} stand still, as in many virtual machines"


def _number(file: Path) -> int:
    return int(file.read_text())
