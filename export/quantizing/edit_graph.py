"""A graph whose constants are changed in place: who makes and reads a value, and what it holds."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeclip.export.cut_graph import captured

Values = NDArray[np.float64]


class GraphEdit:
    """Nodes by the values that they make and read, and constants that can be replaced.

    Args:
        model: a valid graph with its weights in memory; it is changed in place, and nobody
            else may add or remove nodes while this is in use.
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
        """Return the nodes that read a value, one that reads it twice two times."""
        return self._readers.get(value, [])

    def is_private(self, value: str) -> bool:
        """Whether only `readers` see a value: no output, and no inner graph."""
        return value not in self._seen

    def only_reader(self, value: str) -> onnx.NodeProto | None:
        """Return the one place where a value is read; None if there are more, or none."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and self.is_private(value) else None

    def tensor(self, node: onnx.NodeProto, place: int) -> onnx.TensorProto | None:
        """Return the constant that a node reads at a place, as it is stored; None if none."""
        return self._constants.get(node.input[place]) if place < len(node.input) else None

    def constant(self, node: onnx.NodeProto, place: int) -> NDArray[Any] | None:
        """Return the constant that a node reads at a place; None if that is none."""
        stored = self.tensor(node, place)
        return None if stored is None else numpy_helper.to_array(stored)

    def needed(self, node: onnx.NodeProto, place: int) -> NDArray[Any]:
        """Return the constant that a node is known to read at a place."""
        found = self.constant(node, place)
        assert found is not None
        return found

    def replace(self, node: onnx.NodeProto, place: int, values: NDArray[Any]) -> None:
        """Let a node read another constant at a place; other readers keep theirs.

        It has the type of the one before.
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
        """Let a node read a new constant at a place, which may be the next one after its last."""
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        self._constants[name] = self.graph.initializer[-1]
        self.read(node, place, name)

    def read(self, node: onnx.NodeProto, place: int, name: str) -> None:
        """Let a node read a value at a place, which may be the next one after its last."""
        self._readers.setdefault(name, []).append(node)
        if place == len(node.input):
            node.input.append(name)
        else:
            node.input[place] = name

    def insert_before(self, node: onnx.NodeProto, new: onnx.NodeProto) -> onnx.NodeProto:
        """Put a node, which reads nothing yet, before another one; return it as it stands there."""
        places = enumerate(self.graph.node)
        place = next(index for index, item in places if item.output[0] == node.output[0])
        self.graph.node.insert(place, new)
        made: onnx.NodeProto = self.graph.node[place]
        self._makers.update(dict.fromkeys(made.output, made))
        return made

    def drop_unread(self) -> None:
        """Remove constants that nobody reads any more."""
        kept = [
            item
            for item in self.graph.initializer
            if self._readers.get(item.name) or item.name in self._seen
        ]
        if len(kept) < len(self.graph.initializer):
            del self.graph.initializer[:]
            self.graph.initializer.extend(kept)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or what the operator takes without it."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def input_axis(node: onnx.NodeProto) -> int:
    """Axis of the weight of a MatMul or Gemm that counts what it reads."""
    return 1 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 0
