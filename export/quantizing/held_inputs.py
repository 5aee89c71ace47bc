"""A tower's inputs, prepared once and kept on disk: every config is judged on the same ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def hold_inputs(batches: Iterator[NDArray[Any]], path: Path) -> tuple[NDArray[Any], ...]:
    """Write batches to a file, one behind the other, and return them mapped into memory.

    Pictures are decoded and cut only once, and memory holds one batch at a time, whatever
    their number. The file must stay until the arrays are gone.
    """
    shapes: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
    with path.open("wb") as file:
        for batch in batches:
            shapes.append((batch.dtype, batch.shape))
            file.write(np.ascontiguousarray(batch).data)
    held: list[NDArray[Any]] = []
    offset = 0
    for kind, shape in shapes:
        array = np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape)
        held.append(array)
        offset += array.nbytes
    return tuple(held)
