"""Preprocess images for the image tower: resize, crop, scale and normalise."""

import math
import re
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.images import Box, DecodedImage, ImageInput, decode_image
from edgeclip.runtime.spec import ImageSpec, Resample

FILTERS: dict[Resample, Image.Resampling] = {
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


def crop_ahead(
    images: Sequence[ImageInput], spec: ImageSpec, *, threads: int, ahead: int
) -> Generator[NDArray[np.uint8] | InputError, None, None]:
    """Yield what `resize_and_crop` gives for each image, or the error that it raised, in order.

    Images are decoded in threads while the caller works on those before them.

    Args:
        images: the images. Opened PIL images are decoded by the calling thread: they cannot be
            read by two at once.
        spec: size and crop.
        threads: how many decode at a time; with 1 an image is decoded when it is asked for.
        ahead: how many may wait to be asked for.
    """

    def crop(image: ImageInput) -> NDArray[np.uint8] | InputError:
        try:
            return resize_and_crop(image, spec)
        except InputError as error:
            return error

    threads = min(threads, len(images))
    if threads < 2:
        yield from map(crop, images)
        return
    with ThreadPoolExecutor(threads, "edgeclip decode") as pool:
        waiting = deque[Callable[[], NDArray[np.uint8] | InputError]]()
        try:
            for image in images:
                if isinstance(image, Image.Image):
                    waiting.append(partial(crop, image))
                else:
                    waiting.append(pool.submit(crop, image).result)
                if len(waiting) > ahead:
                    yield waiting.popleft()()
            while waiting:
                yield waiting.popleft()()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
    width = height = spec.resize
    if not spec.stretch:
        width, height = _resized(*picture.full_size, spec.resize)
    left, upper = (width - spec.size) // 2, (height - spec.size) // 2
    crop = (left, upper, left + spec.size, upper + spec.size)
    resample = FILTERS[spec.resample]
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


def seen_box(width: int, height: int, spec: ImageSpec) -> Box:
    """Return the box of an image of that size, in pixels, that `resize_and_crop` shows the model.

    It lies in the image as (left, upper, right, lower).
    """
    full = (spec.resize, spec.resize) if spec.stretch else _resized(width, height, spec.resize)
    step_x, step_y = width / full[0], height / full[1]
    left, upper = (full[0] - spec.size) // 2, (full[1] - spec.size) // 2
    right, lower = (left + spec.size) * step_x, (upper + spec.size) * step_y
    return left * step_x, upper * step_y, min(right, width), min(lower, height)


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

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_SHORTEST_EDGE: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "do_center_crop": True,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_STRETCH: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "resample": 3,
    "image_mean": _HALF,
    "image_std": _HALF,
}
# What transformers takes for settings that a file leaves out. For a processor that crops, a bare
# "size": 224 means the shortest edge; for the others, a square.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _SHORTEST_EDGE,
    "ChineseCLIP": _SHORTEST_EDGE,
    "Bit": _SHORTEST_EDGE,
    "Siglip": _STRETCH,
    "ViT": _STRETCH | {"resample": 2},
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "do_center_crop": False}
    | {"image_mean": _HALF, "image_std": _HALF, "crop_pct": 224 / 256},
}
_SUFFIX = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$")
_RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic")  # Pillow's numbers
_UNCROPPED = 384  # from this size on, ConvNeXt's processor stretches instead of cropping


def image_spec_from_hugging_face(config: Mapping[str, Any], source: str) -> ImageSpec:
    """Convert the settings of a Hugging Face image processor to an `ImageSpec`.

    Those of CLIP, Chinese-CLIP, SigLIP, ViT, BiT (which DINOv2 uses) and ConvNeXt can be converted.

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
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP")
    family = _SUFFIX.sub("", kind)
    if family not in _PROCESSORS:
        known = ", ".join(_PROCESSORS)
        raise ConfigError(
            f"{source}: its type is {kind}, which cannot be carried to a device: only the image "
            f"processors of {known} can"
        )
    given = {**_PROCESSORS[family], **config}
    if family == "ConvNext":
        given = _as_cropped(given)
    problems = _flag_problems(given)
    crops = bool(given["do_center_crop"])
    resize = _collect(problems, lambda value: _resize(value, crops), given["size"])
    size = None if resize is None else resize[0]
    if crops:
        size = _collect(problems, _square, given.get("crop_size", 224))
    resample = _collect(problems, _resample, given["resample"])
    mean: Triple | None = (0.0, 0.0, 0.0)
    std: Triple | None = (1.0, 1.0, 1.0)
    if given.get("do_normalize", True):
        mean = _collect(problems, _triple, given["image_mean"])
        std = _collect(problems, _triple, given["image_std"])
    if resize and size and resample and mean and std and not problems:
        try:
            return ImageSpec(
                size=size,
                resize=resize[0],
                mean=mean,
                std=std,
                resample=resample,
                stretch=resize[1],
            )
        except ValueError as error:
            problems.append(str(error))
    raise ConfigError(f"{source} cannot be carried to a device: " + "; ".join(problems))


def _as_cropped(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say in the words of the other processors what `size` and `crop_pct` of a ConvNeXt mean."""
    size = config["size"]
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    share = config.get("crop_pct", 224 / 256)
    if not _is_positive_int(edge) or not _is_number(share) or not 0 < share <= 1:
        return {**config}
    if edge >= _UNCROPPED:
        return {**config, "size": {"height": edge, "width": edge}}
    crop = {"do_center_crop": True, "crop_size": edge}
    return {**config, **crop, "size": {"shortest_edge": int(edge / share)}}


def _collect(problems: list[str], read: Callable[[object], T], value: object) -> T | None:
    """Read a value; if it cannot be read, add the reason to `problems` and return None."""
    try:
        return read(value)
    except ValueError as error:
        problems.append(str(error))
        return None


def _flag_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for flag in ("do_resize", "do_rescale"):
        if not config.get(flag, True):
            problems.append(f"{flag} is off, but images of any size must be accepted")
    if config.get("do_normalize", True) is None:  # releases of transformers differ in that
        problems.append("do_normalize is null, which may mean on or off: write true or false")
    for flag in ("do_pad", "use_square_size"):
        if config.get(flag):
            problems.append(f"{flag} is on, which is not supported: images are not padded")
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        problems.append(f"rescale_factor is {factor!r}, not 1/255")
    return problems


def _resize(value: object, crops: bool) -> tuple[int, bool]:
    """Return the side that an image is resized to, and whether it is stretched to a square."""
    if not isinstance(value, Mapping):
        value = {"shortest_edge": value} if crops else {"height": value, "width": value}
    sides = {key: side for key, side in value.items() if side is not None}
    if set(sides) == {"shortest_edge"} and _is_positive_int(sides["shortest_edge"]):
        if not crops:
            raise ValueError(
                f"do_center_crop is off, but with size {value!r} images do not become square"
            )
        return sides["shortest_edge"], False
    is_square = set(sides) == {"height", "width"} and sides["height"] == sides["width"]
    if is_square and _is_positive_int(sides["height"]):
        return sides["height"], True
    raise ValueError(f"size {value!r} is neither one shortest edge nor a square")


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
