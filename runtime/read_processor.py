"""A Hugging Face preprocessor_config.json as an `ImageSpec`.

Only processors with CLIP's meaning are read: resize the shortest edge, crop the centre,
scale by 1/255, normalise. What an `ImageSpec` cannot say is refused, never approximated.
Defaults are those of transformers' CLIPImageProcessor.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import ImageSpec, Resample

T = TypeVar("T")
Triple = tuple[float, float, float]

# "size": 224 means the shortest edge to these, and a square to most others.
_CLIP_PROCESSORS = (
    *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    *("CLIPFeatureExtractor", "ChineseCLIPImageProcessor", "ChineseCLIPFeatureExtractor"),
)
_RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic")  # Pillow's numbers
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_spec_from_hugging_face(config: Mapping[str, Any], source: str) -> ImageSpec:
    """Read the settings of a CLIP image processor.

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
    """Read a value, or note why it cannot be read."""
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
            problems.append(f"{flag} is off, but pictures of any size must be taken")
    if config.get("do_pad"):
        problems.append("do_pad is on, but padding is not supported")
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
