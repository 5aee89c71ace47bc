"""One tower of a bundle in one precision, loaded; what comes out of it is checked."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.embeddings import check_unit_rows
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.open_tower import open_tower
from edgeclip.runtime.spec import OUTPUT_NAMES, Precision, Tower
from edgeclip.runtime.tower_feed import Outputs, in_batches, tower_feed

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


class TowerRunner:
    """Runs one tower.

    Batches are cut to what the device and the graph take. A graph made for one batch size
    is given the last row again where rows are missing.

    Attributes:
        precision: the one that runs.
        device: the device that runs it.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
        EngineError: the engine cannot load it.
        MissingExtraError: the engine's package is not installed.
    """

    def __init__(
        self, bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
    ) -> None:
        file = bundle.manifest.tower(tower).file(precision)
        self.precision: Precision = precision
        self.device = device
        self._tower: Tower = tower
        self._path = bundle.tower_path(tower, precision)
        self._spec = bundle.manifest.spec
        self._pixels = file.pixels
        self._batch = file.batch
        self._most = device.batch_max
        self._engine = open_tower(bundle, tower, precision, device)

    def run(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Embed inputs; float32 [N, dim].

        Args:
            values: uint8 [N, size, size, 3] for an image tower (see `crop_batch`), token ids
                int64 [N, length] for a text tower.

        Raises:
            EngineError: the engine failed, or gave another shape or dtype, NaN, or
                embeddings whose length is not 1.
        """
        found: NDArray[np.float32] = self.outputs(values)[OUTPUT_NAMES[self._tower]]
        return found

    def outputs(self, values: NDArray[Any]) -> Outputs:
        """Return all that the graph gives: embeddings, and what its heads compute.

        Raises:
            EngineError: see `run`.
        """
        found = in_batches(self._run, values, static=self._batch, most=self._most)
        self._check(found.get(OUTPUT_NAMES[self._tower]), len(values))
        return found

    def _run(self, values: NDArray[Any]) -> Outputs:
        return self._engine.run(tower_feed(values, self._tower, self._pixels, self._spec.image))

    def _check(self, found: NDArray[Any] | None, count: int) -> None:
        if found is None:
            name = OUTPUT_NAMES[self._tower]
            raise EngineError(f"{self._path} has no output {name}: export the bundle anew")
        expected = (count, self._spec.dim)
        if found.shape != expected or found.dtype != np.float32:
            raise EngineError(
                f"{self._path} gave {found.dtype} {list(found.shape)} instead of float32 "
                f"{list(expected)}: export the bundle anew"
            )
        try:
            check_unit_rows(found, f"the output of {self._path}")
        except InputError as error:
            raise EngineError(f"{error}; or use another precision") from error
