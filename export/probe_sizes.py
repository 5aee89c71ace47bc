"""At which sizes pieces are probed: those of students, a few points of each."""

from edgeclip.export.probe_plan import (
    PROBE_DIM,
    ConvPoint,
    ImagePoint,
    ProbePlan,
    TextPoint,
    probe_transformer,
)
from edgeclip.runtime.predicting.tower_pieces import ConvTower, image_tokens

_WIDTHS = (64, 128, 256, 512)
_PICTURES = ((64, 16), (64, 8), (224, 14))  # 17, 65 and 257 tokens
_FEW_IMAGES = ((128, 8), (512, 8), (256, 14))

STANDARD = ProbePlan(
    images=tuple(
        ImagePoint(width=width, image_size=size, patch=patch, few=(width, patch) in _FEW_IMAGES)
        for size, patch in _PICTURES
        for width in _WIDTHS
    ),
    stems=(
        ImagePoint(width=128, image_size=224, patch=32),
        ImagePoint(width=512, image_size=224, patch=32),
        ImagePoint(width=256, image_size=224, patch=16),
    ),
    gelus=(
        ImagePoint(width=128, image_size=64, patch=8),
        ImagePoint(width=256, image_size=64, patch=8),
    ),
    texts=tuple(TextPoint(width=width, lengths=(8, 24, 77), few=width == 256) for width in _WIDTHS),
    convs=(
        ConvPoint(width=32, side=16, next=64),
        ConvPoint(width=32, side=56, next=64),
        ConvPoint(width=64, side=8, next=128, few=True),
        ConvPoint(width=64, side=28, next=128),
        ConvPoint(width=128, side=4),
        ConvPoint(width=128, side=14),
        ConvPoint(width=128, side=28, next=256),
        ConvPoint(width=256, side=4),
        ConvPoint(width=256, side=14, next=512, few=True),
        ConvPoint(width=512, side=7),
    ),
    checks=(
        (probe_transformer("image", 192, 6, image_tokens(224, 32), patch=32), True),
        (probe_transformer("image", 384, 4, image_tokens(128, 16), patch=16), False),
        (probe_transformer("image", 320, 3, image_tokens(224, 14), patch=14), False),
        (probe_transformer("text", 192, 4, 16), True),
        (probe_transformer("text", 384, 6, 12), False),
        (ConvTower(widths=(48, 96, 192), depths=(2, 2, 4), image_size=64, dim=PROBE_DIM), True),
        (ConvTower(widths=(40, 80, 160), depths=(2, 2, 6), image_size=128, dim=PROBE_DIM), False),
        (ConvTower(widths=(64, 128, 256), depths=(1, 2, 3), image_size=224, dim=PROBE_DIM), False),
    ),
)
# For tests: it tells little, in seconds.
SMALL = ProbePlan(
    images=(
        ImagePoint(width=64, image_size=32, patch=8, few=True),
        ImagePoint(width=128, image_size=32, patch=8, few=True),
    ),
    texts=(TextPoint(width=64, lengths=(8, 16)),),
    convs=(ConvPoint(width=16, side=8, next=32),),
    checks=((probe_transformer("image", 64, 4, image_tokens(32, 8), patch=8), True),),
)
PLANS = {"standard": STANDARD, "small": SMALL}
