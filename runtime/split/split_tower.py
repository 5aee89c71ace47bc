"""The image tower of a split runtime: a server's, or the device's own where that is of no help."""

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.device_time import DeviceTime, Work
from edgeclip.runtime.split.far_models import FarTower
from edgeclip.runtime.split.pictures import Pictures, typical_file
from edgeclip.runtime.split.reply import Outcome
from edgeclip.runtime.split.server_or_device import ServerOrDevice

FloatArray = NDArray[np.float32]

_WARM_RUNS = 5


class SplitTower:
    """Embeds pictures.

    Making one loads the device's tower and measures it.

    Args:
        encoder: the device's own towers.
        far: the server's.
        chooser: decides whose is used.
        time: what the device's takes.

    Raises:
        BundleError, EngineError, MissingExtraError: the device's tower cannot be loaded.
    """

    def __init__(
        self, encoder: Encoder, far: FarTower, chooser: ServerOrDevice, time: DeviceTime
    ) -> None:
        self._encoder, self._far, self._chooser = encoder, far, chooser
        typical = typical_file() if far.sends_files else None
        size = encoder.spec.image.size
        pixels = np.zeros((1, size, size, 3), np.uint8)
        encoder.encode_pixels(pixels)  # the first run plans memory
        for _ in range(_WARM_RUNS):
            with time.measured("pixels", 1):
                encoder.encode_pixels(pixels)
            if typical is not None:
                with time.measured("file", 1):
                    encoder.encode_image(typical)

    def embed(self, pictures: Pictures, deadline: Deadline, *then: Work) -> Outcome[FloatArray]:
        """Embed pictures; float32 [N, dim].

        Args:
            pictures: any number.
            deadline: of all that has to be done.
            then: what the device has to do with the embeddings.

        Raises:
            InputError: a picture that cannot be loaded.
            EngineError: the device's tower failed.
        """
        is_file = self._far.sends_files and not pictures.is_decoded
        return self._chooser.run(
            lambda until: self._far.embed(pictures, until),
            lambda: self._encoder.encode_pixels(pictures.pixels),
            ("file" if is_file else "pixels", *then),
            len(pictures),
            deadline,
        )
