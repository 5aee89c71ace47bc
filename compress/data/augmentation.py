"""Augment training pictures, reproducibly, without making their captions wrong."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance


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


def augment(
    image: Image.Image, augmentation: Augmentation, *, index: int, view: int
) -> Image.Image:
    """Return view number `view` of picture `index`; view 0 is the unchanged picture."""
    if view == 0:
        return image
    rng = np.random.default_rng(np.random.SeedSequence((augmentation.seed, index, view)))
    width, height = (side * float(rng.uniform(augmentation.crop, 1.0)) for side in image.size)
    left = float(rng.uniform(0, image.width - width))
    top = float(rng.uniform(0, image.height - height))
    changed = image.resize(
        image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        factor = rng.uniform(1 - augmentation.colour, 1 + augmentation.colour)
        changed = enhance(changed).enhance(float(factor))
    return changed
