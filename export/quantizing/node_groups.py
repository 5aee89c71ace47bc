"""Groups of products that are quantized together, and names for them that a person knows.

Products that read the same value share its quantizing: the projections to query, key and
value of one block, or each of the other products alone. That holds for every family of
models, so groups follow from the graph and not from names.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgeclip.export.graph import constant_names
from edgeclip.export.quantize import quantizable_nodes

# A parameter's name from its block on: layers.3.mlp.fc1, stages.0.layers.2.pwconv1
_BLOCK = re.compile(r"(?:^|\.)((?:layers?|blocks?|stages?|resblocks|h)\.\d+\..+)")
_ENDING = re.compile(r"\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Products of one value.

    Attributes:
        title: for people.
        nodes: names of the products.
        names: of each product alone, for people.
    """

    title: str
    nodes: tuple[str, ...]
    names: tuple[str, ...]

    def singles(self) -> tuple["NodeGroup", ...]:
        """Return each of its nodes as a group of its own."""
        pairs = zip(self.names, self.nodes, strict=True)
        return tuple(NodeGroup(name, (node,), (name,)) for name, node in pairs)


def node_groups(path: Path) -> tuple[NodeGroup, ...]:
    """Group what can be quantized in a graph, in its order.

    Raises:
        ExportError: there is nothing.
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
    """What a graph's products are called in the model that it was made of."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._constants = constant_names(model)
        self._maker = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def of(self, nodes: Sequence[onnx.NodeProto]) -> str:
        """Name some products of one value."""
        known = [name for node in nodes if (name := self._module(node))]
        if len(known) == len(nodes):
            return _joined(known)
        norm = self._maker.get(nodes[0].input[0])
        if norm is not None and norm.op_type == "LayerNormalization":
            return f"behind {_short(norm.input[1])}"
        return "+".join(node.name for node in nodes)

    def one(self, node: onnx.NodeProto) -> str:
        """Name one of several products of a value."""
        return self._module(node) or node.name

    def _module(self, node: onnx.NodeProto) -> str | None:
        """Return the module whose weight or bias a product has; None where names are lost."""
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
    """Return a parameter's module, from its block on."""
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
