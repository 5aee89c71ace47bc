"""Pictures to measure with where there are no photos: JPEG files that cost what photos cost.

Amplitudes fall with the spatial frequency, as they do in photos (Field, "Relations between the
statistics of natural images and the response properties of cortical cells", JOSA A, 1987), so
that a file is as large, and takes as long to decode, as that of a photo.
"""

import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_WIDTH, _HEIGHT = 640, 480
_COUNT = 4
_QUALITY = 90
_CONTRAST = 50.0  # standard deviation of the levels
_COLOUR = 0.3  # of a channel's own part beside the brightness that all share


@functools.cache
def sample_pictures() -> tuple[bytes, ...]:
    """Four JPEG files of 640 x 480 pixels, always the same."""
    return tuple(map(_picture, range(_COUNT)))


def _picture(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    brightness = _noise(random)
    channels = [brightness + _COLOUR * _noise(random) for _ in range(3)]
    levels = np.clip(128 + _CONTRAST * np.stack(channels, axis=2), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _noise(random: np.random.Generator) -> NDArray[np.float64]:
    """Noise [height, width] of mean 0 and variance 1 whose amplitude is 1 over the frequency."""
    down = np.fft.fftfreq(_HEIGHT)[:, None]
    across = np.fft.rfftfreq(_WIDTH)
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * random.random(frequency.shape))
    noise = np.fft.irfft2(phases / frequency, s=(_HEIGHT, _WIDTH))
    normed: NDArray[np.float64] = (noise - noise.mean()) / noise.std()
    return normed
