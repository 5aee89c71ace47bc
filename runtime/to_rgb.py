"""Any pixel layout to 8-bit RGB: the modes of Pillow and the shapes of numpy arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import InputError

_SIXTEEN_BIT_STEP = 257  # 65535 / 255
# A float picture that was resampled overshoots [0, 1] a little; more is a mistake.
_OVERSHOOT = 1e-3


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded picture of any Pillow mode to RGB.

    Transparency, whether a channel, a palette entry or a key colour, is laid over white:
    cut-out pictures (products, logos, glyphs) are meant for a light page, and the colour
    stored under transparent pixels is arbitrary, often black. 16-bit grey is scaled by
    255/65535, never clipped. Colour profiles are not applied, as in CLIP's own processor.

    Raises:
        InputError: grey values beyond 16 bits, or floats outside [0, 1].
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _from_array(_sixteen_to_eight(np.asarray(image)))
    if image.mode == "I":
        return _from_array(_grey_of_integers(np.asarray(image)))
    if image.mode == "F":
        return _from_array(_float_to_eight(np.asarray(image)))
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def array_to_rgb(array: NDArray[Any]) -> Image.Image:
    """Convert an array to an RGB picture.

    Args:
        array: [height, width] or [height, width, channels] with 1 (grey), 3 (RGB) or 4
            (RGBA) channels; uint8, uint16, or float in [0, 1].

    Raises:
        InputError: another shape or dtype, an empty array, NaN or infinity, or floats
            outside [0, 1].
    """
    _check_shape(array.shape)
    if array.dtype == np.uint8:
        eight = array
    elif array.dtype == np.uint16:
        eight = _sixteen_to_eight(array)
    elif array.dtype.kind == "f":
        eight = _float_to_eight(array)
    else:
        raise InputError(
            f"an image array has dtype {array.dtype}: "
            "convert it to uint8, uint16, or float in [0, 1]"
        )
    if eight.ndim == 3 and eight.shape[2] == 1:
        eight = eight[:, :, 0]
    return image_to_rgb(_from_array(eight))


def _check_shape(shape: tuple[int, ...]) -> None:
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if not fits:
        message = (
            f"an image array has shape {shape}: "
            "give [height, width] or [height, width, 1, 3 or 4 channels]"
        )
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            message += "; channels come first here, so use array.transpose(1, 2, 0)"
        elif len(shape) == 4:
            message += "; this looks like a batch, so pass its images as a list"
        raise InputError(message)
    if 0 in shape:
        raise InputError(f"an image array is empty, shape {shape}: give at least one pixel")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    """Make a picture of uint8 grey, RGB or RGBA; grey becomes RGB, alpha stays."""
    image = Image.fromarray(np.ascontiguousarray(array))
    return image.convert("RGB") if image.mode == "L" else image


def _sixteen_to_eight(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, rounding to the nearest."""
    wide = array.astype(np.uint32)
    return ((wide + _SIXTEEN_BIT_STEP // 2) // _SIXTEEN_BIT_STEP).astype(np.uint8)


def _grey_of_integers(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Pillow's mode I is how 16-bit grey arrives from PGM and some TIFF files."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise InputError(
            f"integer grey values span {low} to {high}: scale them to 16 bits, 0 to 65535"
        )
    return _sixteen_to_eight(array)


def _float_to_eight(array: NDArray[Any]) -> NDArray[np.uint8]:
    if not np.isfinite(array).all():
        raise InputError("an image holds NaN or infinity: replace them before encoding")
    low, high = float(array.min()), float(array.max())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        mend = "divide by 255" if low >= 0 and high <= 255 else "scale them to [0, 1]"
        raise InputError(
            f"float pixels span {low:.6g} to {high:.6g}, but must lie in [0, 1]: {mend}"
        )
    rounded = np.rint(np.clip(array, 0, 1).astype(np.float32) * 255)
    eight: NDArray[np.uint8] = rounded.astype(np.uint8)
    return eight


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey converts only to LA
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")
