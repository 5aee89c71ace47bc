"""Find the values of an image tower's graph at which it can be cut in two.

Such a value dominates the output: all information about the picture passes through it. In any
topological order it is, at some moment, the only activation still needed. Values that depend on the
batch size alone (Shape, and what follows from it) are no activations: the tail computes them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.export.graph.graph_values import GraphValues, Opener
from edgeclip.runtime.planning.cut_set import CutPoint
from edgeclip.runtime.wire.codec import decode, encode

# Operators that take nearly all of a tower's time. Of cuts with none of them in between, one is
# enough.
HEAVY = frozenset(
    {
        *("Attention", "Conv", "ConvInteger", "ConvTranspose", "Einsum", "FusedConv"),
        *("FusedGemm", "FusedMatMul", "Gemm", "GroupQueryAttention", "LSTM", "MatMul"),
        *("MatMulInteger", "MatMulNBits", "MultiHeadAttention", "NhwcFusedConv"),
        *("PackedMultiHeadAttention", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul"),
    }
)
_DTYPES: dict[np.dtype[Any], Literal["float16", "float32"]] = {
    np.dtype(np.float16): "float16",
    np.dtype(np.float32): "float32",
}
# As torch's exporter names weights: encoder.layers.3.mlp, stages.1.layers.0.dwconv.
_BLOCK = re.compile(r"\b(?:layers?|blocks?|stages?|network|resblocks|h)\.(\d+)")


@dataclass(frozen=True, slots=True)
class FoundCut:
    """A cut point, and the name of its value in the graph."""

    value: str
    point: CutPoint


@dataclass(frozen=True, slots=True)
class _Place:
    """A value that carries all information, and how much work comes before it."""

    value: str
    index: int  # of the last node before it; -1 for the input
    heavy: int  # number of heavy nodes up to there


def activations(graph: onnx.GraphProto) -> set[str]:
    """Return the values that depend on the pixels, not on the batch size alone."""
    found = {item.name for item in graph.input}
    for node in graph.node:
        if node.op_type != "Shape" and not found.isdisjoint(node.input):
            found.update(name for name in node.output if name)
    return found


def find_cuts(
    model: onnx.ModelProto, feed: Mapping[str, NDArray[Any]], size: int, open_engine: Opener
) -> tuple[FoundCut, ...]:
    """Find all cut points of an image tower, the pixels first.

    Of several cuts with no heavy operator in between, the one with the fewest bytes is kept, and of
    equals the last. Cuts after the last heavy operator are left out: there the embedding is sent.

    Args:
        model: a graph with one input and one output, its nodes in topological order.
        feed: its input for a few pictures, or for the whole batch where the batch size is fixed.
        size: side of a picture, in pixels.
        open_engine: loads an ONNX file.

    Raises:
        EngineError: the graph cannot be run.
    """
    graph = model.graph
    active = activations(graph)
    last = sum(_is_heavy(node, active) for node in graph.node)
    places = [place for place in _places(graph, active) if place.heavy < last]
    values = _values(model, [place.value for place in places], feed, open_engine)
    kept: dict[int, _Place] = {}
    for place in places:
        if place.value not in values:
            continue
        best = kept.get(place.heavy)
        if best is None or values[place.value].nbytes <= values[best.value].nbytes:
            kept[place.heavy] = place
    pixels = CutPoint(number=0, name="pixels", shape=(size, size, 3), dtype="uint8", axis=3)
    first = kept.get(0)
    if first is not None and values[first.value][0].nbytes >= math.prod(pixels.shape):
        del kept[0]  # nothing was computed, and there are more bytes than the pixels have
    names = _block_names(graph, [place.index for place in kept.values()])
    return (
        FoundCut(graph.input[0].name, pixels),
        *(
            FoundCut(place.value, _point(number, name, values[place.value]))
            for number, (place, name) in enumerate(zip(kept.values(), names, strict=True), 1)
        ),
    )


def _places(graph: onnx.GraphProto, active: set[str]) -> Iterator[_Place]:
    """Yield the values that are, at some moment, the only activation still needed.

    Results of DequantizeLinear are skipped: engines fuse them with their readers.
    """
    needed_until = {
        name: index
        for index, node in enumerate(graph.node)
        if node.op_type != "Shape"
        for name in node.input
    } | {item.name: len(graph.node) for item in graph.output}
    (given,) = graph.input
    live, heavy, before = {given.name}, 0, given.name
    for index, node in enumerate(graph.node):
        heavy += _is_heavy(node, active)
        made = {name for name in node.output if name in active and name in needed_until}
        live = {name for name in live | made if needed_until[name] > index}
        if len(live) == 1 and before not in live:
            (before,) = live
            if node.op_type != "DequantizeLinear":
                yield _Place(before, index, heavy)


def _is_heavy(node: onnx.NodeProto, active: set[str]) -> bool:
    return node.op_type in HEAVY and not active.isdisjoint(node.output)


def _values(
    model: onnx.ModelProto,
    names: Sequence[str],
    feed: Mapping[str, NDArray[Any]],
    open_engine: Opener,
) -> dict[str, NDArray[Any]]:
    """Run the graph and return the values that can be sent: floats [N, ...]."""
    if not names:
        return {}
    ((_, given),) = feed.items()
    found = GraphValues(model, feed, open_engine).values(names)
    return {
        name: value
        for name, value in found.items()
        if value.dtype in _DTYPES and value.ndim > 1 and value.shape[0] == len(given)
    }


def _point(number: int, name: str, values: NDArray[Any]) -> CutPoint:
    return CutPoint(
        number=number,
        name=name,
        shape=values.shape[1:],
        dtype=_DTYPES[values.dtype],
        axis=_channel_axis(values),
    )


def _channel_axis(values: NDArray[Any]) -> int:
    """Return the axis with the smallest int8 error: tokens have channels last, maps first."""
    exact = values.astype(np.float32)

    def error(axis: int) -> float:
        tensors = encode("int8", exact, axis=axis)
        restored = decode("int8", tensors, shape=exact.shape[1:], axis=axis)
        return float(np.square(restored - exact).sum())

    return min(reversed(range(1, values.ndim)), key=error)


def _block_names(graph: onnx.GraphProto, ends: Sequence[int]) -> list[str]:
    """Name the cuts by the blocks around them; `ends` are the indices of their last nodes."""
    labels = _blocks(graph)
    names: list[str] = []
    for number, end in enumerate(ends, 1):
        before = next((label for label in reversed(labels[: end + 1]) if label), None)
        after = next((label for label in labels[end + 1 :] if label), None)
        fitting = [f"in block {before}"] if before == after and before else []
        fitting += [f"after block {before}"] if before and before != after else []
        fitting += [f"before block {after}"] if after and before != after else []
        name = next((name for name in fitting if name not in names), None)
        names.append(name or _numbered((fitting or ["cut"])[-1], number, names))
    return names


def _numbered(name: str, number: int, names: Sequence[str]) -> str:
    if name == "cut":
        return f"cut {number}"
    return f"{name} ({2 + sum(other.startswith(f'{name} (') for other in names)})"


def _blocks(graph: onnx.GraphProto) -> list[str | None]:
    """Return the block of each node's weights, such as "3", or "1.0" where stages have blocks.

    A layer between two stages belongs to a stage only, so it is in no block.
    """
    found = [next(filter(None, map(_BLOCK.findall, node.input)), []) for node in graph.node]
    depth = max(map(len, found), default=0)
    return [".".join(parts) if parts and len(parts) == depth else None for parts in found]
