"""Pictures to the image tower's input: resize, centre crop, scale, normalise.

The one definition of preprocessing, agreeing with Hugging Face's CLIPImageProcessor (its
Pillow backend) bit for bit in the resized pixels, except where said below: the shortest
edge becomes `resize`, the longer one is rounded down, and the crop starts at half of what
is left over, rounded down.

Resizing the crop alone (`box=`) would save a quarter of the work on a 4:3 picture, but
Pillow chooses by size whether rows or columns go first, and on sharp pictures the two
orders differ by whole levels where the filter overshoots. So only strips, which would
grow huge, are resized that way. A large JPEG is reduced while decoding (`load_image`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.load_image import Box, ImageInput, Picture, load_picture
from edgeclip.runtime.spec import ImageSpec, Resample

_FILTERS: dict[Resample, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


# Beyond this ratio of the sides nearly all of a resized picture would be cut away.
_STRIP = 32


def preprocess(image: ImageInput, spec: ImageSpec) -> NDArray[np.float32]:
    """Turn one picture into float32 [3, size, size], normalised by the spec.

    Raises:
        InputError: the picture cannot be loaded, see `load_image`.
    """
    normalised: NDArray[np.float32] = normalise(resize_and_crop(image, spec)[None], spec)[0]
    return normalised


def preprocess_batch(
    images: Sequence[ImageInput], spec: ImageSpec, *, first: int = 0
) -> NDArray[np.float32]:
    """Turn pictures into float32 [N, 3, size, size].

    Raises:
        InputError: see `crop_batch`.
    """
    return normalise(crop_batch(images, spec, first=first), spec)


def crop_batch(
    images: Sequence[ImageInput], spec: ImageSpec, *, first: int = 0
) -> NDArray[np.uint8]:
    """Turn pictures into uint8 [N, size, size, 3] (RGB): resized and cut, not normalised.

    `first` is the number of the first picture in a longer list, for the messages.

    Raises:
        InputError: no pictures, one picture in place of a list, or one that cannot be
            loaded (the message says which, counted from `first`).
    """
    if _is_single(images):
        raise InputError("a batch is a list of images: put the one image into a list")
    if len(images) == 0:
        raise InputError("no images were given: a batch needs at least one")
    pixels = np.empty((len(images), spec.size, spec.size, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        try:
            pixels[number] = resize_and_crop(image, spec)
        except InputError as error:
            raise InputError(f"image {first + number}: {error}") from error
    return pixels


def _is_single(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, str | bytes | bytearray | Path | Image.Image)


def resize_and_crop(image: ImageInput, spec: ImageSpec) -> NDArray[np.uint8]:
    """Load, resize and crop one picture to uint8 [size, size, 3] (RGB), not normalised.

    Raises:
        InputError: the picture cannot be loaded, see `load_image`.
    """
    picture = load_picture(image, min_side=spec.resize)
    width, height = _resized(*picture.full_size, spec.resize)
    left, upper = (width - spec.size) // 2, (height - spec.size) // 2
    crop = (left, upper, left + spec.size, upper + spec.size)
    resample = _FILTERS[spec.resample]
    if max(width, height) > _STRIP * spec.resize:
        box = _box_of_crop(picture, (width, height), crop)
        return np.asarray(picture.image.resize((spec.size, spec.size), resample, box=box))
    resized = picture.image.resize((width, height), resample, box=picture.region)
    return np.asarray(resized.crop(crop))


def _box_of_crop(
    picture: Picture, resized: tuple[int, int], crop: tuple[int, int, int, int]
) -> Box:
    """Return the part of `picture.image` that `crop` of the resized picture shows."""
    first_x, first_y, last_x, last_y = picture.region
    step_x, step_y = (last_x - first_x) / resized[0], (last_y - first_y) / resized[1]
    left, upper, right, lower = crop
    return (
        first_x + left * step_x,
        first_y + upper * step_y,
        # Rounding must not carry the box over the edge: Pillow refuses that.
        min(first_x + right * step_x, picture.image.width),
        min(first_y + lower * step_y, picture.image.height),
    )


def _resized(width: int, height: int, shortest: int) -> tuple[int, int]:
    """Return width and height once the shortest edge is `shortest`, the other rounded down."""
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def normalise(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Turn uint8 [N, size, size, 3] into the customary input, float32 [N, 3, size, size]."""
    mean = np.asarray(spec.mean, dtype=np.float32)
    std = np.asarray(spec.std, dtype=np.float32)
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    normalised: NDArray[np.float32] = (scaled - mean) / std
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
