"""Encode what the device sends to the server: the tensor at a cut, or the picture itself."""

import dataclasses
import io
import math
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from edgeclip.runtime.arrays import FloatArray, Tensors
from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.inputs.images import ImageInput
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.spec import ImageSpec

CodecName = Literal["fp32", "fp16", "int8", "int8-zstd", "uint8", "uint8-zstd"]
Shape = tuple[int, ...]

FLOAT_CODECS: tuple[CodecName, ...] = ("fp32", "fp16", "int8", "int8-zstd")
PIXEL_CODECS: tuple[CodecName, ...] = ("uint8", "uint8-zstd")
CUT_TENSOR, SCALE_TENSOR = "cut", "scale"

# A frame of a few bytes can unpack to a whole tensor: their number bounds the memory.
MAX_FRAMES = 64

_LEVELS = 127
_LARGEST_FP16 = float(np.finfo(np.float16).max)
_ZSTD_LEVEL = 1  # higher ones save less than a percent of such data


def codec_name(text: object) -> CodecName:
    """Return `text` as a codec name, after a check.

    Raises:
        InputError: there is no such codec.
    """
    for name in get_args(CodecName):
        if text == name:
            found: CodecName = name
            return found
    raise InputError(f"no codec {str(text)[:40]!r}: use one of {', '.join(get_args(CodecName))}")


def encode(codec: CodecName, values: NDArray[Any], *, axis: int = -1) -> dict[str, NDArray[Any]]:
    """Encode values at a cut as the tensors that are sent.

    Args:
        codec: float codecs take floats, "uint8" and "uint8-zstd" take pixels.
        values: float32 or uint8 [N, ...].
        axis: the channel axis, for int8; not 0.

    Returns:
        `cut`, as FP32, FP16, INT8 or UINT8 [N, ...], or for zstd as BYTES [N]; for int8 also
        `scale`, float32 [N, channels].

    Raises:
        InputError: values of another dtype, or not finite.
        MissingExtraError: zstandard is not installed.
    """
    wanted = np.uint8 if codec in PIXEL_CODECS else np.float32
    if values.dtype != wanted or values.ndim < 2:
        raise InputError(
            f"codec {codec} takes {np.dtype(wanted)} [N, ...], not {values.dtype} "
            f"{list(values.shape)}"
        )
    if codec in ("fp32", "uint8"):
        return {CUT_TENSOR: values}
    if codec == "uint8-zstd":
        return {CUT_TENSOR: _compress(values)}
    if codec == "fp16":
        return {CUT_TENSOR: values.clip(-_LARGEST_FP16, _LARGEST_FP16).astype(np.float16)}
    quantized, scale = _quantize(values, axis)
    cut = _compress(quantized) if codec == "int8-zstd" else quantized
    return {CUT_TENSOR: cut, SCALE_TENSOR: scale}


def decode(codec: CodecName, tensors: Tensors, *, shape: Shape, axis: int = -1) -> NDArray[Any]:
    """Decode and check tensors that a client sent.

    Args:
        codec: how they were encoded.
        tensors: the result of `encode`.
        shape: shape of one picture's values, without N; nothing larger is ever unpacked, and at
            most `MAX_FRAMES` rows.
        axis: see `encode`.

    Returns:
        float32 [N, *shape], or uint8 for the codecs of pixels. It may be read-only.

    Raises:
        InputError: tensors of another name, dtype or shape, a damaged or oversized frame, or
            values that are not finite.
        MissingExtraError: zstandard is not installed.
    """
    has_scale = codec in ("int8", "int8-zstd")
    names = {CUT_TENSOR, SCALE_TENSOR} if has_scale else {CUT_TENSOR}
    if set(tensors) != names:
        raise InputError(f"codec {codec} takes {', '.join(sorted(names))}, not {_names(tensors)}")
    cut = tensors[CUT_TENSOR]
    if codec in ("int8-zstd", "uint8-zstd"):
        kind = np.int8 if codec == "int8-zstd" else np.uint8
        cut = _decompress(cut, shape, np.dtype(kind))
    _check(cut, _DTYPES[codec], shape, CUT_TENSOR)
    if has_scale:
        return _restored(cut, tensors[SCALE_TENSOR], axis)
    if codec in PIXEL_CODECS:
        return cut
    if not np.isfinite(cut).all():
        raise InputError("the cut tensor holds NaN or infinity")
    return cut.astype(np.float32, copy=False)


_DTYPES: dict[CodecName, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "int8-zstd": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint8-zstd": np.dtype(np.uint8),
}


