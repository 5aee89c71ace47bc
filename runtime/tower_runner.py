"""One tower of a bundle in one precision, loaded; what comes out of it is checked."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.embeddings import check_unit_rows
from edgeclip.runtime.engine import open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.spec import INPUT_NAMES, OUTPUT_NAMES, Precision, Tower

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


class TowerRunner:
    """Runs one tower.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
        EngineError: the engine cannot load it.
        MissingExtraError: the engine's package is not installed.
    """

    def __init__(
        self, bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
    ) -> None:
        self._path = bundle.tower_path(tower, precision)
        self._dim = bundle.manifest.spec.dim
        self._given, self._wanted = INPUT_NAMES[tower], OUTPUT_NAMES[tower]
        content = bundle.tower_bytes(tower, precision)
        self._engine = open_engine(self._path, device=device, content=content)

    def run(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Embed one batch of inputs [N, ...]; float32 [N, dim].

        Raises:
            EngineError: the engine failed, or gave another shape or dtype, NaN, or
                embeddings whose length is not 1.
        """
        outputs = self._engine.run({self._given: values})
        found = outputs.get(self._wanted)
        if found is None:
            raise EngineError(f"{self._path} has no output {self._wanted}: export the bundle anew")
        expected = (len(values), self._dim)
        if found.shape != expected or found.dtype != np.float32:
            raise EngineError(
                f"{self._path} gave {found.dtype} {list(found.shape)} instead of float32 "
                f"{list(expected)}: export the bundle anew"
            )
        try:
            check_unit_rows(found, f"the output of {self._path}")
        except InputError as error:
            raise EngineError(f"{error}; or use another precision") from error
        return found
