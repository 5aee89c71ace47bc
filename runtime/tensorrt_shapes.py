"""Which array shapes a TensorRT engine takes: chosen when it is built, checked when it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.engine_key import EngineKey
from edgeclip.runtime.errors import EngineError

_USUAL_TOKENS = 16  # captions mostly take 8 to 20 tokens; an engine is tuned for one length
_DYNAMIC = -1


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The least, best and largest shape of one input."""

    name: str
    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputContract:
    """What one input of an engine takes: shapes from `least` to `most`, of one dtype."""

    name: str
    dtype: np.dtype[Any]
    least: tuple[int, ...]
    most: tuple[int, ...]


def shape_range(name: str, shape: tuple[int, ...], key: EngineKey) -> ShapeRange:
    """Choose the shapes that an engine is built for.

    The first axis is the batch. The second axis of an input of two is the length of the
    texts: from 1 (a tokenizer without start token gives an empty text its end token only)
    to `text_length`, at best 16 tokens or fewer where the model takes fewer.

    Args:
        name: of the input.
        shape: as in the graph, -1 where it may vary.
        key: gives the batches, and the length of texts.

    Raises:
        EngineError: the graph does not take the device's batches, or another axis varies.
    """
    if not shape:
        return ShapeRange(name, (), (), ())
    axes = [_batch_axis(name, shape[0], key)]
    for axis, size in enumerate(shape[1:], start=1):
        if size != _DYNAMIC:
            axes.append((size, size, size))
        elif len(shape) == 2 and key.text_length is not None:
            axes.append((1, min(_USUAL_TOKENS, key.text_length), key.text_length))
        else:
            raise EngineError(
                f"input {name!r} of the graph varies along axis {axis}, for which no size is "
                "known: export the graph with that size fixed"
            )
    least, best, most = zip(*axes, strict=True)
    return ShapeRange(name, least, best, most)


def _batch_axis(name: str, size: int, key: EngineKey) -> tuple[int, int, int]:
    if size == _DYNAMIC:
        return key.batch_min, key.batch_best, key.batch_max
    if key.batch_min == key.batch_max == size:
        return size, size, size
    raise EngineError(
        f"input {name!r} of the graph takes batches of {size} only, and the device asks for "
        f"{key.batch_min} to {key.batch_max}: set batch_min and batch_max to {size}, or export "
        "a graph whose batch may vary"
    )


def check_feeds(contracts: Sequence[InputContract], feeds: Mapping[str, NDArray[Any]]) -> None:
    """Refuse arrays that an engine does not take.

    Raises:
        EngineError: a missing or unknown name, another dtype, or a shape out of range.
    """
    names = [contract.name for contract in contracts]
    if set(feeds) != set(names):
        raise EngineError(
            f"the engine takes {', '.join(map(repr, sorted(names)))}, "
            f"but was given {', '.join(map(repr, sorted(feeds))) or 'nothing'}"
        )
    for contract in contracts:
        _check_feed(contract, feeds[contract.name])


def _check_feed(contract: InputContract, array: NDArray[Any]) -> None:
    if array.dtype != contract.dtype:
        raise EngineError(f"{contract.name!r} must be {contract.dtype}, got {array.dtype}")
    shape = array.shape
    inside = len(shape) == len(contract.least) and all(
        low <= size <= high
        for low, size, high in zip(contract.least, shape, contract.most, strict=True)
    )
    if not inside:
        raise EngineError(
            f"{contract.name!r} must be {_describe(contract)}, got {_times(shape)}: the engine "
            "was built for that range (batch_min and batch_max of the device)"
        )


def _describe(contract: InputContract) -> str:
    """The range in words, such as "1..32 x 3 x 224 x 224"."""
    pairs = zip(contract.least, contract.most, strict=True)
    return _times([str(low) if low == high else f"{low}..{high}" for low, high in pairs])


def _times(sizes: Sequence[object]) -> str:
    return " x ".join(map(str, sizes)) or "a single number"
