"""Which precision of a tower runs on a device."""

from typing import TYPE_CHECKING

from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.manifest import TowerManifest
from edgeclip.runtime.spec import Precision

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


def usable_precisions(tower: TowerManifest, device: "DeviceProfile") -> tuple[Precision, ...]:
    """Precisions of a tower that the device allows and computes rightly, in their order there.

    int8 made for VNNI is left out on a CPU without: its products would overflow in silence.
    """
    held = {file.precision: file for file in tower.files}
    return tuple(
        precision
        for precision in device.precisions
        if precision in held and (device.vnni or not held[precision].needs_vnni)
    )


def choose_precision(
    tower: TowerManifest, device: "DeviceProfile", wanted: Precision | None = None
) -> Precision:
    """Return `wanted`, else what the bundle chose, else the first that fits the device.

    Raises:
        InputError: the device does not allow `wanted`, or would compute it wrongly.
        BundleError: the bundle does not hold `wanted`, or nothing that fits the device.
    """
    usable = usable_precisions(tower, device)
    if wanted is not None:
        return _wanted(tower, device, wanted)
    if tower.chosen in usable:
        return tower.chosen
    if not usable:
        raise BundleError(
            f"the bundle holds the {tower.tower} tower in {', '.join(tower.precisions)}, but "
            f"device {device.name!r} allows {_either(device)}: export it in one of these"
        )
    return usable[0]


def _wanted(tower: TowerManifest, device: "DeviceProfile", wanted: Precision) -> Precision:
    if wanted not in device.precisions:
        raise InputError(
            f"device {device.name!r} does not allow {wanted}: choose {_either(device)}"
        )
    if tower.file(wanted).needs_vnni and not device.vnni:
        raise InputError(
            f"the {wanted} {tower.tower} tower was made for CPUs with VNNI, which device "
            f"{device.name!r} lacks: choose another precision, or export it for this device"
        )
    return wanted


def _either(device: "DeviceProfile") -> str:
    return " or ".join(device.precisions)
