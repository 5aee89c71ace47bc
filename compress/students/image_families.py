"""Families of image towers that begin with random weights, made from a few sizes.

Each is made by transformers' own code from a configuration, without anybody's weights or licence.
`IMAGE_FAMILIES` says what the sizes of a family mean and which are usual.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextV2Config,
    EfficientNetConfig,
    LevitConfig,
    MobileViTV2Config,
    PreTrainedModel,
    SwiftFormerConfig,
)

from edgeclip.compress.teachers.mixed_towers import tower_of
from edgeclip.compress.teachers.multi_scale import MultiScaleConfig
from edgeclip.runtime.errors import ConfigError

ImageFamilyName = Literal[
    "convolutional",
    "convnextv2",
    "mobilevitv2",
    "swiftformer",
    "efficientnet",
    "levit",
    "multi-scale",
]
Sizes = tuple[int, ...]
_PATCH = 4  # side of the patches that a ConvNeXt, its kin and a SwiftFormer begin with
_LEVIT_PATCH, _LEVIT_LEAST = 16, 4  # its four convolutions of stride 2, and what they must leave


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFamily:
    """A family of image towers.

    Attributes:
        title: its name, and its paper.
        widths, depths: the usual sizes, for pictures of 64 pixels.
        config: makes transformers' configuration of widths, depths and the side of a picture in
            pixels, with the width that the tower pools as `hidden_size`.
        stages: the least and the most widths; there are as many depths.
        fewest: blocks of a stage, at least.
        whole: what each width must be a multiple of.
        fresh: draw weights as torch does: transformers begins with norms of nearly 0.
    """

    title: str
    widths: Sizes
    depths: Sizes
    config: Callable[[Sizes, Sizes, int], Any]
    stages: tuple[int, int] = (1, 8)
    fewest: int = 1
    whole: int = 1
    fresh: bool = False


def image_tower(
    name: ImageFamilyName,
    widths: Sequence[int] | None,
    depths: Sequence[int] | None,
    image_size: int,
) -> PreTrainedModel:
    """Make a tower of a family with random weights; no sizes are the usual ones.

    Raises:
        ConfigError: sizes that the family has not, or a picture that is too small for its stages;
            the message says what can be chosen.
    """
    family = IMAGE_FAMILIES[name]
    chosen = family.widths if widths is None else tuple(widths)
    blocks = family.depths if depths is None else tuple(depths)
    _check_sizes(name, family, chosen, blocks)
    config = family.config(chosen, blocks, image_size)
    tower: PreTrainedModel = tower_of(config) or AutoModel.from_config(config)
    if family.fresh:
        for module in tower.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
    return tower


def _check_sizes(name: str, family: ImageFamily, widths: Sizes, depths: Sizes) -> None:
    least, most = family.stages
    if name == "mobilevitv2":  # one width scales all stages
        if len(widths) != 1 or len(depths) != 3:
            raise ConfigError(
                "mobilevitv2 has one --conv-widths, the channels of its last stage, and three "
                "--conv-depths, the attention blocks of its last three"
            )
    elif len(widths) != len(depths):
        raise ConfigError("conv_widths and conv_depths need one number for each stage")
    elif not least <= len(widths) <= most:
        count = f"{least} to {most}" if least < most else f"{least}"
        raise ConfigError(f"{name} has {count} stages, not {len(widths)}")
    if min(widths) < 1 or any(width % family.whole for width in widths):
        raise ConfigError(
            f"{name}: each of --conv-widths is a multiple of {family.whole}, above 0; got "
            + " ".join(map(str, widths))
        )
    if min(depths) < family.fewest:
        raise ConfigError(
            f"{name}: each of --conv-depths is at least {family.fewest}; got "
            + " ".join(map(str, depths))
        )


def _check_side(name: str, image_size: int, stride: int, least: int = 1) -> None:
    """Refuse a picture of which the last stage would see less than `least` places a side."""
    if image_size // stride < least:
        raise ConfigError(
            f"{name}: a picture of {image_size} pixels is too small for these stages, which need "
            f"{stride * least}: choose a larger --image-size, or fewer stages"
        )


def _convnext(
    name: str, kind: Callable[..., Any], settings: dict[str, float]
) -> Callable[[Sizes, Sizes, int], Any]:
    """Return what makes the configuration of a ConvNeXt of either generation."""

    def config(widths: Sizes, depths: Sizes, image_size: int) -> Any:
        _check_side(name, image_size, _PATCH << len(widths) - 1)
        made = kind(
            num_stages=len(widths),
            hidden_sizes=list(widths),
            depths=list(depths),
            image_size=image_size,
            **settings,
        )
        return _with_width(made, widths[-1])

    return config


def _mobilevitv2(widths: Sizes, depths: Sizes, image_size: int) -> Any:
    # The last map is cut into patches of 2 x 2, over which attention goes.
    stride = next(
        (one for one in (32, 16, 8) if image_size % (2 * one) == 0 and image_size >= 4 * one), None
    )
    if stride is None:
        raise ConfigError(
            f"mobilevitv2: pictures have a side that is a multiple of 16, at least 32 pixels, not "
            f"{image_size}: choose another --image-size"
        )
    return _with_width(
        MobileViTV2Config(
            image_size=image_size,
            width_multiplier=widths[0] / 512,
            n_attn_blocks=list(depths),
            output_stride=stride,
        ),
        widths[0],
    )


def _swiftformer(widths: Sizes, depths: Sizes, image_size: int) -> Any:
    _check_side("swiftformer", image_size, _PATCH << len(widths) - 1)
    return _with_width(
        SwiftFormerConfig(
            image_size=image_size,
            embed_dims=list(widths),
            depths=list(depths),
            downsamples=[True] * len(widths),
            use_layer_scale=False,  # as with a ConvNeXt
        ),
        widths[-1],
    )


def _efficientnet(widths: Sizes, depths: Sizes, image_size: int) -> Any:
    count = len(widths)
    _check_side("efficientnet", image_size, 2**count)
    # It scales and rounds its channels; the last convolution has four times those of the last
    # stage, 1280 of 320 in the paper.
    factor = 4 * widths[-1] / 1280
    channels = [round(width / factor) for width in widths]
    return _with_width(
        EfficientNetConfig(
            image_size=image_size,
            width_coefficient=factor,
            depth_coefficient=1.0,
            kernel_sizes=[3, 3, 5, 3, 5, 5, 3][:count],
            in_channels=[32, *channels[:-1]],
            out_channels=channels,
            strides=[1] + [2] * (count - 1),
            num_block_repeats=list(depths),
            expand_ratios=[1] + [6] * (count - 1),
            hidden_dim=4 * widths[-1],
            batch_norm_momentum=0.1,  # 0.99 is TensorFlow's way to write 0.01
            dropout_rate=0.0,
            drop_connect_rate=0.0,
        ),
        4 * widths[-1],
    )


def _levit(widths: Sizes, depths: Sizes, image_size: int) -> Any:
    _check_side("levit", image_size, _LEVIT_PATCH, _LEVIT_LEAST)
    if image_size % _LEVIT_PATCH:
        raise ConfigError(
            f"levit: pictures have a side that is a multiple of {_LEVIT_PATCH} pixels, not "
            f"{image_size}: choose another --image-size"
        )
    return _with_width(
        LevitConfig(
            image_size=image_size,
            patch_size=_LEVIT_PATCH,
            hidden_sizes=list(widths),
            depths=list(depths),
            num_attention_heads=[width // 32 for width in widths],
        ),
        widths[-1],
    )


def _multi_scale(widths: Sizes, depths: Sizes, image_size: int) -> Any:
    stride = _PATCH << len(widths) - 1
    if image_size % stride or image_size < stride:
        raise ConfigError(
            f"multi-scale: with {len(widths)} stages pictures have a side that is a multiple of "
            f"{stride} pixels, not {image_size}: choose another --image-size, or fewer stages"
        )
    width = widths[-1]
    return MultiScaleConfig(
        hidden_sizes=list(widths),
        depths=list(depths),
        hidden_size=width,
        num_attention_heads=next(width // size for size in (32, 16, 8, width) if width % size == 0),
        image_size=image_size,
    )


def _with_width(config: Any, width: int) -> Any:
    config.hidden_size = width  # the dual encoder's projection asks for it
    return config


IMAGE_FAMILIES: dict[ImageFamilyName, ImageFamily] = {
    "convolutional": ImageFamily(
        title="ConvNeXt (Liu et al. 2022)",
        widths=(48, 96, 192),
        depths=(2, 2, 4),
        # Layer scale was made for very deep networks, and slows small ones.
        config=_convnext("convolutional", ConvNextConfig, {"layer_scale_init_value": 0.0}),
        fewest=0,
    ),
    "convnextv2": ImageFamily(
        title="ConvNeXt V2 (Woo et al. 2023)",
        widths=(48, 96, 192),
        depths=(2, 2, 4),
        config=_convnext("convnextv2", ConvNextV2Config, {}),
        fewest=0,
    ),
    "mobilevitv2": ImageFamily(
        title="MobileViTV2 (Mehta and Rastegari 2022)",
        widths=(192,),
        depths=(1, 2, 2),
        config=_mobilevitv2,
        whole=64,
        fresh=True,
    ),
    "swiftformer": ImageFamily(
        title="SwiftFormer (Shaker et al. 2023)",
        widths=(48, 96, 192),
        depths=(2, 2, 4),
        config=_swiftformer,
        stages=(2, 8),
        whole=2,
    ),
    "efficientnet": ImageFamily(
        title="EfficientNet (Tan and Le 2019)",
        widths=(16, 24, 48, 96),
        depths=(1, 2, 2, 3),
        config=_efficientnet,
        stages=(2, 7),
        whole=8,
        fresh=True,
    ),
    "levit": ImageFamily(
        title="LeViT (Graham et al. 2021)",
        widths=(128, 192, 256),
        depths=(2, 2, 2),
        config=_levit,
        stages=(3, 3),
        whole=32,
    ),
    "multi-scale": ImageFamily(
        title="a ConvNeXt whose stages are pooled together (see `multi_scale.py`)",
        widths=(48, 96, 192),
        depths=(2, 2, 4),
        config=_multi_scale,
        stages=(3, 8),
    ),
}
