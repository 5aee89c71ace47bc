"""The picture itself as what crosses: the file as it is, or cut to size and compressed anew.

A tower looks at `size` x `size` pixels, and a camera's file has many times as many. So what
is sent is first resized on the device as `preprocess` would do it on the server, with the
margin that is cut off there, and only then compressed.
"""

import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image, features

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.load_image import ImageInput
from edgeclip.runtime.preprocess import resize_and_crop
from edgeclip.runtime.spec import ImageSpec

FILE = "file"
IMAGE_CODECS = (FILE, "jpeg-75", "jpeg-90", "webp-80", "webp-lossless")  # worth measuring

_NAME = re.compile(r"(jpeg|webp)-(\d{1,3})")
_LOSSLESS = "webp-lossless"
_WEBP_METHOD = 2  # of 0 to 6: half the time of the customary 4, and a few percent more bytes


def encode_picture(codec: str, picture: ImageInput, spec: ImageSpec) -> bytes:
    """Return what is sent for a picture.

    Args:
        codec: "file" for the bytes of an image file as they are; "jpeg-Q" or "webp-Q" with a
            quality Q from 1 to 100; "webp-lossless".
        picture: see `load_image`.
        spec: what the server's tower takes.

    Raises:
        InputError: an unknown codec, a picture that cannot be loaded, "file" of what is no
            file, or a format that this build of Pillow cannot write.
    """
    options = _options(codec)
    if options is None:
        return _file_bytes(picture)
    # The crop of a square of side `resize` is the crop of the whole picture (to a pixel
    # where resize - size is odd).
    pixels = resize_and_crop(picture, dataclasses.replace(spec, size=spec.resize))
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, **options)
    return written.getvalue()


def check_image_codec(codec: str) -> None:
    """Refuse what is no codec of pictures, or cannot be written here.

    Raises:
        InputError: see `encode_picture`.
    """
    _options(codec)


def _options(codec: str) -> dict[str, Any] | None:
    """What Pillow is told; None where nothing is compressed."""
    if codec == FILE:
        return None
    if codec.startswith("webp") and not features.check("webp"):
        raise InputError(f"this Pillow cannot write WebP, so not {codec}: use jpeg-90")
    if codec == _LOSSLESS:
        return {"format": "WEBP", "lossless": True, "quality": 25, "method": 1}
    match = _NAME.fullmatch(codec)
    quality = int(match[2]) if match else 0
    if match is None or not 1 <= quality <= 100:
        raise InputError(
            f"no picture codec {codec[:40]!r}: use file, jpeg-Q or webp-Q with Q from 1 to 100, or "
            f"{_LOSSLESS}"
        )
    if match[1] == "jpeg":
        return {"format": "JPEG", "quality": quality}
    return {"format": "WEBP", "quality": quality, "method": _WEBP_METHOD}


def _file_bytes(picture: ImageInput) -> bytes:
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | os.PathLike):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {picture}: {error.strerror}") from None
    raise InputError(
        f"codec {FILE} sends image files, not {type(picture).__name__}: use jpeg-90 or webp-80"
    )
