"""Exact rewrites of a graph, each of which some engine may run faster. `tune_graph` tries them.

What ONNX Runtime does by itself when it loads a graph is not repeated here: it folds
constants, merges quick GELUs, and moves the scale of attention into the product before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_layer_normalization

from edgeclip.export.fuse_attention import fuse_attention
from edgeclip.profiles.device import DeviceProfile, EngineName

# What knows ONNX Runtime's own operators. Its other providers would hand them to the CPU.
_ORT: frozenset[EngineName] = frozenset({"onnxruntime-cpu", "onnxruntime-cuda"})


@dataclass(frozen=True, slots=True)
class GraphPass:
    """A rewrite that leaves the result as it is, but for rounding.

    Attributes:
        name: for a person.
        change: alters the graph in place, shapes having been inferred; returns in how many
            places.
        engines: those that understand the result; None where it is standard ONNX.
    """

    name: str
    change: Callable[[ir.Model], int]
    engines: frozenset[EngineName] | None = None

    def apply(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
        """Return a changed copy, its nodes in topological order, and in how many places."""
        made = ir.from_proto(model)
        common.ShapeInferencePass()(made)
        places = self.change(made)
        Sequential(common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(made)
        return ir.to_proto(made), places


def passes_for(device: DeviceProfile, *, standard: bool = False) -> tuple[GraphPass, ...]:
    """Return what is worth a try on a device; with `standard` only what any engine reads."""
    return tuple(
        item
        for item in PASSES
        if item.engines is None or (not standard and device.engine in item.engines)
    )


def simplify(model: ir.Model) -> int:
    """Fold constants, drop what is computed twice or for nothing; return how many nodes went."""
    before = len(model.graph)
    optimizer.fold_constants(model)
    Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    return before - len(model.graph)


def merge_projections(model: ir.Model) -> int:
    """Compute products of one input, such as queries, keys and values, as one wide product.

    MatMul(x, A) + a, MatMul(x, B) + b become Split(MatMul(x, [A B]) + [a b]). Returns how
    many products went into wide ones.
    """
    merged = 0
    for products in _sharing_input(model.graph):
        biases = [_bias_of(product) for product in products]
        adds = [bias for bias in biases if bias is not None]
        if len(adds) == len(products):
            _merge(model.graph, products, adds)
            merged += len(products)
    return merged


def fuse_gelu(model: ir.Model) -> int:
    """Merge GELUs written with erf, and the bias before them; return how many.

    ONNX Runtime does not recognise them in the order in which torch's exporter writes them.
    """
    found = int(fuse_erfgelu(model))
    fuse_bias_gelu(model)
    return found


def fuse_skip_norm(model: ir.Model) -> int:
    """Merge residual sums with the LayerNormalization behind them; return how many."""
    return int(fuse_skip_layer_normalization(model))


PASSES = (
    GraphPass("simplify", simplify),
    GraphPass("merge projections", merge_projections),
    GraphPass("fuse GELU", fuse_gelu, _ORT),
    GraphPass("fuse attention", fuse_attention, _ORT),
    GraphPass("fuse residual and norm", fuse_skip_norm, _ORT),
)


@dataclass(frozen=True, slots=True)
class _Bias:
    """The addition behind a product, and its constant operand [width]."""

    add: ir.Node
    value: ir.Value


def _sharing_input(graph: ir.Graph) -> list[list[ir.Node]]:
    """Groups of products with constant weights [depth, width] of the same value."""
    groups: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        given, weights = node.inputs
        if given is None or weights is None:
            continue
        constant = ir.convenience.get_const_tensor(weights)
        if constant is not None and len(constant.shape) == 2:
            groups.setdefault((given, constant.numpy().shape[0]), []).append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


def _bias_of(product: ir.Node) -> _Bias | None:
    (result,) = product.outputs
    readers = [use.node for use in result.uses()]
    if len(readers) != 1 or readers[0].op_type != "Add" or result.is_graph_output():
        return None
    for value in readers[0].inputs:
        constant = None if value is None else ir.convenience.get_const_tensor(value)
        if constant is not None and constant.shape == _weights(product).shape[-1:]:
            assert value is not None
            return _Bias(readers[0], value)
    return None


def _merge(graph: ir.Graph, products: Sequence[ir.Node], biases: Sequence[_Bias]) -> None:
    first = products[0]
    name = first.name or first.outputs[0].name or "products"
    weights = [_weights(product).numpy() for product in products]
    offsets = [_constant(bias.value).numpy() for bias in biases]
    sizes = np.array([item.shape[-1] for item in weights])
    constants = [
        _new_constant(graph, f"{name}_wide_{what}", value)
        for what, value in (
            ("weight", np.concatenate(weights, axis=-1)),
            ("bias", np.concatenate(offsets)),
            ("sizes", sizes),
        )
    ]
    product = ir.node("MatMul", [first.inputs[0], constants[0]], name=f"{name}_wide")
    add = ir.node("Add", [product.outputs[0], constants[1]], name=f"{name}_wide_bias")
    split = ir.node(
        "Split",
        [add.outputs[0], constants[2]],
        {"axis": -1},
        num_outputs=len(products),
        name=f"{name}_wide_split",
    )
    graph.insert_before(first, [product, add, split])
    for bias, value in zip(biases, split.outputs, strict=True):
        ir.convenience.replace_nodes_and_values(
            graph, bias.add, [bias.add], [], bias.add.outputs, [value]
        )
    graph.remove(products, safe=True)


def _weights(product: ir.Node) -> ir.TensorProtocol:
    return _constant(product.inputs[1])


def _constant(value: ir.Value | None) -> ir.TensorProtocol:
    found = None if value is None else ir.convenience.get_const_tensor(value)
    assert found is not None
    return found


def _new_constant(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(value.shape))
    made.dtype = tensor.dtype
    graph.register_initializer(made)
    return made
