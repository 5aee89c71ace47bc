"""Slightly altered views of pictures: parts of them, brought back to the full size."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import InputError

# Where a part begins, as shares of what is left over, and its side as a share of the picture's.
# No view is mirrored: that would turn "left of" into "right of".
_CORNERS = ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
_SIDES = (7 / 8, 3 / 4)
_PARTS = tuple((corner, side) for side in _SIDES for corner in _CORNERS)
MOST_VIEWS = len(_PARTS)


def view_pixels(pixels: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Cut `count` parts out of each picture and enlarge them to its size.

    The first five are the corners and the centre at 7/8 of the side, the others at 3/4.

    Args:
        pixels: uint8 [N, size, size, 3], as `preprocess.crop_batch` makes them.
        count: 1 to `MOST_VIEWS`.

    Returns:
        uint8 [count, N, size, size, 3].

    Raises:
        InputError: another shape or dtype, or another count.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
        raise InputError(f"pixels must be uint8 [N, size, size, 3], not {pixels.shape}")
    if not 1 <= count <= MOST_VIEWS:
        raise InputError(f"there are 1 to {MOST_VIEWS} views of a picture, not {count}")
    views = np.empty((count, *pixels.shape), dtype=np.uint8)
    for number, picture in enumerate(map(Image.fromarray, pixels)):
        for view, part in enumerate(_PARTS[:count]):
            views[view, number] = _enlarged(picture, *part)
    return views


def embed_views(
    embed: Callable[[NDArray[np.uint8]], NDArray[Any]], pixels: NDArray[np.uint8], count: int
) -> NDArray[np.float32] | None:
    """Embed the views of pictures; float32 [count, N, dim], or None for no views.

    Args:
        embed: uint8 [M, size, size, 3] -> [M, dim], such as `Encoder.encode_pixels`.
        pixels: uint8 [N, size, size, 3].
        count: how many views; 0 for none.

    Raises:
        InputError: see `view_pixels`.
    """
    if count == 0:
        return None
    views = view_pixels(pixels, count)
    flat = embed(views.reshape(-1, *pixels.shape[1:]))
    return np.asarray(flat, dtype=np.float32).reshape(count, len(pixels), -1)


def _enlarged(picture: Image.Image, corner: Sequence[float], share: float) -> NDArray[np.uint8]:
    """Cut out a square part and resize it to the whole picture's size."""
    left_over = picture.width * (1 - share)
    left, upper = corner[0] * left_over, corner[1] * left_over
    side = picture.width * share
    box = (left, upper, left + side, upper + side)
    return np.asarray(picture.resize(picture.size, Image.Resampling.BICUBIC, box=box))
