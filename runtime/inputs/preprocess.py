"""Preprocess images for the image tower: resize, crop, scale and normalise."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.images import Box, DecodedImage, ImageInput, decode_image
from edgeclip.runtime.spec import ImageSpec, Resample

_FILTERS: dict[Resample, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Beyond this aspect ratio only the crop is resized: nearly all of the rest would be cut away.
_STRIP = 32


def preprocess(image: ImageInput, spec: ImageSpec) -> NDArray[np.float32]:
    """Preprocess one image to float32 [3, size, size], normalised by the spec.

    Raises:
        InputError: the image cannot be loaded, see `load_image`.
    """
    normalised: NDArray[np.float32] = normalise(resize_and_crop(image, spec)[None], spec)[0]
    return normalised


def preprocess_batch(
    images: Sequence[ImageInput], spec: ImageSpec, *, first: int = 0
) -> NDArray[np.float32]:
    """Preprocess images to float32 [N, 3, size, size].

    Raises:
        InputError: see `crop_batch`.
    """
    return normalise(crop_batch(images, spec, first=first), spec)


def crop_batch(
    images: Sequence[ImageInput], spec: ImageSpec, *, first: int = 0
) -> NDArray[np.uint8]:
    """Resize and crop images to uint8 [N, size, size, 3] (RGB), not normalised.

    `first` is the number of the first image in a longer list, for the messages.

    Raises:
        InputError: no images, one image in place of a list, or one that cannot be loaded
            (the message says which, counted from `first`).
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
    """Load, resize and crop one image to uint8 [size, size, 3] (RGB), not normalised.

    Raises:
        InputError: the image cannot be loaded, see `load_image`.
    """
    picture = decode_image(image, min_side=spec.resize)
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
    picture: DecodedImage, resized: tuple[int, int], crop: tuple[int, int, int, int]
) -> Box:
    """Return the box of `picture.image` that becomes `crop` of the resized image."""
    first_x, first_y, last_x, last_y = picture.region
    step_x, step_y = (last_x - first_x) / resized[0], (last_y - first_y) / resized[1]
    left, upper, right, lower = crop
    return (
        first_x + left * step_x,
        first_y + upper * step_y,
        # Rounding must not move the box over the edge: Pillow refuses that.
        min(first_x + right * step_x, picture.image.width),
        min(first_y + lower * step_y, picture.image.height),
    )


def _resized(width: int, height: int, shortest: int) -> tuple[int, int]:
    """Return (width, height) scaled to a shortest edge of `shortest`, the other rounded down."""
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def normalise(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Normalise uint8 [N, size, size, 3] to the usual input, float32 [N, 3, size, size]."""
    mean = np.asarray(spec.mean, dtype=np.float32)
    std = np.asarray(spec.std, dtype=np.float32)
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    normalised: NDArray[np.float32] = (scaled - mean) / std
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


T = TypeVar("T")
Triple = tuple[float, float, float]

# The image processors for which "size": 224 means the shortest edge; for most others, a square.
_CLIP_PROCESSORS = (
    *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    *("CLIPFeatureExtractor", "ChineseCLIPImageProcessor", "ChineseCLIPFeatureExtractor"),
)
_RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic")  # Pillow's numbers
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_spec_from_hugging_face(config: Mapping[str, Any], source: str) -> ImageSpec:
    """Convert the settings of a Hugging Face CLIP image processor to an `ImageSpec`.

    Args:
        config: the parsed preprocessor_config.json, or a processor_config.json that holds
            it under `image_processor`.
        source: where it came from, for the message.

    Raises:
        ConfigError: one message that lists everything an `ImageSpec` cannot represent.
    """
    nested = config.get("image_processor")
    if isinstance(nested, Mapping):
        config = nested
    problems = _flag_problems(config)
    resize = _collect(problems, _shortest_edge, config.get("size", 224))
    size = _collect(problems, _square, config.get("crop_size", 224))
    resample = _collect(problems, _resample, config.get("resample", 3))
    mean: Triple | None = (0.0, 0.0, 0.0)
    std: Triple | None = (1.0, 1.0, 1.0)
    if config.get("do_normalize", True):
        mean = _collect(problems, _triple, config.get("image_mean", _CLIP_MEAN))
        std = _collect(problems, _triple, config.get("image_std", _CLIP_STD))
    if resize and size and resample and mean and std and not problems:
        try:
            return ImageSpec(size=size, resize=resize, mean=mean, std=std, resample=resample)
        except ValueError as error:
            problems.append(str(error))
    raise ConfigError(f"{source} is not a CLIP image processor's: " + "; ".join(problems))


def _collect(problems: list[str], read: Callable[[object], T], value: object) -> T | None:
    """Read a value; if it cannot be read, add the reason to `problems` and return None."""
    try:
        return read(value)
    except ValueError as error:
        problems.append(str(error))
        return None


def _flag_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    kind = config.get("image_processor_type", config.get("feature_extractor_type"))
    if kind is not None and kind not in _CLIP_PROCESSORS:
        problems.append(f"its type is {kind}")
    for flag in ("do_resize", "do_center_crop", "do_rescale"):
        if not config.get(flag, True):
            problems.append(f"{flag} is off, but images of any size must be accepted")
    if config.get("do_normalize", True) is None:  # releases of transformers differ in that
        problems.append("do_normalize is null, which may mean on or off: write true or false")
    for flag in ("do_pad", "use_square_size"):
        if config.get(flag):
            problems.append(f"{flag} is on, but neither padding nor stretching is supported")
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        problems.append(f"rescale_factor is {factor!r}, not 1/255")
    return problems


def _shortest_edge(value: object) -> int:
    size = value
    if isinstance(value, Mapping):
        given = {key: side for key, side in value.items() if side is not None}
        size = given["shortest_edge"] if set(given) == {"shortest_edge"} else None
    if not _is_positive_int(size):
        raise ValueError(
            f"size {value!r} is not one shortest edge (a fixed height and width would stretch)"
        )
    return size


def _square(value: object) -> int:
    size = value
    if isinstance(value, Mapping):
        given = {key: side for key, side in value.items() if side is not None}
        square = set(given) == {"height", "width"} and given["height"] == given["width"]
        size = given["height"] if square else None
    if not _is_positive_int(size):
        raise ValueError(f"crop_size {value!r} is not a square")
    return size


def _resample(value: object) -> Resample:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(_RESAMPLE):
        names = ", ".join(f"{number} {name}" for number, name in enumerate(_RESAMPLE))
        raise ValueError(f"resample {value!r} is none of {names}")
    return _RESAMPLE[value]


def _triple(value: object) -> Triple:
    if isinstance(value, list | tuple) and len(value) == 3:
        first, second, third = value
        if _is_number(first) and _is_number(second) and _is_number(third):
            return float(first), float(second), float(third)
    raise ValueError(f"image_mean and image_std must be three numbers each, not {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
