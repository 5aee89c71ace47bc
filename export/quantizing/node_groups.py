"""Group products that share an input, and measure the time that quantizing each group saves."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from edgeclip.export.graph.graph_io import constant_names
from edgeclip.export.graph.graph_values import GraphEdit
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.profiles.layers.layer_profile import profile_layers_of
from edgeclip.profiles.layers.node_costs import is_product
from edgeclip.profiles.record.measurement import LayerTime
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.device_profile import DeviceProfile

# A parameter's name from its block on: layers.3.mlp.fc1, stages.0.layers.2.pwconv1
_BLOCK = re.compile(r"(?:^|\.)((?:layers?|blocks?|stages?|resblocks|h)\.\d+\..+)")
_ENDING = re.compile(r"\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Products of the same input value.

    Attributes:
        title: shown to the user.
        nodes: names of the products in the graph.
        names: name of each product, as shown to the user.
    """

    title: str
    nodes: tuple[str, ...]
    names: tuple[str, ...]

    def singles(self) -> tuple["NodeGroup", ...]:
        """Return each of its nodes as a group of its own."""
        pairs = zip(self.names, self.nodes, strict=True)
        return tuple(NodeGroup(name, (node,), (name,)) for name, node in pairs)


def node_groups(path: Path) -> tuple[NodeGroup, ...]:
    """Group the quantizable products of a graph by their input, in the graph's order.

    Raises:
        ExportError: there is none.
    """
    names = set(quantizable_nodes(path))
    model = onnx.load(path, load_external_data=False)
    chosen = [node for node in model.graph.node if node.name in names]
    by_input: dict[str, list[onnx.NodeProto]] = {}
    for node in chosen:
        by_input.setdefault(node.input[0], []).append(node)
    titles = _Titles(model)
    return tuple(
        NodeGroup(
            titles.of(nodes),
            tuple(node.name for node in nodes),
            tuple(titles.of([node]) if len(nodes) == 1 else titles.one(node) for node in nodes),
        )
        for nodes in by_input.values()
    )


class _Titles:
    """Names of a graph's products in the torch model that it was exported from."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._constants = constant_names(model)
        self._maker = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def of(self, nodes: Sequence[onnx.NodeProto]) -> str:
        """Return one name for products of the same value."""
        known = [name for node in nodes if (name := self._module(node))]
        if len(known) == len(nodes):
            return _joined(known)
        norm = self._maker.get(nodes[0].input[0])
        if norm is not None and norm.op_type == "LayerNormalization":
            return f"behind {_short(norm.input[1])}"
        return "+".join(node.name for node in nodes)

    def one(self, node: onnx.NodeProto) -> str:
        """Return the name of one of several products of a value."""
        return self._module(node) or node.name

    def _module(self, node: onnx.NodeProto) -> str | None:
        """Return the module that owns a product's weight or bias; None where names were lost."""
        added = [
            name
            for reader in self._readers.get(node.output[0], [])
            if reader.op_type == "Add"
            for name in reader.input
        ]
        for name in (*node.input[1:], *added):
            if name in self._constants and _ENDING.search(name):
                return _short(name)
        return None


def _short(parameter: str) -> str:
    """Return the module of a parameter, from its block on."""
    stem = _ENDING.sub("", parameter)
    found = _BLOCK.search(stem)
    return found[1] if found else stem


def _joined(names: Sequence[str]) -> str:
    """Join names that begin alike: layers.0.self_attn.q_proj+k_proj+v_proj."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    levels = zip(*parts, strict=False)
    same = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    head, tails = ".".join(parts[0][:same]), [".".join(part[same:]) for part in parts]
    return ".".join(filter(None, [head, "+".join(tails)]))


_RUNS = 40
_WARM_UP = 10
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
# What ONNX Runtime adds to the names of nodes that it fuses or creates.
_ADDED = re.compile(r"^fused |(/\w+Fusion/?)?(_token_\d+)?$")
_BY_VALUE = "_nchwc"  # behind the name of a value: a convolution in another layout


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupGain:
    """The time that quantizing one group saves.

    Attributes:
        nodes: names of its products.
        saved: as a share of the float tower's time, negative if it costs time; where nothing was
            measured, the group's share of the multiply-adds.
    """

    nodes: tuple[str, ...]
    saved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains(JsonRecord):
    """The time that quantizing each group of a tower saves.

    Attributes:
        groups: gain of each group, in the graph's order.
        measured: whether times were measured on the device, or operations counted.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "gains"
    HINT: ClassVar[str] = "delete it and search again"

    groups: tuple[GroupGain, ...]
    measured: bool

    def of(self, nodes: Iterable[str]) -> float:
        """Return what some products save; a group's saving is divided evenly among its products."""
        saved = {node: item.saved / len(item.nodes) for item in self.groups for node in item.nodes}
        return sum(saved.get(node, 0.0) for node in nodes)


