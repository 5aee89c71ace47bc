"""The head of a cut tower, which runs on the device."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.engine import Engine, open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.planning.cut_set import CUT_TENSOR, CutSet, head_name
from edgeclip.runtime.tower_feed import Outputs, in_batches, tower_feed

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


class CutHead:
    """The part of a tower before a cut.

    Attributes:
        point: the cut.

    Raises:
        CutSetError: the set has no such cut, or was altered.
        InputError: the device does not allow the precision, or would compute it wrongly.
        EngineError: the engine cannot load the graph; TensorRT's cannot load any.
        MissingExtraError: the engine's package is not installed.
    """

    def __init__(self, cuts: CutSet, number: int, device: "DeviceProfile") -> None:
        self.point = cuts.point(number)
        self._cuts = cuts
        self._most = device.batch_max
        self._engine = open_half(cuts, head_name(number), device) if number else None

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Compute the value at the cut; float32 [N, *point.shape], or the pixels at cut 0.

        Args:
            pixels: uint8 [N, size, size, 3], as `crop_batch` makes them.

        Raises:
            InputError: another shape or dtype.
            EngineError: the engine failed, or gave something else.
        """
        _check_pixels(pixels, self._cuts.manifest.image.size)
        if self._engine is None:
            return pixels
        found = run_half(self._cuts, self._engine, pixels, self._most)[CUT_TENSOR]
        if found.dtype != np.float32 or found.shape[1:] != self.point.shape:
            raise EngineError(
                f"head {self.point.number} of {self._cuts.path} gave {found.dtype} "
                f"{list(found.shape)}: cut the bundle again"
            )
        return found


def tail_model(bundle: str, number: int) -> str:
    """The name of a tail among the server's models."""
    return f"{bundle}-tail-{number}"


def open_half(cuts: CutSet, name: str, device: "DeviceProfile") -> Engine:
    """Load a head or a tail on a device's engine.

    Raises:
        InputError: the device does not allow the precision, or would compute it wrongly.
        EngineError, MissingExtraError: see `open_engine`.
    """
    precision = cuts.manifest.precision
    if precision not in device.precisions or (cuts.manifest.needs_vnni and not device.vnni):
        why = "does not allow" if precision not in device.precisions else "computes wrongly"
        raise InputError(
            f"{cuts.path} is cut in {precision}, which device {device.name!r} {why}: cut the "
            "bundle again with another --precision"
        )
    content = cuts.graph_bytes(name)
    return open_engine(cuts.path / name, device=device, content=content, data_folder=cuts.path)


def run_half(
    cuts: CutSet, engine: Engine, values: NDArray[Any], most: int, *, at_cut: bool = False
) -> Outputs:
    """Run a head on pixels, or a tail on values at the cut, in batches that it takes.

    Raises:
        EngineError: the engine failed.
    """
    manifest = cuts.manifest

    def run(part: NDArray[Any]) -> Outputs:
        if at_cut:
            return engine.run({CUT_TENSOR: part})
        return engine.run(tower_feed(part, manifest.tower, manifest.pixels, manifest.image))

    return in_batches(run, values, static=manifest.batch, most=most)


def _check_pixels(pixels: NDArray[Any], size: int) -> None:
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
        raise InputError(
            f"pixels must be uint8 [N, {size}, {size}, 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    if not len(pixels):
        raise InputError("no pixels were given: a batch needs at least one picture")
