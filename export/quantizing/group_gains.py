"""What quantizing each group of products saves, as a share of the float tower's time.

On the device itself ONNX Runtime's profiler tells how long every node takes, in float and
quantized: two short runs for all groups. A group's time is that of its products, of the
quantizing before them and of the sums that directly read their results, because engines merge
biases into some kinds of products. Some products are slower in int8 than in float: small ones, and
those that an engine has no good kernel for. Elsewhere the share of the tower's multiply-adds
stands in.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from edgeclip.export.quantizing.node_groups import NodeGroup
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.inspecting.layer_times import LayerProfile
from edgeclip.runtime.inspecting.profile_layers import profile_layers_of
from edgeclip.runtime.json_record import JsonRecord

_RUNS = 40
_WARM_UP = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupGain:
    """What a group saves.

    Attributes:
        nodes: names of its products.
        saved: share of the float tower's time that quantizing it saves, below 0 if it costs
            time; its share of the multiply-adds where nothing was measured.
    """

    nodes: tuple[str, ...]
    saved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains(JsonRecord):
    """What every group of a tower saves.

    Attributes:
        groups: in the graph's order.
        measured: whether they were timed on the device.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "gains"
    MEND: ClassVar[str] = "delete it and search again"

    groups: tuple[GroupGain, ...]
    measured: bool

    def of(self, nodes: Iterable[str]) -> float:
        """Return what some products save; a part of a group takes its share by number."""
        saved = {node: item.saved / len(item.nodes) for item in self.groups for node in item.nodes}
        return sum(saved.get(node, 0.0) for node in nodes)


def measured_gains(
    source: Path,
    written: Path,
    groups: Sequence[NodeGroup],
    feed: Mapping[str, NDArray[Any]],
    device: DeviceProfile,
) -> Gains:
    """Profile both graphs on this machine, which is the device.

    Args:
        source: the tower in fp32.
        written: the same with all groups quantized; its nodes have kept their names.
        groups: what is asked about.
        feed: one input by its name.
        device: whose engine is ONNX Runtime.

    Raises:
        EngineError: a graph cannot be run or profiled.
    """
    graphs = [onnx.load(path, load_external_data=False).graph for path in (source, written)]
    before, after = (
        profile_layers_of(path, feed, device, runs=_RUNS, warm_up=_WARM_UP)
        for path in (source, written)
    )
    times = [_times(profile) for profile in (before, after)]
    # Medians by node: whole runs have some node stopped by another program more often.
    total = sum(times[0].values()) or 1.0
    gains = []
    for group in groups:
        float_ms, whole_ms = (
            _spent(figures, _around(graph, group))
            for figures, graph in zip(times, graphs, strict=True)
        )
        saved = (float_ms - whole_ms) / total
        gains.append(GroupGain(nodes=group.nodes, saved=saved))
    return Gains(groups=tuple(gains), measured=True)


def counted_gains(
    source: Path,
    groups: Sequence[NodeGroup],
    feed: Mapping[str, NDArray[Any]],
    device: DeviceProfile,
) -> Gains:
    """Count multiply-adds; `device` is any that can run the graph here.

    Raises:
        EngineError: the graph cannot be run.
    """
    layers = profile_layers_of(source, feed, device, runs=1, warm_up=0).layers
    work = {layer.name: layer.flops or 0.0 for layer in layers}
    total = sum(work.values()) or 1.0
    gains = tuple(
        GroupGain(nodes=group.nodes, saved=_spent(work, group.nodes) / total) for group in groups
    )
    return Gains(groups=gains, measured=False)


def _times(profile: LayerProfile) -> dict[str, float]:
    """Milliseconds by name; names may repeat."""
    found: dict[str, float] = {}
    for layer in profile.layers:
        found[layer.name] = found.get(layer.name, 0.0) + layer.ms
    return found


def _spent(figures: Mapping[str, float], names: Iterable[str]) -> float:
    return sum(figures.get(name, 0.0) for name in names)


def _around(graph: onnx.GraphProto, group: NodeGroup) -> set[str]:
    """Names of a group's products, of what quantizes for them, and of sums that read them."""
    products = [node for node in graph.node if node.name in group.nodes]
    made = {name for node in products for name in node.output}
    given = {name for node in products for name in node.input}
    dequantized = [node for node in graph.node if given & set(node.output)]
    whole = {
        name
        for node in dequantized
        if node.op_type == "DequantizeLinear"
        for name in node.input[:1]
    }
    quantizers = [
        node for node in graph.node if node.op_type == "QuantizeLinear" and whole & set(node.output)
    ]
    readers = [node for node in graph.node if made & set(node.input) and node.op_type == "Add"]
    return {node.name for node in (*products, *quantizers, *readers)}
