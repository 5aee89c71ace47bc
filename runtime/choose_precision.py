"""Which precision of a tower runs on a device."""

from typing import TYPE_CHECKING

from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.manifest import TowerManifest
from edgeclip.runtime.spec import Precision

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


def choose_precision(
    tower: TowerManifest, device: "DeviceProfile", wanted: Precision | None = None
) -> Precision:
    """Return `wanted`, else what the bundle chose, else the first that fits the device.

    Raises:
        InputError: the device does not allow `wanted`.
        BundleError: the bundle does not hold `wanted`, or nothing that the device allows.
    """
    if wanted is not None:
        if wanted not in device.precisions:
            raise InputError(
                f"device {device.name!r} does not allow {wanted}: choose {_either(device)}"
            )
        return tower.file(wanted).precision
    if tower.chosen in device.precisions:
        return tower.chosen
    for precision in device.precisions:
        if precision in tower.precisions:
            return precision
    raise BundleError(
        f"the bundle holds the {tower.tower} tower in {', '.join(tower.precisions)}, but device "
        f"{device.name!r} allows {_either(device)}: export it in one of these"
    )


def _either(device: "DeviceProfile") -> str:
    return " or ".join(device.precisions)
