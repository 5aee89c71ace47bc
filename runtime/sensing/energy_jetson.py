"""Energy of an NVIDIA Jetson module, from the power monitor on it (Texas Instruments INA3221).

Sources: https://docs.kernel.org/hwmon/ina3221.html for files and units, NVIDIA's "Jetson Linux
Developer Guide" for the rails: on an Orin Nano or NX, VDD_IN is the whole module; on an AGX Orin
three rails make it up, and VDDQ_VDD2_1V8AO is part of VIN_SYS_5V0. The carrier board is not part
of it. Tested on copies of such folders; not yet on a Jetson.
"""

from pathlib import Path

from edgeclip.runtime.sensing.energy_meter import SampledPower
from edgeclip.runtime.sensing.kernel_files import listing, read_line

_LEAST_S = 0.5
_PERIOD_S = 0.02  # a reading takes about a millisecond on the bus
# Rails that are the whole module together, the first that are all there.
_MODULES = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)

Rail = tuple[Path, Path]  # files of millivolts and milliamperes


def jetson_meter(root: Path = Path("/")) -> SampledPower | str:
    """The module's power monitor, or why there is no such meter.

    Args:
        root: where `sys` is.
    """
    rails = _rails(root)
    if not rails:
        return "no INA3221 power monitor"
    names = next((names for names in _MODULES if rails.keys() >= set(names)), None)
    if names is None:
        return f"the INA3221 measures rails of an unknown board: {', '.join(sorted(rails))}"
    chosen = [rails[name] for name in names]
    try:
        now = _watts(chosen)
    except (OSError, ValueError) as error:
        return f"the INA3221 cannot be read: {error}"
    if now <= 0:
        return f"the INA3221 tells {now} W, which cannot be"
    return SampledPower(
        name=f"INA3221 {' + '.join(names)}",
        covers="module (CPU, GPU and memory)",
        least_s=_LEAST_S,
        watts=lambda: _watts(chosen),
        period_s=_PERIOD_S,
    )


def _rails(root: Path) -> dict[str, Rail]:
    """By label; channels without one, and the sums of channels, have no current of their own."""
    found = {}
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        if read_line(chip / "name") != "ina3221":
            continue
        for number in (1, 2, 3):
            label = read_line(chip / f"in{number}_label")
            if label and label != "NC":  # not connected
                found[label] = (chip / f"in{number}_input", chip / f"curr{number}_input")
    return found


def _watts(rails: list[Rail]) -> float:
    """Millivolts times milliamperes are microwatts."""
    return sum(int(volts.read_text()) * int(amperes.read_text()) for volts, amperes in rails) / 1e6
