"""A float tower each of whose products can be quantized by a switch, in one session.

What a switch turns on is read from a graph that was quantized as a whole: the scales of the
product's activations and its rounded weight. So the damage that one product does alone is
that of the very numbers that will be shipped, whatever made them. Products that are off run
as they always do: each is an `If` with both forms inside.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph import PRODUCTS, load_graph, opset_of, with_opset, write_unchecked
from edgeclip.runtime.engine_ort import OrtEngine
from edgeclip.runtime.providers import CPU

_SWITCHES = "edgeclip_switches"


class SwitchedTower:
    """A tower in memory.

    Attributes:
        nodes: the products that have a switch, in the graph's order.
    """

    def __init__(self, path: Path, nodes: tuple[str, ...], threads: int) -> None:
        self.nodes = nodes
        self._engine = _PlainEngine(path, providers=(CPU,), threads=threads)

    def run(
        self, feed: Mapping[str, NDArray[Any]], quantized: Collection[str] = ()
    ) -> dict[str, NDArray[Any]]:
        """Run with some products quantized and all others in float.

        Raises:
            EngineError: the input does not fit the graph.
        """
        on = np.array([name in quantized for name in self.nodes], np.bool_)
        return self._engine.run({**feed, _SWITCHES: on})


@contextmanager
def switched_tower(source: Path, written: Path, *, threads: int) -> Iterator[SwitchedTower]:
    """Open a float tower with the quantized products of another file as its switches.

    Args:
        source: the tower in fp32.
        written: the same with Q/DQ around products, whose nodes have kept their names.
        threads: of the session.

    Raises:
        ExportError: `written` has no such product, or a file cannot be read.
        EngineError: ONNX Runtime cannot load the result.
    """
    quantized = _Quantized(load_graph(written))
    model = with_opset(load_graph(source), quantized.opset)
    nodes = _insert_switches(model, quantized)
    if not nodes:
        raise ExportError(f"{written.name} has no quantized product of {source.name}")
    with tempfile.TemporaryDirectory(prefix="edgeclip-switches-") as folder:
        path = Path(folder) / "switched.onnx"
        write_unchecked(model, path)
        del model
        yield SwitchedTower(path, nodes, threads)


class _PlainEngine(OrtEngine):
    """An engine that runs a graph as it is written: Q/DQ really round, and nothing is merged."""

    def _load(self, ort: Any, graph: Path | bytes, options: Any, chain: list[Any]) -> Any:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return super()._load(ort, graph, options, chain)


class _Quantized:
    """The products of a quantized graph, each with what its two factors are read through."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = opset_of(model)
        self._constants = {item.name: item for item in model.graph.initializer}
        self._maker: dict[str, onnx.NodeProto] = {
            name: node for node in model.graph.node for name in node.output
        }
        self._nodes: dict[str, onnx.NodeProto] = {
            node.name: node for node in model.graph.node if node.op_type in PRODUCTS
        }

    def product(self, name: str) -> onnx.NodeProto | None:
        """Return a node if both its factors come out of a DequantizeLinear."""
        node = self._nodes.get(name)
        if node is None or any(self.reader(node, place) is None for place in (0, 1)):
            return None
        return node

    def reader(self, node: onnx.NodeProto, place: int) -> onnx.NodeProto | None:
        """Return the DequantizeLinear that gives a factor."""
        found = self._maker.get(node.input[place])
        if found is None or found.op_type != "DequantizeLinear":
            return None
        return found

    def constants(self, node: onnx.NodeProto, first: int) -> list[onnx.TensorProto]:
        """Return the inputs of a DequantizeLinear from `first` on, its scale in fp32."""
        found = []
        for place, name in enumerate(node.input[first:], first):
            tensor = self._constants[name]
            if place == 1:
                scale = numpy_helper.to_array(tensor).astype(np.float32)
                tensor = numpy_helper.from_array(scale, name)
            found.append(tensor)
        return found


def _insert_switches(model: onnx.ModelProto, quantized: _Quantized) -> tuple[str, ...]:
    """Replace products by switched ones, in place; return their names."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    names: list[str] = []
    for node in graph.node:
        product = quantized.product(node.name)
        if product is None:
            nodes.append(node)
            continue
        number = len(names)
        names.append(node.name)
        place = numpy_helper.from_array(np.array(number), f"switch{number}_place")
        constants[place.name] = place
        on = f"switch{number}_on"
        nodes.append(helper.make_node("Gather", [_SWITCHES, place.name], [on], on))
        nodes.append(_switched(node, product, quantized, on, constants))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
    switches = helper.make_tensor_value_info(_SWITCHES, TensorProto.BOOL, [len(names)])
    graph.input.append(switches)
    return tuple(names)


def _switched(
    node: onnx.NodeProto,
    product: onnx.NodeProto,
    quantized: _Quantized,
    on: str,
    constants: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:
    """Return an `If` in place of `node`, which computes `product` where it is on."""
    stem = on.removesuffix("_on")

    def keep(tensors: list[onnx.TensorProto], what: str) -> list[str]:
        named = []
        for number, tensor in enumerate(tensors):
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = f"{stem}_{what}{number}"
            constants[copy.name] = copy
            named.append(copy.name)
        return named

    value, weight = (quantized.reader(product, place) for place in (0, 1))
    assert value is not None
    assert weight is not None
    steps = keep(quantized.constants(value, 1), "value")
    rounded = keep(quantized.constants(weight, 0), "weight")
    whole, back, factor = (f"{stem}_{part}" for part in ("whole", "back", "factor"))
    to_whole = helper.make_node("QuantizeLinear", [node.input[0], *steps], [whole], f"{stem}_Q")
    from_whole = helper.make_node("DequantizeLinear", [whole, *steps], [back], f"{stem}_DQ")
    weights = helper.make_node("DequantizeLinear", rounded, [factor], f"{stem}_weight_DQ")
    weights.attribute.extend(weight.attribute)
    rough, exact = _copy(product, f"{stem}_rough"), _copy(node, f"{stem}_exact")
    rough.input[:] = [back, factor, *node.input[2:]]  # the bias stays as it was
    return helper.make_node(
        "If",
        [on],
        list(node.output),
        node.name,
        then_branch=_branch([to_whole, from_whole, weights, rough]),
        else_branch=_branch([exact]),
    )


def _copy(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = name
    copy.output[:] = [f"{name}_result"]
    return copy


def _branch(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    result = onnx.ValueInfoProto(name=nodes[-1].output[0])
    result.type.tensor_type.elem_type = TensorProto.FLOAT
    return helper.make_graph(nodes, f"{nodes[-1].name}_branch", [], [result])
