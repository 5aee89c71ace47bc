"""Sizes of image and text towers, and the blocks whose times add up to a tower's latency."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Tower

BlockKind = Literal[
    "image-stem",
    "image-block",
    "image-last",
    "text-block",
    "text-last",
    "conv-stem",
    "conv-block",
    "grn-block",
    "conv-down",
    "conv-head",
]
CONV_PATCH = 4  # side of the patches that a ConvNeXt begins with


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerBlock:
    """A block of a tower, whose time depends on its sizes alone; a size that it lacks is 0.

    Attributes:
        kind: which block.
        width: output channels.
        positions: tokens, class token included; or pixels of a map, patches of a stem.
        given: input channels of a down-sampling step; embedding length of a last block or head.
        patch: side of a patch in pixels.
        heads: number of attention heads.
        hidden: width inside the MLP.
        gelu: the MLP has the exact GELU in place of the quick one.
    """

    kind: BlockKind
    width: Annotated[int, Ge(1)]
    positions: Annotated[int, Ge(1)]
    given: Annotated[int, Ge(0)] = 0
    patch: Annotated[int, Ge(0)] = 0
    heads: Annotated[int, Ge(0)] = 0
    hidden: Annotated[int, Ge(0)] = 0
    gelu: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCount:
    """How many of a block a tower has; `piece` is the block, by its name in files."""

    piece: TowerBlock
    count: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerTower:
    """Sizes of a CLIP's image or text tower.

    Attributes:
        part: which of the two.
        width, heads, hidden, layers: sizes as in a Hugging Face config: hidden_size,
            num_attention_heads, intermediate_size, num_hidden_layers.
        tokens: number of tokens of an image (patches and class token), or of the text whose time is
            asked for.
        dim: length of an embedding.
        patch: side of a patch in pixels; 0 for text.
        gelu: exact GELU in place of the quick one.
    """

    part: Tower
    width: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    hidden: Annotated[int, Ge(1)]
    layers: Annotated[int, Ge(1)]
    tokens: Annotated[int, Ge(2)]
    dim: Annotated[int, Ge(1)]
    patch: Annotated[int, Ge(0)] = 0
    gelu: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return math.isqrt(self.tokens - 1) * self.patch

    def stem(self) -> TowerBlock:
        """Return the patch embedding: pixels to normalised tokens."""
        return TowerBlock(
            kind="image-stem", width=self.width, positions=self.tokens - 1, patch=self.patch
        )

    def block(self) -> TowerBlock:
        """Return a layer that computes all tokens."""
        return TowerBlock(
            kind="image-block" if self.part == "image" else "text-block",
            width=self.width,
            positions=self.tokens,
            heads=self.heads,
            hidden=self.hidden,
            gelu=self.gelu,
        )

    def last(self) -> TowerBlock:
        """Return the last layer, for one token, with the projection; of a text the embedding."""
        return TowerBlock(
            kind="image-last" if self.part == "image" else "text-last",
            width=self.width,
            positions=self.tokens,
            given=self.dim,
            heads=self.heads,
            hidden=self.hidden,
            gelu=self.gelu,
        )

    def parts(self) -> tuple[BlockCount, ...]:
        """Return all blocks of the tower."""
        blocks = Counter({self.last(): 1, self.block(): self.layers - 1})
        if self.part == "image":
            blocks[self.stem()] = 1
        return _counts(blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvTower:
    """Sizes of an image tower that is a ConvNeXt, or a ConvNeXt V2.

    Attributes:
        widths, depths: channels and blocks of each stage; a stage may have no block.
        image_size: side of the image in pixels.
        dim: length of an embedding.
        grn: blocks have global response normalisation, as those of ConvNeXt V2.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    image_size: Annotated[int, Ge(1)]
    dim: Annotated[int, Ge(1)]
    grn: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError("widths and depths need one number for each stage")
        if min(self.widths) < 1 or min(self.depths) < 0:
            raise ValueError("widths must be at least 1, and depths at least 0")
        if self.side(len(self.widths) - 1) < 1:
            raise ValueError(f"a picture of {self.image_size} pixels is too small for these stages")

    @property
    def part(self) -> Tower:
        """Always "image"."""
        return "image"

    def side(self, stage: int) -> int:
        """Side of the feature map in a stage, counted from 0."""
        return self.image_size // CONV_PATCH >> stage

    def stem(self) -> TowerBlock:
        """Return the patch embedding: pixels to the first feature map."""
        return TowerBlock(
            kind="conv-stem", width=self.widths[0], positions=self.side(0) ** 2, patch=CONV_PATCH
        )

    def block(self, stage: int) -> TowerBlock:
        """Return a block of a stage."""
        return TowerBlock(
            kind="grn-block" if self.grn else "conv-block",
            width=self.widths[stage],
            positions=self.side(stage) ** 2,
        )

    def down(self, stage: int) -> TowerBlock:
        """Return the down-sampling step from the stage before to this one."""
        return TowerBlock(
            kind="conv-down",
            width=self.widths[stage],
            positions=self.side(stage) ** 2,
            given=self.widths[stage - 1],
        )

    def head(self) -> TowerBlock:
        """Return pooling, norm and projection."""
        last = len(self.widths) - 1
        return TowerBlock(
            kind="conv-head",
            width=self.widths[last],
            positions=self.side(last) ** 2,
            given=self.dim,
        )

    def parts(self) -> tuple[BlockCount, ...]:
        """Return all blocks of the tower."""
        blocks = Counter({self.stem(): 1})
        for stage, depth in enumerate(self.depths):
            blocks[self.block(stage)] += depth
            if stage:
                blocks[self.down(stage)] += 1
        blocks[self.head()] += 1
        return _counts(blocks)


