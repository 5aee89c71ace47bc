"""What runs a tower when the engine that was meant to computes it wrongly."""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import usable_precisions
from edgeclip.runtime.errors import EngineParityError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile

OpenRunner = Callable[[Bundle, Tower, Precision, "DeviceProfile"], TowerRunner]

_EXACTNESS: tuple[Precision, ...] = ("fp8", "int8", "fp16", "fp32")


def open_or_fall_back(
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
        yield "fp32", device.on_its_cpu()
