"""The layers of a student that a graph's nodes come from, and how a quantized graph rounds them.

Exporter and rewrites give nodes new names, so layers are told by their weights, which are the
same numbers. A product may stand for several layers: queries, keys and values that were merged.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.fake_quantize import InputGrid, ProductGrid, ProductGrids, WeightGrid
from edgeclip.compress.quantization_aware import tower_parts
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import PRODUCTS, load_graph
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.edit_graph import GraphEdit, attribute
from edgeclip.runtime.spec import Tower

Layers = dict[str, nn.Module]


def product_grids(
    student: DualEncoder, tower: Tower, source: Path, quantized: Path, config: StaticInt8
) -> ProductGrids:
    """Return how each layer of a tower is rounded, by its name in `student`.

    Ranges are read from the quantized graph, so they are what calibration found, whatever its
    method; layers that stay in float are left out.

    Args:
        student: the model that `source` was exported from.
        tower: which one.
        source: its graph in fp32.
        quantized: what was made of it, without smoothing and the like: the weights are those
            of the student.
        config: says how weights are rounded.

    Raises:
        ExportError: a product of the graph is none of the student's layers, or none is
            quantized.
    """
    layers = _layers(student, tower, nn.Linear, nn.Conv2d)
    weight = WeightGrid(largest=64 if config.reduce_range else 127, per_channel=config.per_channel)
    made = GraphEdit(load_graph(quantized))
    edit = GraphEdit(load_graph(source))
    float_nodes = {node.name: node for node in edit.graph.node}
    found: dict[str, ProductGrid] = {}
    for node in made.graph.node:
        grid = _input_grid(made, node)
        if grid is None or node.name not in float_nodes:
            continue
        for name in list(_layers_of(edit, float_nodes[node.name], layers)):
            found[name] = ProductGrid(input=grid, weight=weight)
            layers[name] = layers.pop(name)  # to the end: a layer with the same weights is next
    if not found:
        raise ExportError(f"{quantized.name} has no quantized product of the {tower} tower")
    return found


def norm_names(
    student: DualEncoder, tower: Tower, source: Path, nodes: Sequence[str]
) -> dict[str, str]:
    """Return the names of the student's norms that LayerNormalization nodes come from.

    Raises:
        ExportError: a node is none of them.
    """
    edit = GraphEdit(load_graph(source))
    norms = _layers(student, tower, nn.LayerNorm)
    return {name: _norm_of(edit, name, norms) for name in nodes}


def _layers(student: DualEncoder, tower: Tower, *kinds: type[nn.Module]) -> Layers:
    parts = tower_parts(tower)
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, kinds) and name.startswith(parts)
    }


def _input_grid(edit: GraphEdit, node: onnx.NodeProto) -> InputGrid | None:
    """How a product's input is quantized; None if it is not, or the node is no product."""
    if node.op_type not in PRODUCTS:
        return None
    given, weight = (edit.maker(name) for name in node.input[:2])
    if given is None or weight is None:
        return None
    if {given.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    scale, zero = (edit.needed(given, place) for place in (1, 2))
    limits = np.iinfo(zero.dtype)
    return InputGrid(
        scale=float(scale.item()),
        zero=int(zero.item()),
        lowest=int(limits.min),
        highest=int(limits.max),
    )


def _layers_of(edit: GraphEdit, node: onnx.NodeProto, layers: Layers) -> Iterator[str]:
    """Yield the names of the layers whose weights stand in a product's, one after another."""
    weight = _by_output(edit, node)
    start = 0
    while start < len(weight):
        name = next((item for item in layers if _begins(weight[start:], layers[item])), None)
        if name is None:
            raise ExportError(
                f"{node.name} is no layer of the student, so what quantizing does to it cannot "
                "be imitated: export the student again"
            )
        yield name
        start += len(_values(layers[name].weight))


def _by_output(edit: GraphEdit, node: onnx.NodeProto) -> NDArray[Any]:
    """Return a product's weight as torch has it: [outputs, inputs], or that of a Conv."""
    weight = edit.needed(node, 1)
    as_torch = node.op_type == "Conv" or attribute(node, "transB", 0)
    return weight if as_torch else weight.T


def _begins(weight: NDArray[Any], layer: nn.Module) -> bool:
    own = _values(layer.weight)
    return own.shape[1:] == weight.shape[1:] and np.array_equal(own, weight[: len(own)])


def _norm_of(edit: GraphEdit, name: str, norms: Layers) -> str:
    """Norms that were never trained are all alike: then the name of the scale tells."""
    node = edit.node(name)
    if node is not None and node.op_type == "LayerNormalization":
        same = [item for item, norm in norms.items() if _is_norm(edit, node, norm)]
        scale = node.input[1].removesuffix(".weight")
        found = [item for item in same if scale.endswith(item.removeprefix("model."))] or same
        if len(found) == 1:
            return found[0]
    raise ExportError(f"{name} is no LayerNorm of the student, so it cannot be smoothed there")


def _is_norm(edit: GraphEdit, node: onnx.NodeProto, norm: nn.Module) -> bool:
    parts = [item for item in (norm.weight, norm.bias) if item is not None]
    stored = [edit.constant(node, place) for place in range(1, len(node.input))]
    return len(parts) == len(stored) and all(
        one is not None and np.array_equal(one, _values(part))
        for one, part in zip(stored, parts, strict=True)
    )


def _values(weight: Any) -> NDArray[Any]:
    assert isinstance(weight, torch.Tensor)
    values: NDArray[Any] = weight.detach().cpu().numpy()
    return values
