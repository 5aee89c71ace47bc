"""Choose the precision of a tower, and fall back to another where an engine computes it wrongly."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import TowerManifest
from edgeclip.runtime.errors import BundleError, EngineParityError, InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile


OpenRunner = Callable[[Bundle, Tower, Precision, "DeviceProfile"], TowerRunner]

_log = logging.getLogger(__name__)
_EXACTNESS: tuple[Precision, ...] = ("fp8", "int8", "fp16", "fp32")  # in rising order


def usable_precisions(tower: TowerManifest, device: "DeviceProfile") -> tuple[Precision, ...]:
    """Return the precisions of a tower that the device allows, in the device's order.

    int8 made for VNNI is left out on a CPU without VNNI, where its products would saturate.
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
    """Return `wanted`, else the bundle's default, else the first precision the device allows.

    Raises:
        InputError: the device does not allow `wanted`, or would compute it wrongly.
        BundleError: the bundle does not contain `wanted`, or no precision the device allows.
    """
    allowed = " or ".join(device.precisions)
    if wanted is not None:
        if wanted not in device.precisions:
            raise InputError(f"device {device.name!r} does not allow {wanted}: choose {allowed}")
        if tower.file(wanted).needs_vnni and not device.vnni:
            raise InputError(
                f"the {wanted} {tower.tower} tower was made for CPUs with VNNI, which device "
                f"{device.name!r} lacks: choose another precision, or export it for this device"
            )
        return wanted
    usable = usable_precisions(tower, device)
    if tower.chosen in usable:
        return tower.chosen
    if not usable:
        raise BundleError(
            f"the bundle holds the {tower.tower} tower in {', '.join(tower.precisions)}, but "
            f"device {device.name!r} allows {allowed}: export it in one of these"
        )
    return usable[0]


def open_with_fallback(
    bundle: Bundle,
    tower: Tower,
    precision: Precision,
    device: "DeviceProfile",
    *,
    open_runner: OpenRunner = TowerRunner,
) -> TowerRunner:
    """Load a tower; if its engine is wrong, load a more exact one, and finally fp32 on the CPU.

    Some versions of TensorRT silently compute wrong numbers in half precision; such an engine
    misses its parity gate on the device. The fallback is slower but correct, and each step is
    logged as a warning. Other failures, such as a missing GPU, remain errors.

    Args:
        bundle: the bundle of the tower.
        tower: image or text.
        precision: the precision to try first.
        device: where the tower runs.
        open_runner: loads one precision on one device.

    Raises:
        EngineParityError: the engine of every precision is wrong.
        EngineError, BundleError, MissingExtraError: see `TowerRunner`.
    """
    attempts = list(_attempts(bundle, tower, precision, device))
    for (precision, device), (next_precision, next_device) in itertools.pairwise(attempts):
        try:
            return open_runner(bundle, tower, precision, device)
        except EngineParityError as error:
            place = "" if next_device is device else " with ONNX Runtime on the CPU, which is slow"
            _log.warning("%s; using %s for the %s tower%s", error, next_precision, tower, place)
    precision, device = attempts[-1]
    return open_runner(bundle, tower, precision, device)


def _attempts(
    bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
) -> Iterator[tuple[Precision, "DeviceProfile"]]:
    """Yield precision and device of each attempt, the wanted one first."""
    yield precision, device
    usable = usable_precisions(bundle.manifest.tower(tower), device)
    for more_exact in _EXACTNESS[_EXACTNESS.index(precision) + 1 :]:
        if more_exact in usable:
            yield more_exact, device
    if device.engine != "onnxruntime-cpu" and "fp32" in bundle.manifest.tower(tower).precisions:
        yield "fp32", device.cpu_profile()
