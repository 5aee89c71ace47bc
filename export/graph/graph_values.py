"""Inspect and edit an ONNX graph: compute inner values, find readers, replace constants."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeclip.export.graph.export_modules import MASKED
from edgeclip.export.graph.graph_io import write_unchecked
from edgeclip.runtime.engines.engine import Engine

Opener = Callable[[Path], Engine]


class GraphValues:
    """Computes inner values of a graph.

    A value comes from a run of the graph cut at that value: an engine that fuses nodes may do so
    with the nodes before it, as in the whole graph.

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
        """Compute several values in one run, so none of them can be fused with others.

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
        """Return the subgraph that computes these values, with them as its only outputs."""
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
        """Return the names of all values that a value depends on, in topological order."""
        nodes = self._before([name])[:-1]
        return [value for index in nodes for value in self._model.graph.node[index].output if value]

    def nearest(self, name: str, among: Collection[str]) -> tuple[list[str], list[onnx.NodeProto]]:
        """Find the closest values of `among` that a value depends on.

        Returns:
            Their names, and the nodes after them, up to the one that computes the value; both in
            topological order.
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
        """Return the indices of the nodes that values depend on, including their own, in order."""
        needed: set[int] = set()
        waiting = [self._maker[name] for name in names]
        while waiting:
            index = waiting.pop()
            if index not in needed:
                needed.add(index)
                waiting += [self._maker[item] for item in self._reads[index] if item in self._maker]
        return sorted(needed)


def _reads(node: onnx.NodeProto) -> frozenset[str]:
    """Return the names of the values that a node and its inner graphs read."""
    return frozenset(name for name in (*node.input, *captured(node)) if name)


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of the values that the inner graphs of a node may take from outside."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (item.name for item in graph.output)


def relative_error(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Return the norm of the difference divided by the norm of the reference.

    Masked scores (at most half of `MASKED`) do not count, since they would hide errors of the
    others. Infinite if shapes differ, or where only one of the arrays is NaN or infinite. For
    integers and booleans 1 if any differs.
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


class GraphEdit:
    """Edits a graph: nodes by the values they make and read, and constants to replace.

    Args:
        model: a valid graph with its weights in memory; it is changed in place, and no
            other code may add or remove nodes while this is in use.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opsets = tuple(model.opset_import)
        self._constants = {item.name: item for item in model.graph.initializer}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._seen = {item.name for item in model.graph.output}
        for node in model.graph.node:
            self._makers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
            self._seen.update(captured(node))

    def node(self, name: str) -> onnx.NodeProto | None:
        """Return the node of a name; None if there is none."""
        return next((node for node in self.graph.node if node.name == name), None)

    def maker(self, value: str) -> onnx.NodeProto | None:
        """Return the node that computes a value; None for inputs and constants."""
        return self._makers.get(value)

    def readers(self, value: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a value; a node that reads it twice is there twice."""
        return self._readers.get(value, [])

    def is_private(self, value: str) -> bool:
        """Tell whether a value is read by `readers` only: not an output, in no inner graph."""
        return value not in self._seen

    def only_reader(self, value: str) -> onnx.NodeProto | None:
        """Return the only node that reads a value; None if there are more, or none."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and self.is_private(value) else None

    def tensor(self, node: onnx.NodeProto, place: int) -> onnx.TensorProto | None:
        """Return the constant input `place` of a node as stored; None if it is no constant."""
        return self._constants.get(node.input[place]) if place < len(node.input) else None

    def constant(self, node: onnx.NodeProto, place: int) -> NDArray[Any] | None:
        """Return the constant input `place` of a node as an array; None if it is none."""
        stored = self.tensor(node, place)
        return None if stored is None else numpy_helper.to_array(stored)

    def needed(self, node: onnx.NodeProto, place: int) -> NDArray[Any]:
        """Return the constant input `place` of a node, which must be a constant."""
        found = self.constant(node, place)
        assert found is not None
        return found

    def replace(self, node: onnx.NodeProto, place: int, values: NDArray[Any]) -> None:
        """Replace the constant input `place` of a node; other readers keep the old one.

        The new constant gets the dtype of the old one.
        """
        name = node.input[place]
        before = self._constants[name]
        kind = onnx.helper.tensor_dtype_to_np_dtype(before.data_type)
        if self.only_reader(name) is not None:
            before.CopyFrom(numpy_helper.from_array(np.asarray(values, kind), name))
            return
        self._readers[name].remove(node)
        self.add(node, place, f"{name}_of_{node.name}", np.asarray(values, kind))

    def add(self, node: onnx.NodeProto, place: int, name: str, values: NDArray[Any]) -> None:
        """Make a new constant the input `place` of a node, which may be one after its last."""
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        self._constants[name] = self.graph.initializer[-1]
        self.read(node, place, name)

    def read(self, node: onnx.NodeProto, place: int, name: str) -> None:
        """Make a value the input `place` of a node, which may be one after its last."""
        self._readers.setdefault(name, []).append(node)
        if place == len(node.input):
            node.input.append(name)
        else:
            node.input[place] = name

    def insert_before(self, node: onnx.NodeProto, new: onnx.NodeProto) -> onnx.NodeProto:
        """Insert a node without readers before another node; return the inserted copy."""
        places = enumerate(self.graph.node)
        place = next(index for index, item in places if item.output[0] == node.output[0])
        self.graph.node.insert(place, new)
        made: onnx.NodeProto = self.graph.node[place]
        self._makers.update(dict.fromkeys(made.output, made))
        return made

    def drop_unread(self) -> None:
        """Remove constants that nothing reads any more."""
        kept = [
            item
            for item in self.graph.initializer
            if self._readers.get(item.name) or item.name in self._seen
        ]
        if len(kept) < len(self.graph.initializer):
            del self.graph.initializer[:]
            self.graph.initializer.extend(kept)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or the operator's default."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def input_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a MatMul or Gemm weight that belongs to the inputs."""
    return 1 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 0
