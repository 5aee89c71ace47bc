"""How much of a tower lies before one of its cuts, as `edgeclip cut` names them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.predicting.tower_pieces import (
    AnyTower,
    ConvTower,
    Piece,
    TransformerTower,
)

_NAME = re.compile(r"(before|in|after) block (\d+(?:\.\d+)?)(?: \(\d+\))?")


@dataclass(frozen=True, slots=True)
class Share:
    """A piece, and how much of its time lies before a cut, from 0 to 1."""

    piece: Piece
    share: float


def pieces_before(tower: AnyTower, name: str) -> tuple[Share, ...]:
    """The pieces of an image tower that are run before a cut.

    The block that a cut lies in is divided by multiply-adds.

    Args:
        tower: the whole.
        name: of the cut, such as "after block 3"; of a ConvNeXt "after block 1.0", which is the
            first block of the second stage.

    Raises:
        InputError: the name tells no place in this tower.
    """
    found = _NAME.fullmatch(name)
    order = _order(tower)
    labels = [label for label, _ in order]
    if found is None or found[2] not in labels:
        raise InputError(
            f"the cut {name!r} tells no place in this tower of {len(set(labels)) - 1} blocks: "
            "measure its stages with `edgeclip measure-cuts`"
        )
    where, at = found[1], labels.index(found[2])
    before = [Share(piece, 1.0) for _, piece in order[:at]]
    piece = order[at][1]
    if where == "before":
        return tuple(before)
    return (*before, Share(piece, _share(piece, where)))


def _order(tower: AnyTower) -> Sequence[tuple[str, Piece]]:
    """All pieces as they are run; those that are no block have an empty label."""
    if isinstance(tower, TransformerTower):
        blocks = [(str(layer), tower.block()) for layer in range(tower.layers - 1)]
        return [("", tower.stem()), *blocks, (str(tower.layers - 1), tower.last())]
    return _order_of_stages(tower)


def _order_of_stages(tower: ConvTower) -> Sequence[tuple[str, Piece]]:
    order = [("", tower.stem())]
    for stage, depth in enumerate(tower.depths):
        order += [("", tower.down(stage))] if stage else []
        order += [(f"{stage}.{layer}", tower.block(stage)) for layer in range(depth)]
    return [*order, ("", tower.head())]


def _share(piece: Piece, where: str) -> float:
    """How much of a block is done after its attention ("in"), or at its end ("after").

    In the last block of a transformer the projection into the embedding space comes behind it.
    """
    width, at, hidden = piece.width, piece.positions, piece.hidden
    if piece.kind == "image-last":
        attention = 2 * at * width**2 + 2 * at * width + 2 * width**2
        mlp, behind = 2 * width * hidden, width * piece.given
    else:
        attention, mlp, behind = 4 * at * width**2 + 2 * at**2 * width, 2 * at * width * hidden, 0
    done = attention if where == "in" else attention + mlp
    return done / (attention + mlp + behind)
