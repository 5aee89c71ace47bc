"""The pieces that a tower's time adds up from, as the exporter writes the tower.

A CLIP image tower cuts patches (stem), runs all layers but the last for every token (block), and
the last one, the norm and the projection for the class token only (last). A text tower is the
same without a stem, over the tokens up to the end of the text. A ConvNeXt has blocks in stages,
each stage but the first begins with a step to half the resolution (down).
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

from edgeclip.profiles.ranges import Range, check_ranges
from edgeclip.runtime.spec import Tower

Kind = Literal[
    "image-stem",
    "image-block",
    "image-last",
    "text-block",
    "text-last",
    "conv-stem",
    "conv-block",
    "conv-down",
    "conv-head",
]
CONV_PATCH = 4  # side of the patches that a ConvNeXt begins with


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tower whose time depends on its sizes alone; what it does not have is 0.

    Attributes:
        kind: which part.
        width: channels that it gives.
        positions: tokens, class token included; or pixels of a map, patches of a stem.
        given: channels that a step down takes; length of the embedding that last and head give.
        patch: side of a patch in pixels.
        heads: of the attention.
        hidden: width inside the MLP.
        gelu: the MLP has the exact GELU in place of the quick one.
    """

    kind: Kind
    width: Annotated[int, Range(at_least=1)]
    positions: Annotated[int, Range(at_least=1)]
    given: Annotated[int, Range(at_least=0)] = 0
    patch: Annotated[int, Range(at_least=0)] = 0
    heads: Annotated[int, Range(at_least=0)] = 0
    hidden: Annotated[int, Range(at_least=0)] = 0
    gelu: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """So many of a piece."""

    piece: Piece
    count: Annotated[int, Range(at_least=1)]

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerTower:
    """Sizes of a CLIP's image or text tower.

    Attributes:
        part: which of the two.
        width, heads, hidden, layers: as in a Hugging Face config: hidden_size,
            num_attention_heads, intermediate_size, num_hidden_layers.
        tokens: of an image (patches and class token), or of the text whose time is asked for.
        dim: length of an embedding.
        patch: side of a patch in pixels; 0 for text.
        gelu: exact GELU in place of the quick one.
    """

    part: Tower
    width: Annotated[int, Range(at_least=1)]
    heads: Annotated[int, Range(at_least=1)]
    hidden: Annotated[int, Range(at_least=1)]
    layers: Annotated[int, Range(at_least=1)]
    tokens: Annotated[int, Range(at_least=2)]
    dim: Annotated[int, Range(at_least=1)]
    patch: Annotated[int, Range(at_least=0)] = 0
    gelu: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def image_size(self) -> int:
        """Side of the picture in pixels."""
        return math.isqrt(self.tokens - 1) * self.patch

    def stem(self) -> Piece:
        """From pixels to normalised tokens."""
        return Piece(
            kind="image-stem", width=self.width, positions=self.tokens - 1, patch=self.patch
        )

    def block(self) -> Piece:
        """A layer for all tokens."""
        return Piece(
            kind="image-block" if self.part == "image" else "text-block",
            width=self.width,
            positions=self.tokens,
            heads=self.heads,
            hidden=self.hidden,
            gelu=self.gelu,
        )

    def last(self) -> Piece:
        """The last layer for one token and what follows; of a text, what comes first as well."""
        return Piece(
            kind="image-last" if self.part == "image" else "text-last",
            width=self.width,
            positions=self.tokens,
            given=self.dim,
            heads=self.heads,
            hidden=self.hidden,
            gelu=self.gelu,
        )

    def parts(self) -> tuple[Part, ...]:
        """All that the tower consists of."""
        pieces = Counter({self.last(): 1, self.block(): self.layers - 1})
        if self.part == "image":
            pieces[self.stem()] = 1
        return _parts(pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvTower:
    """Sizes of a ConvNeXt image tower.

    Attributes:
        widths, depths: channels and blocks of each stage; a stage may have no block.
        image_size: side of the picture in pixels.
        dim: length of an embedding.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    image_size: Annotated[int, Range(at_least=1)]
    dim: Annotated[int, Range(at_least=1)]

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError("widths and depths need one number for each stage")
        if min(self.widths) < 1 or min(self.depths) < 0:
            raise ValueError("widths must be at least 1, and depths at least 0")
        if self.side(len(self.widths) - 1) < 1:
            raise ValueError(f"a picture of {self.image_size} pixels is too small for these stages")

    @property
    def part(self) -> Tower:
        """A ConvNeXt looks at pictures."""
        return "image"

    def side(self, stage: int) -> int:
        """Side of the map in a stage, the first being 0."""
        return self.image_size // CONV_PATCH >> stage

    def stem(self) -> Piece:
        """From pixels to the first map."""
        return Piece(
            kind="conv-stem", width=self.widths[0], positions=self.side(0) ** 2, patch=CONV_PATCH
        )

    def block(self, stage: int) -> Piece:
        """A block of a stage."""
        return Piece(kind="conv-block", width=self.widths[stage], positions=self.side(stage) ** 2)

    def down(self, stage: int) -> Piece:
        """The step from the stage before to this one."""
        return Piece(
            kind="conv-down",
            width=self.widths[stage],
            positions=self.side(stage) ** 2,
            given=self.widths[stage - 1],
        )

    def head(self) -> Piece:
        """Pooling, norm and projection."""
        last = len(self.widths) - 1
        return Piece(
            kind="conv-head",
            width=self.widths[last],
            positions=self.side(last) ** 2,
            given=self.dim,
        )

    def parts(self) -> tuple[Part, ...]:
        """All that the tower consists of."""
        pieces = Counter({self.stem(): 1})
        for stage, depth in enumerate(self.depths):
            pieces[self.block(stage)] += depth
            if stage:
                pieces[self.down(stage)] += 1
        pieces[self.head()] += 1
        return _parts(pieces)


AnyTower = TransformerTower | ConvTower


def image_tokens(image_size: int, patch: int) -> int:
    """Patches of a picture, and the class token."""
    return (image_size // patch) ** 2 + 1


def _parts(pieces: Counter[Piece]) -> tuple[Part, ...]:
    return tuple(Part(piece=piece, count=count) for piece, count in pieces.items() if count)