AnyTower = TransformerTower | ConvTower


def image_tokens(image_size: int, patch: int) -> int:
    """Number of tokens of an image: its patches and the class token."""
    return (image_size // patch) ** 2 + 1


def _counts(blocks: Counter[TowerBlock]) -> tuple[BlockCount, ...]:
    return tuple(BlockCount(piece=block, count=count) for block, count in blocks.items() if count)


_MOST_BYTES = 2**20


def read_image_tower(path: Path, *, image_size: int, dim: int) -> AnyTower:
    """Read the sizes of an image tower from its Hugging Face configuration.

    Args:
        path: `config.json` of a `CLIPModel`, or of a dual encoder whose image tower is a ConvNeXt
            of either version.
        image_size: side of the image in pixels.
        dim: length of an embedding.

    Raises:
        ConfigError: unreadable, another kind of tower, or a size that is missing or is none.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} is too large for a configuration: export the bundle anew")
        vision = json.loads(path.read_text(encoding="utf-8"))["vision_config"]
        kind = vision.get("model_type", "clip_vision_model")
        is_conv = kind in ("convnext", "convnextv2")
        if is_conv and vision.get("patch_size", CONV_PATCH) == CONV_PATCH:
            return ConvTower(
                widths=tuple(map(_whole, vision["hidden_sizes"])),
                depths=tuple(map(_whole, vision["depths"])),
                image_size=image_size,
                dim=dim,
                grn=kind == "convnextv2",
            )
        if kind == "clip_vision_model":
            return _transformer(vision, image_size, dim)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} does not tell the sizes of an image tower ({error!r})") from None
    raise ConfigError(f"{path} is of a {kind}, which cannot be predicted: measure its cuts")


def _transformer(vision: Mapping[str, Any], image_size: int, dim: int) -> TransformerTower:
    patch = _whole(vision["patch_size"])
    return TransformerTower(
        part="image",
        width=_whole(vision["hidden_size"]),
        heads=_whole(vision["num_attention_heads"]),
        hidden=_whole(vision["intermediate_size"]),
        layers=_whole(vision["num_hidden_layers"]),
        tokens=image_tokens(image_size, max(1, patch)),
        dim=dim,
        patch=patch,
        gelu=vision.get("hidden_act", "quick_gelu") != "quick_gelu",
    )


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value
