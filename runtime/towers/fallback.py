"""Choose the precision a tower runs in, and fall back where its engine computes it wrongly."""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import TowerManifest
from edgeclip.runtime.errors import BundleError, EngineParityError, InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile


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


OpenRunner = Callable[[Bundle, Tower, Precision, "DeviceProfile"], TowerRunner]

_EXACTNESS: tuple[Precision, ...] = ("fp8", "int8", "fp16", "fp32")


def open_with_fallback(
    bundle: Bundle,
    tower: Tower,
    precision: Precision,
    device: "DeviceProfile",
    *,
    open_runner: OpenRunner = TowerRunner,
) -> TowerRunner:
    """Load a tower; if its engine is wrong, in a more exact precision, at last on the CPU.

    Some versions of TensorRT give wrong numbers in half precision without a word; such an
    engine misses its parity gate on the device. What runs instead is slower, never wrong, and
    each step is told on stderr. Other failures, such as a GPU that is missing, stay errors:
    they are for a person to mend.

    Args:
        bundle: what holds the tower.
        tower: which one.
        precision: what should run.
        device: where.
        open_runner: loads one precision on one device.

    Raises:
        EngineParityError: even ONNX Runtime on the CPU is wrong.
        EngineError, BundleError, MissingExtraError: see `TowerRunner`.
    """
    attempts = list(_attempts(bundle, tower, precision, device))
    for (wanted, where), (instead, there) in itertools.pairwise(attempts):
        try:
            return open_runner(bundle, tower, wanted, where)
        except EngineParityError as error:
            place = "" if there is where else " with ONNX Runtime on the CPU, which is slow"
            line = f"edgeclip: {error}; using {instead} for the {tower} tower{place}"
            print(line, file=sys.stderr, flush=True)
    wanted, where = attempts[-1]
    return open_runner(bundle, tower, wanted, where)


def _attempts(
    bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
) -> Iterator[tuple[Precision, "DeviceProfile"]]:
    yield precision, device
    usable = usable_precisions(bundle.manifest.tower(tower), device)
    for more_exact in _EXACTNESS[_EXACTNESS.index(precision) + 1 :]:
        if more_exact in usable:
            yield more_exact, device
    if device.engine != "onnxruntime-cpu" and "fp32" in bundle.manifest.tower(tower).precisions:
        yield "fp32", device.cpu_profile()
