"""The pictures of one call: decoded once at most, whoever needs their pixels first."""

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.load_image import ImageInput, list_of_images
from edgeclip.runtime.preprocess import crop_batch
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.wire.codec_image import FILE, encode_picture

_OTHERWISE = "jpeg-90"  # where codec "file" has no file, or too large a one
# A larger file costs more to send than to cut to size, and the device needs long to decode it
# when the server has let it down.
_LARGEST_FILE = 1 << 18  # bytes
_MOST_PIXELS = 1 << 20
_FORMATS = ("JPEG", "PNG", "WEBP")  # what servers take


class Pictures:
    """Pictures as a caller gave them.

    Args:
        images: see `Encoder.encode_image`.
        spec: what the tower takes.
        pixels: uint8 [N, size, size, 3] where they are there already; `images` are rows of
            it then.
    """

    def __init__(
        self,
        images: ImageInput | Sequence[ImageInput],
        spec: ImageSpec,
        pixels: NDArray[np.uint8] | None = None,
    ) -> None:
        self._images, self._spec = list_of_images(images), spec
        if pixels is not None:
            self.pixels = pixels

    def __len__(self) -> int:
        return len(self._images)

    @functools.cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The pictures resized and cut; uint8 [N, size, size, 3].

        Raises:
            InputError: one that cannot be loaded.
        """
        if not self._images:
            return np.zeros((0, self._spec.size, self._spec.size, 3), np.uint8)
        return crop_batch(self._images, self._spec)

    @property
    def is_decoded(self) -> bool:
        """Whether `pixels` costs nothing."""
        return "pixels" in self.__dict__

    def some(self, rows: NDArray[np.intp]) -> "Pictures":
        """Those of the given numbers."""
        images = [self._images[row] for row in rows]
        return Pictures(images, self._spec, self.pixels[rows] if self.is_decoded else None)

    def compressed(self, codec: str) -> list[bytes]:
        """The bytes to send for each picture.

        Codec "file" sends small JPEG, PNG and WebP files as they are, with all they hold, such
        as where a photo was taken; other pictures are cut to size first.

        Raises:
            InputError: see `codec_image.encode_picture`.
        """
        return [self._compressed(codec, number) for number in range(len(self))]

    def _compressed(self, codec: str, number: int) -> bytes:
        if codec == FILE:
            content = _small_file(self._images[number])
            if content is not None:
                return content
            codec = _OTHERWISE
        # Where nothing but the crop remains after resizing, the pixels need not be made twice.
        is_whole = self._spec.resize == self._spec.size
        picture = self.pixels[number] if is_whole else self._images[number]
        return encode_picture(codec, picture, self._spec)


def is_pictures(query: Any) -> bool:
    """Whether a query is one picture or several, and not texts or embeddings.

    As for `Encoder.search`: a `str` is a text, and a float array of two dimensions holds
    embeddings.
    """
    if isinstance(query, np.ndarray):
        return not (query.ndim == 2 and query.dtype.kind == "f")
    items = list_of_images(query) if not isinstance(query, str) else [query]
    return bool(items) and not any(isinstance(item, str) for item in items)


def typical_file() -> bytes:
    """A JPEG file as large as one that is sent as it is may be, to measure its decoding with."""
    side = int(_MOST_PIXELS**0.5)
    colours = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(colours).resize((side, side)).save(written, "JPEG")
    return written.getvalue()


def _small_file(image: ImageInput) -> bytes | None:
    """The content of an image file that may be sent as it is; None for anything else."""
    try:
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            if path.stat().st_size > _LARGEST_FILE:
                return None
            image = path.read_bytes()
        if not isinstance(image, bytes) or len(image) > _LARGEST_FILE:
            return None
        with Image.open(io.BytesIO(image), formats=_FORMATS) as header:
            return image if header.width * header.height <= _MOST_PIXELS else None
    except Exception:  # damaged, or of another format: decoding it says what is wrong
        return None
