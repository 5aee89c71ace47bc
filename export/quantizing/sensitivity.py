"""Measure quantization sensitivity: the error of each group of products quantized alone."""

import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_io import (
    PRODUCTS,
    load_graph,
    opset_of,
    with_opset,
    write_unchecked,
)
from edgeclip.export.quantizing.node_groups import NodeGroup
from edgeclip.runtime.arrays import FloatArray, Tensors
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.providers import CPU
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import estimate_mean
from edgeclip.runtime.towers.tower_runner import in_batches

_SWITCHES = "edgeclip_switches"


class SwitchedTower:
    """A loaded tower in which each product can run quantized or in float, chosen per call.

    Attributes:
        nodes: the products that have a switch, in the graph's order.
    """

    def __init__(self, path: Path, nodes: tuple[str, ...], threads: int) -> None:
        self.nodes = nodes
        self._engine = _PlainEngine(path, providers=(CPU,), threads=threads)

    def run(
        self, feed: Mapping[str, NDArray[Any]], quantized: Collection[str] = ()
    ) -> dict[str, NDArray[Any]]:
        """Run the tower with some products quantized and all others in float.

        Raises:
            EngineError: the input does not fit the graph.
        """
        on = np.array([name in quantized for name in self.nodes], np.bool_)
        return self._engine.run({**feed, _SWITCHES: on})


@contextmanager
def switched_tower(source: Path, written: Path, *, threads: int) -> Iterator[SwitchedTower]:
    """Open a float tower whose products can be switched to the quantized ones of another file.

    Args:
        source: the tower in fp32.
        written: the same tower with Q/DQ around products; nodes have kept their names.
        threads: number of threads of the session.

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
    """An ONNX Runtime engine without graph optimization, so that Q/DQ are executed as written."""

    def _load(self, ort: Any, graph: Path | bytes, options: Any, chain: list[Any]) -> Any:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return super()._load(ort, graph, options, chain)


class _Quantized:
    """The quantized products of a graph, with the DequantizeLinear of both inputs."""

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
        """Return a product if both its inputs come from a DequantizeLinear."""
        node = self._nodes.get(name)
        if node is None or any(self.reader(node, place) is None for place in (0, 1)):
            return None
        return node

    def reader(self, node: onnx.NodeProto, place: int) -> onnx.NodeProto | None:
        """Return the DequantizeLinear that makes a product's input; None if another node does."""
        found = self._maker.get(node.input[place])
        if found is None or found.op_type != "DequantizeLinear":
            return None
        return found

    def constants(self, node: onnx.NodeProto, first: int) -> list[onnx.TensorProto]:
        """Return the constant inputs of a DequantizeLinear from `first` on, its scale in fp32."""
        found = []
        for place, name in enumerate(node.input[first:], first):
            tensor = self._constants[name]
            if place == 1:
                scale = numpy_helper.to_array(tensor).astype(np.float32)
                tensor = numpy_helper.from_array(scale, name)
            found.append(tensor)
        return found


def _insert_switches(model: onnx.ModelProto, quantized: _Quantized) -> tuple[str, ...]:
    """Replace quantized products by switched ones, in place; return their names."""
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
    """Return an `If` that computes the quantized `product` when `on`, else the float `node`."""
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


_BAD = 2.0  # times the mean damage of a group: then its nodes are measured one by one
_HARMLESS = 0.1  # of the worst node's damage: a group with a node below that is split
_COSINES_AT_ONCE = 1 << 21  # 16 MiB of float64


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDamage:
    """The error of quantizing one group alone, with 95% intervals over the inputs.

    Attributes:
        title: the group, for people.
        nodes: names of its products.
        divergence: mean Kullback-Leibler divergence of a row from the float tower's, in nats.
        cosine_loss: 1 less the mean cosine with the float tower's embeddings.
    """

    title: str
    nodes: tuple[str, ...]
    divergence: Interval
    cosine_loss: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity(JsonRecord):
    """The damage of every group of a tower.

    Attributes:
        config: key of the config whose scales were used.
        groups: the most damaging first.
        inputs: how many inputs each group was measured on.
        runs: how many inputs the tower was run on in total, in float and with each group.
        seconds: that it took.
    """

    SCHEMA_VERSION: ClassVar[int] = 3
    WHAT: ClassVar[str] = "sensitivities"
    HINT: ClassVar[str] = "delete it and search again"

    config: str
    groups: tuple[GroupDamage, ...]
    inputs: int
    runs: int
    seconds: float

    @property
    def rate(self) -> float:
        """Runs per second."""
        return self.runs / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SensitivityInputs:
    """The inputs that sensitivity is measured on, and how to run them.

    Attributes:
        inputs: batches [n, ...] of the tower's inputs.
        others: the other tower's embeddings of the same pairs, float32 [N, dim].
        logit_scale: logit scale of the model.
        feed: turns a batch into the named inputs of the graph.
        output: name of the graph's embedding output.
        batch: the only batch size that the graph takes; None for any.
        threads: number of threads of the session.
    """

    inputs: Sequence[NDArray[Any]]
    others: FloatArray
    logit_scale: float
    feed: Callable[[NDArray[Any]], Tensors]
    output: str
    batch: int | None = None
    threads: int = 1