def measured_gains(
    source: Path,
    written: Path,
    groups: Sequence[NodeGroup],
    feed: Mapping[str, NDArray[Any]],
    device: DeviceProfile,
) -> Gains:
    """Measure gains by profiling both graphs on this machine, which must be the device.

    Args:
        source: the tower in fp32.
        written: the same with all groups quantized; nodes have kept their names.
        groups: the groups to measure.
        feed: one input by its name.
        device: whose engine is ONNX Runtime.

    Raises:
        EngineError: a graph cannot be run or profiled.
    """
    before, whole = _times(source, groups, feed, device)
    after, _ = _times(written, groups, feed, device)
    return Gains(
        groups=tuple(
            GroupGain(nodes=group.nodes, saved=(float_ms - int8_ms) / (whole or 1.0))
            for group, float_ms, int8_ms in zip(groups, before, after, strict=True)
        ),
        measured=True,
    )


def counted_gains(
    source: Path,
    groups: Sequence[NodeGroup],
    feed: Mapping[str, NDArray[Any]],
    device: DeviceProfile,
) -> Gains:
    """Estimate gains by counting multiply-adds; `device` is any that can run the graph here.

    Raises:
        EngineError: the graph cannot be run.
    """
    layers = profile_layers_of(source, feed, device, runs=1, warm_up=0).layers
    products = [layer for layer in layers if is_product(layer.op)]
    work = _by_node(products, _open(source), lambda layer: layer.flops or 0.0)
    total = sum(work.values()) or 1.0
    gains = tuple(
        GroupGain(nodes=group.nodes, saved=_spent(work, group.nodes) / total) for group in groups
    )
    return Gains(groups=gains, measured=False)


def _times(
    path: Path, groups: Sequence[NodeGroup], feed: Mapping[str, NDArray[Any]], device: DeviceProfile
) -> tuple[list[float], float]:
    """Return the milliseconds of each group with its Q/DQ and Add nodes, and of the whole graph."""
    # Medians by node: in most whole runs another program interrupts some node.
    layers = profile_layers_of(path, feed, device, runs=_RUNS, warm_up=_WARM_UP).layers
    edit = _open(path)
    figures = _by_node(layers, edit, lambda layer: layer.ms)
    return [_spent(figures, _around(edit, group)) for group in groups], sum(figures.values())


def _open(path: Path) -> GraphEdit:
    return GraphEdit(onnx.load(path, load_external_data=False))


def _by_node(
    layers: Iterable[LayerTime], edit: GraphEdit, figure: Callable[[LayerTime], float]
) -> dict[str, float]:
    """Sum a figure of layers by the names of the nodes that they come from."""
    written = {node.name for node in edit.graph.node}
    found: dict[str, float] = {}
    for layer in layers:
        name = layer.name if layer.name in written else _origin(layer, edit)
        found[name] = found.get(name, 0.0) + figure(layer)
    return found


def _origin(layer: LayerTime, edit: GraphEdit) -> str:
    """Return the node that ONNX Runtime made a layer from, as far as the layer's name tells."""
    name = _ADDED.sub("", layer.name)
    if layer.op != "Conv" or not name.endswith(_BY_VALUE):
        return name
    node = edit.maker(name.removesuffix(_BY_VALUE))
    while node is not None and node.op_type != "Conv":  # an activation that was merged into it
        node = edit.maker(node.input[0])
    return name if node is None else node.name


def _spent(figures: Mapping[str, float], names: Iterable[str]) -> float:
    return sum(figures.get(name, 0.0) for name in names)


def _around(edit: GraphEdit, group: NodeGroup) -> set[str]:
    """Return the names of a group's products, of their Q/DQ nodes, and of Adds that read them."""
    found = [node for node in edit.graph.node if node.name in group.nodes]
    given = [name for node in found for name in node.input]
    made = [name for node in found for name in node.output]
    while given:
        maker = edit.maker(given.pop())
        if maker is not None and maker.op_type in _ROUNDING:
            found.append(maker)
            given += maker.input
    while made:
        for reader in edit.readers(made.pop()):
            if reader.op_type in _ROUNDING:
                made += reader.output
            if reader.op_type in (*_ROUNDING, "Add"):
                found.append(reader)
    return {node.name for node in found}
