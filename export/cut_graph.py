"""An ONNX graph by its values: who computes one, what it depends on, and the part up to it."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.export.graph import write_unchecked
from edgeclip.export.towers import MASKED
from edgeclip.runtime.engine import Engine

Opener = Callable[[Path], Engine]


class GraphValues:
    """What a graph computes inside.

    A value comes from a run of the graph cut there: an engine that merges nodes may do so
    with those before it, as in the whole graph.

    Args:
        model: a valid graph (nodes in topological order) with its weights in memory.
        inputs: its inputs by name.
        open_engine: loads an ONNX file.
    """

    def __init__(
        self, model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]], open_engine: Opener
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._open = open_engine
        self._reads = [_reads(node) for node in model.graph.node]
        self._maker = {
            name: index for index, node in enumerate(model.graph.node) for name in node.output
        }
        self.names: tuple[str, ...] = tuple(name for name in self._maker if name)
        self.outputs: tuple[str, ...] = tuple(item.name for item in model.graph.output)

    def value(self, name: str) -> NDArray[Any]:
        """Compute one value.

        Raises:
            EngineError: the engine cannot load or run the graph up to there.
        """
        return self.values([name])[name]

    def values(self, names: Collection[str]) -> dict[str, NDArray[Any]]:
        """Compute several values in one run, so none of them can be merged into others.

        Raises:
            EngineError: the engine cannot load or run the graph up to there.
        """
        part = self.cut(names)
        feeds = {item.name: self._inputs[item.name] for item in part.graph.input}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cut.onnx"
            write_unchecked(part, path)
            return self._open(path).run(feeds)

    def cut(self, names: Collection[str]) -> onnx.ModelProto:
        """Return the part of the graph that these values depend on; they are the only outputs."""
        nodes = self._before(names)
        needed = {value for index in nodes for value in self._reads[index]}
        graph = self._model.graph
        part = onnx.ModelProto(ir_version=self._model.ir_version)
        part.opset_import.extend(self._model.opset_import)
        part.functions.extend(self._model.functions)
        part.graph.name = graph.name
        part.graph.node.extend(graph.node[index] for index in nodes)
        part.graph.initializer.extend(item for item in graph.initializer if item.name in needed)
        part.graph.input.extend(item for item in graph.input if item.name in needed)
        typed = {item.name: item for item in graph.output}
        part.graph.output.extend(
            typed.get(name, onnx.ValueInfoProto(name=name))  # engines infer the type
            for name in names
        )
        return part

    def ancestors(self, name: str) -> list[str]:
        """Names of all values that a value depends on, in topological order."""
        nodes = self._before([name])[:-1]
        return [value for index in nodes for value in self._model.graph.node[index].output if value]

    def nearest(self, name: str, among: Collection[str]) -> tuple[list[str], list[onnx.NodeProto]]:
        """Find the closest values of `among` that a value depends on.

        Returns:
            Their names, and the nodes behind them, up to the one that computes the value;
            both in topological order.
        """
        found: set[str] = set()
        behind: set[int] = set()
        waiting = [self._maker[name]]
        while waiting:
            index = waiting.pop()
            if index in behind:
                continue
            behind.add(index)
            for value in self._reads[index] & self._maker.keys():
                if value in among:
                    found.add(value)
                else:
                    waiting.append(self._maker[value])
        names = [value for value in self.names if value in found]
        return names, [self._model.graph.node[index] for index in sorted(behind)]

    def _before(self, names: Collection[str]) -> list[int]:
        """Nodes that values depend on, those that compute them included, in order."""
        needed: set[int] = set()
        waiting = [self._maker[name] for name in names]
        while waiting:
            index = waiting.pop()
            if index not in needed:
                needed.add(index)
                waiting += [self._maker[item] for item in self._reads[index] if item in self._maker]
        return sorted(needed)


def _reads(node: onnx.NodeProto) -> frozenset[str]:
    """Names of the values that a node reads, those that its inner graphs take from outside too."""
    return frozenset(name for name in (*node.input, *captured(node)) if name)


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that the inner graphs of a node may take from outside."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (item.name for item in graph.output)


def relative_error(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Length of the difference divided by the length of the reference.

    Masked scores (at most half of `MASKED`) do not count, since they would hide what is
    wrong with the others. Infinite if shapes differ, or where one of the arrays is NaN or
    infinite and the other is something else. For integers and booleans 1 if any differs.
    """
    if reference.shape != candidate.shape:
        return float("inf")
    if not np.issubdtype(reference.dtype, np.floating):
        return float(np.any(reference != candidate))
    right, found = reference.astype(np.float64), candidate.astype(np.float64)
    finite = np.isfinite(right) & np.isfinite(found)
    if not np.array_equal(right[~finite], found[~finite], equal_nan=True):
        return float("inf")
    counted = finite & (right > MASKED / 2)
    if not counted.any():
        counted = finite
    length = float(np.linalg.norm(right[counted]))
    off = float(np.linalg.norm(found[counted] - right[counted]))
    if off == 0:
        return 0.0
    return off / length if length > 0 else float("inf")