def measure_sensitivity(
    source: Path,
    written: Path,
    groups: Sequence[NodeGroup],
    on: SensitivityInputs,
    *,
    config: str = "",
) -> Sensitivity:
    """Measure the damage of each group alone; split a bad group if some of its nodes are harmless.

    A terminal shows inputs per second and the time left. Memory holds the embeddings of all
    groups, and one batch at a time.

    Args:
        source: the tower in fp32.
        written: the same with all groups quantized.
        groups: the groups to measure; of a group that is quantized in part, each product alone.
        on: the inputs to measure on.
        config: key of the config that `written` has.

    Raises:
        ExportError: `written` quantizes nothing.
        EngineError: ONNX Runtime cannot run a graph.
    """
    began = time.monotonic()
    with switched_tower(source, written, threads=on.threads) as tower:
        there = _switchable(groups, tower.nodes)
        found = _damages(tower, there, on)
        bad = _bad(there, found)
        for group in bad:
            singles = _damages(tower, group.singles(), on)
            worst = max(item.divergence.value for item in singles)
            if min(item.divergence.value for item in singles) < _HARMLESS * worst:
                found = [item for item in found if item.nodes != group.nodes] + singles
    inputs = sum(map(len, on.inputs))
    passes = [len(there), *(len(group.nodes) for group in bad)]
    return Sensitivity(
        config=config,
        groups=tuple(sorted(found, key=lambda item: -item.divergence.value)),
        inputs=inputs,
        runs=inputs * sum(count + 1 for count in passes if count),  # one more in float
        seconds=time.monotonic() - began,
    )


def row_divergence(
    found: FloatArray, reference: FloatArray, others: FloatArray, logit_scale: float
) -> NDArray[np.float64]:
    """Return the KL divergence of each row's softmax over `others`: float64 [N], in nats.

    Args:
        found, reference: embeddings [N, dim] of the same inputs.
        others: what they are compared with [M, dim].
        logit_scale: multiplies the cosines.
    """
    targets = logit_scale * others.astype(np.float64).T
    result = np.empty(len(found))
    step = max(1, _COSINES_AT_ONCE // len(others))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        right = _log_softmax(reference[rows] @ targets)
        result[rows] = (np.exp(right) * (right - _log_softmax(found[rows] @ targets))).sum(axis=1)
    return np.maximum(result, 0.0)  # rounding can go below what is 0


def _switchable(groups: Sequence[NodeGroup], nodes: Collection[str]) -> list[NodeGroup]:
    """Return the groups whose nodes all have a switch, and of the others the nodes that have one.

    Of three products of one value, one may stay in float because fp16 cannot hold its result.
    """
    found: list[NodeGroup] = []
    for group in groups:
        singles = [single for single in group.singles() if single.nodes[0] in nodes]
        found += [group] if len(singles) == len(group.nodes) else singles
    return found


def _damages(
    tower: SwitchedTower, groups: Sequence[NodeGroup], on: SensitivityInputs
) -> list[GroupDamage]:
    if not groups:
        return []
    reference, *embedded = _embed(tower, groups, on)
    return [
        GroupDamage(
            title=group.title,
            nodes=group.nodes,
            divergence=estimate_mean(
                row_divergence(found, reference, on.others, on.logit_scale)
            ).interval,
            cosine_loss=estimate_mean(1 - cosines(found, reference)).interval,
        )
        for group, found in zip(groups, embedded, strict=True)
    ]


def _embed(
    tower: SwitchedTower, groups: Sequence[NodeGroup], on: SensitivityInputs
) -> list[FloatArray]:
    """Embed all inputs in float, and with each group quantized: float32 [N, dim] each."""
    wanted: list[tuple[str, ...]] = [(), *(group.nodes for group in groups)]
    parts: list[list[FloatArray]] = [[] for _ in wanted]
    total = len(wanted) * sum(map(len, on.inputs))
    hidden = not sys.stderr.isatty()
    with tqdm(desc="sensitivity", total=total, unit="input", leave=False, disable=hidden) as bar:
        for values in on.inputs:
            for part, nodes in zip(parts, wanted, strict=True):
                part.append(_run(tower, values, nodes, on))
                bar.update(len(values))
    return [np.concatenate(part) for part in parts]


def _run(
    tower: SwitchedTower, values: NDArray[Any], nodes: tuple[str, ...], on: SensitivityInputs
) -> FloatArray:
    return in_batches(lambda piece: tower.run(on.feed(piece), nodes), values, fixed_batch=on.batch)[
        on.output
    ]


def _bad(groups: Sequence[NodeGroup], found: Sequence[GroupDamage]) -> list[NodeGroup]:
    """Return the groups of several nodes with much more damage than the mean."""
    limit = _BAD * np.mean([item.divergence.value for item in found])
    return [
        group
        for group, item in zip(groups, found, strict=True)
        if len(group.nodes) > 1 and item.divergence.value > limit
    ]


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
