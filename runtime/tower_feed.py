"""What a tower's graph is given: the right name and form, and batches that it takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.preprocess import normalise
from edgeclip.runtime.spec import PIXEL_INPUTS, TEXT_INPUT, ImageSpec, PixelForm, Tower

Outputs = dict[str, NDArray[Any]]


def tower_feed(
    values: NDArray[Any], tower: Tower, pixels: PixelForm | None, spec: ImageSpec
) -> dict[str, NDArray[Any]]:
    """Name a tower's input; pictures are normalised for a graph that does not do it itself.

    Args:
        values: uint8 [N, size, size, 3], or token ids int64 [N, length].
        tower: which one it is for.
        pixels: what the image tower takes.
        spec: how pictures are normalised.
    """
    if tower == "text":
        return {TEXT_INPUT: values}
    form: PixelForm = pixels or "float32-nchw"
    return {PIXEL_INPUTS[form]: values if form == "uint8-nhwc" else normalise(values, spec)}


def in_batches(
    run: Callable[[NDArray[Any]], Outputs],
    values: NDArray[Any],
    *,
    static: int | None = None,
    most: int | None = None,
) -> Outputs:
    """Run `values` [N, ...] in pieces that a graph takes, and join what it gives.

    Args:
        run: runs one piece.
        values: at least one row.
        static: the only batch size that the graph takes; the last piece is filled up with
            copies of its last row, whose results are dropped.
        most: the largest batch otherwise; None for any.
    """
    size = static or most or len(values)
    parts = []
    for start in range(0, len(values), size):
        piece = values[start : start + size]
        found = run(_filled(piece, static))
        parts.append({name: value[: len(piece)] for name, value in found.items()})
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _filled(values: NDArray[Any], batch: int | None) -> NDArray[Any]:
    """Repeat the last row until there are `batch`."""
    missing = 0 if batch is None else batch - len(values)
    return values if missing == 0 else np.concatenate([values, values[-1:].repeat(missing, 0)])