def _quantize(values: FloatArray, axis: int) -> tuple[NDArray[np.int8], FloatArray]:
    """Return int8 [N, ...] and the scales float32 [N, channels]."""
    channel = axis % values.ndim
    others = tuple(at for at in range(1, values.ndim) if at != channel)
    largest = np.maximum(values.max(axis=others), -values.min(axis=others))
    if not np.isfinite(largest).all():
        raise InputError("the values at the cut are not finite: use another precision")
    # At least the smallest normal float: for a channel of zeros, any scale is right.
    tiny = np.finfo(np.float32).tiny
    scale = np.maximum(largest / np.float32(_LEVELS), tiny, dtype=np.float32)
    quantized = np.rint(values / _along(scale, values.ndim, channel))
    return quantized.clip(-_LEVELS, _LEVELS).astype(np.int8), scale


def _restored(cut: NDArray[np.int8], scale: NDArray[Any], axis: int) -> FloatArray:
    channel = axis % cut.ndim
    _check(scale, np.dtype(np.float32), (cut.shape[channel],), SCALE_TENSOR)
    if len(scale) != len(cut):
        raise InputError(f"{len(cut)} cut tensors came with {len(scale)} rows of scales")
    # The bound keeps 127 times a scale finite.
    if not ((scale > 0) & (scale < np.finfo(np.float32).max / 256)).all():
        raise InputError("a scale is not a positive, finite number")
    found: FloatArray = cut.astype(np.float32) * _along(scale, cut.ndim, channel)
    return found


def _along(scale: FloatArray, axes: int, channel: int) -> FloatArray:
    """Reshape [N, channels] to `axes` axes, to broadcast along the channel axis."""
    shape = [1] * axes
    shape[0], shape[channel] = scale.shape
    return scale.reshape(shape)


def _check(array: NDArray[Any], dtype: np.dtype[Any], shape: Shape, name: str) -> None:
    if array.dtype != dtype or array.shape[1:] != shape or array.ndim == 0 or not len(array):
        sizes = ", ".join(map(str, ("N", *shape)))
        raise InputError(f"{name} must be {dtype} [{sizes}], not {array.dtype} {list(array.shape)}")


def _names(tensors: Tensors) -> str:
    return ", ".join(sorted(name[:40] for name in tensors)[:5]) or "nothing"


def _compress(values: NDArray[Any]) -> NDArray[Any]:
    """Compress each row to a zstd frame; an object array of bytes [N]."""
    packer = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)
    frames = np.empty(len(values), object)
    for number, row in enumerate(values):
        frames[number] = packer.compress(np.ascontiguousarray(row).data)
    return frames


def _decompress(frames: NDArray[Any], shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decompress frames, each of which must declare the size of exactly one row."""
    zstandard = _zstandard()
    if frames.dtype != object or frames.ndim != 1 or not 0 < len(frames) <= MAX_FRAMES:
        raise InputError(
            f"cut must be BYTES [N], N from 1 to {MAX_FRAMES}, not {frames.dtype} "
            f"{list(frames.shape)}"
        )
    size = math.prod(shape) * dtype.itemsize
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**27)
    rows = []
    for frame in frames:
        try:
            declared = zstandard.get_frame_parameters(frame).content_size
            # Without a declared size the package would allocate `max_output_size`.
            if declared != size:
                raise InputError(f"a zstd frame holds {declared} bytes instead of {size}")
            content = unpacker.decompress(frame, max_output_size=size, allow_extra_data=False)
        except (zstandard.ZstdError, TypeError) as error:
            raise InputError(f"a zstd frame is damaged: {error}") from None
        rows.append(np.frombuffer(content, dtype).reshape(shape))
    return np.stack(rows)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError(
            "zstandard is not installed: pip install 'edgeclip[split]', or use another codec"
        ) from error
    return zstandard


FILE = "file"
IMAGE_CODECS = (FILE, "jpeg-75", "jpeg-90", "webp-80", "webp-lossless")  # worth measuring

_NAME = re.compile(r"(jpeg|webp)-(\d{1,3})")
_LOSSLESS = "webp-lossless"
_WEBP_METHOD = 2  # of 0 to 6: half the time of the customary 4, and a few percent more bytes


def encode_picture(codec: str, picture: ImageInput, spec: ImageSpec) -> bytes:
    """Return the bytes to send for a picture.

    Args:
        codec: "file" for the bytes of an image file as they are; "jpeg-Q" or "webp-Q" with a
            quality Q from 1 to 100; "webp-lossless".
        picture: see `load_image`.
        spec: input of the server's tower.

    Raises:
        InputError: an unknown codec, a picture that cannot be loaded, "file" for a picture
            that is not a file, or a format that this build of Pillow cannot write.
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
    """Raise if a codec of pictures is unknown, or cannot be written here.

    Raises:
        InputError: see `encode_picture`.
    """
    _options(codec)


def _options(codec: str) -> dict[str, Any] | None:
    """Return the arguments of `Image.save`; None for codec "file"."""
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
