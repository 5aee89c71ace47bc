"""The smallest student of each family of image towers, for pictures of 64 pixels."""

from edgeclip.compress.students.image_families import ImageFamilyName
from edgeclip.compress.students.student import StudentShape

_SIZES: dict[ImageFamilyName, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "convolutional": ((8, 16), (1, 1)),
    "convnextv2": ((8, 16), (1, 1)),
    "mobilevitv2": ((64,), (1, 1, 1)),
    "swiftformer": ((8, 16), (1, 2)),
    "efficientnet": ((8, 8, 16), (1, 1, 2)),
    "levit": ((32, 32, 64), (1, 1, 1)),
    "multi-scale": ((8, 16, 32), (1, 1, 1)),
}
SHAPES: dict[ImageFamilyName, StudentShape] = {
    name: StudentShape(
        family=name, conv_widths=widths, conv_depths=depths, whole_text=True, image_size=64
    )
    for name, (widths, depths) in _SIZES.items()
}
