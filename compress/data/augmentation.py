"""Make augmented views of pictures as the pixels that a model sees."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.inputs.preprocess import FILTERS, resize_and_crop, seen_box
from edgeclip.runtime.spec import ImageSpec

# The share of each channel in the brightness that the eye sees: ITU-R BT.601, as Pillow's "L".
_GREY = np.array((0.299, 0.587, 0.114))
_LEVELS = np.arange(256)
# A view that is less than half as large is first reduced by a whole number, which saves more than
# half of the time of resizing, and makes pixels 0.9 of 255 levels other on average, far less than
# the change of colours does. The unchanged picture is never reduced so.
_REDUCING_GAP = 1.5
_BLOCKS = 4  # a decoded picture, what it is resized by and to, and one more


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Settings of mild crops and colour changes; no flips, since captions say left and right.

    Args:
        crop: the smallest share of each side that a random crop keeps, in (0, 1].
        colour: the largest relative change of brightness, contrast and saturation, in [0, 1).
        seed: another seed gives other views.
    """

    crop: float = 0.9
    colour: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1 or not 0 <= self.colour < 1:
            raise ValueError(f"need 0 < crop <= 1 and 0 <= colour < 1, got {self}")


def keep_picture_memory(blocks: int = _BLOCKS) -> None:
    """Let Pillow keep the memory of some pictures for the next ones, at most 16 MB a block.

    Without it each picture asks the system for fresh pages, which takes 4 to 7% of the time from a
    JPEG file to a view. Called once in each process that makes views; 0 blocks undo it. It is what
    Pillow's variable PILLOW_BLOCKS_MAX does before a process begins.
    """
    Image.core.set_blocks_max(blocks)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _View:
    """A crop in shares of the sides, and factors of brightness, contrast and saturation."""

    left: float
    top: float
    width: float
    height: float
    factors: tuple[float, float, float]


def view_crop(
    image: Image.Image,
    spec: ImageSpec,
    augmentation: Augmentation,
    *,
    picture_seed: int,
    view: int,
) -> NDArray[np.uint8]:
    """Return view number `view` of a picture as a model of `spec` sees it: uint8 [size, size, 3].

    View 0 is `resize_and_crop`. Any other takes the place of the picture by a crop of it, stretched
    to its sides, of which the model sees what it would see of the picture. Crop and resizing are
    one step, the colours of the small result are changed in a second. Models of other resolutions
    see the same view.

    Args:
        image: the picture, RGB.
        spec: the model's preprocessing.
        augmentation: the settings.
        picture_seed: makes the views of one picture differ from another's, see `seed_of`.
        view: number of the view, 0 or more.
    """
    if view == 0:
        return resize_and_crop(image, spec)
    drawn = _draw(augmentation, picture_seed, view)
    left, top, right, bottom = seen_box(*image.size, spec)
    width, height = image.size
    box = (
        width * drawn.left + left * drawn.width,
        height * drawn.top + top * drawn.height,
        # Rounding must not move the box over the edge: Pillow refuses that.
        min(width * drawn.left + right * drawn.width, width),
        min(height * drawn.top + bottom * drawn.height, height),
    )
    small = image.resize(
        (spec.size, spec.size), FILTERS[spec.resample], box=box, reducing_gap=_REDUCING_GAP
    )
    return np.asarray(_recoloured(small, drawn.factors))


def _draw(augmentation: Augmentation, picture_seed: int, view: int) -> _View:
    rng = np.random.default_rng(np.random.SeedSequence((augmentation.seed, picture_seed, view)))
    width, height = rng.uniform(augmentation.crop, 1.0, 2).tolist()
    left, top = (float(rng.uniform(0, 1 - side)) for side in (width, height))
    least, most = 1 - augmentation.colour, 1 + augmentation.colour
    brightness, contrast, saturation = rng.uniform(least, most, 3).tolist()
    return _View(left, top, width, height, (brightness, contrast, saturation))


def _recoloured(image: Image.Image, factors: tuple[float, float, float]) -> Image.Image:
    """Change brightness, then contrast about the mean grey, then saturation about each grey.

    All three are affine in a pixel's channels, so they are one matrix, rounded and clipped once.
    """
    brightness, contrast, saturation = factors
    if factors == (1.0, 1.0, 1.0):
        return image
    channels = np.asarray(image.histogram(), np.float64).reshape(3, 256)
    mean = float(_GREY @ (channels @ _LEVELS)) / (image.width * image.height)
    mixed = saturation * np.eye(3) + (1 - saturation) * _GREY
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * mixed
    matrix[:, 3] = (1 - contrast) * brightness * mean
    return image.convert("RGB", tuple(matrix.ravel().tolist()))
