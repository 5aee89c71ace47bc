"""Define graph passes: exact rewrites that some engines run faster."""

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
from onnxscript.rewriter.pattern import (
    MatchResult,
    RewriteRule,
    RewriteRuleClassBase,
    RewriteRuleSet,
)

from edgeclip.runtime.device.device_profile import DeviceProfile, EngineName

_HEADS_FIRST, _KEYS_LAST = [0, 2, 1, 3], [0, 2, 3, 1]


class _Attention(RewriteRuleClassBase):
    """Rewrite softmax(q k^T scale [+ mask]) v to MultiHeadAttention.

    q, k, v are [N, L, width], cut into heads by a Reshape and a Transpose; the result is
    joined to [N, L, width] again.
    """

    def __init__(self, name: str, masked: bool) -> None:
        super().__init__(name)
        self._masked = masked

    def pattern(
        self,
        op: Any,
        query: Any,
        key: Any,
        value: Any,
        query_shape: Any,
        key_shape: Any,
        value_shape: Any,
        joined_shape: Any,
        scale: Any,
        mask: Any,
    ) -> Any:
        """Return the pattern to match."""
        q = op.Transpose(op.Reshape(query, query_shape, _outputs=["heads"]), perm=_HEADS_FIRST)
        k = op.Transpose(op.Reshape(key, key_shape), perm=_KEYS_LAST)
        v = op.Transpose(op.Reshape(value, value_shape), perm=_HEADS_FIRST)
        scores = op.Mul(op.MatMul(q, k), scale)
        if self._masked:
            scores = op.Add(scores, mask)
        mixed = op.Transpose(op.MatMul(op.Softmax(scores, axis=-1), v), perm=_HEADS_FIRST)
        return op.Reshape(mixed, joined_shape)

    def check(self, op: Any, *args: Any, **values: Any) -> MatchResult:
        """Check that scale and sizes are constants."""
        query, heads, scale = values["query"], values["heads"], values["scale"]
        result = MatchResult()
        factor = ir.convenience.get_const_tensor(scale)
        if factor is None or factor.size != 1:
            return result.fail("the scale is no constant")
        if _last(query) is None or _last(heads) is None:
            return result.fail("the number of heads is unknown")
        return result

    def rewrite(
        self, op: Any, query: Any, key: Any, value: Any, heads: Any, scale: Any, mask: Any, **_: Any
    ) -> Any:
        """Return the replacement."""
        width, size = _last(query), _last(heads)
        assert width is not None
        assert size is not None
        given = [query, key, value, *([None, None, mask] if self._masked else [])]
        return op.MultiHeadAttention(
            *given,
            num_heads=width // size,
            scale=float(np.asarray(ir.convenience.get_const_tensor(scale)).reshape(())),
            _domain="com.microsoft",
        )


def _last(value: ir.Value) -> int | None:
    """Return the last dimension of a value, if shape inference knows it."""
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def _rule(name: str, *, masked: bool) -> RewriteRule:
    made: RewriteRule = _Attention.rule(name, masked=masked)  # type: ignore[no-untyped-call]
    return made


_RULES = RewriteRuleSet([_rule("attention", masked=False), _rule("masked_attention", masked=True)])


def fuse_attention(model: ir.Model) -> int:
    """Replace attention by MultiHeadAttention (com.microsoft), in place; return how often.

    Shapes must have been inferred.
    """
    return int(_RULES.apply_to_model(model))


# Engines with ONNX Runtime's own operators. Its other providers would hand them to the CPU.
_ORT: frozenset[EngineName] = frozenset({"onnxruntime-cpu", "onnxruntime-cuda"})


@dataclass(frozen=True, slots=True)
class GraphPass:
    """A rewrite that keeps the results, except for rounding.

    Attributes:
        name: short name in messages and records.
        change: rewrites the graph in place, after shape inference; returns the number of places.
        engines: engines that can run the result; None if it is standard ONNX.
    """

    name: str
    change: Callable[[ir.Model], int]
    engines: frozenset[EngineName] | None = None

    def apply(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
        """Return a rewritten copy, its nodes in topological order, and the number of places."""
        made = ir.from_proto(model)
        common.ShapeInferencePass()(made)
        places = self.change(made)
        Sequential(common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(made)
        return ir.to_proto(made), places


def passes_for(device: DeviceProfile, *, standard: bool = False) -> tuple[GraphPass, ...]:
    """Return the passes to try on a device; with `standard` only those that any engine can read."""
    return tuple(
        item
        for item in PASSES
        if item.engines is None or (not standard and device.engine in item.engines)
    )


def simplify(model: ir.Model) -> int:
    """Fold constants, drop duplicate and unused nodes; return the number of nodes removed."""
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
    """Merge products of the same input, such as queries, keys and values, into one wide product.

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
    """Fuse GELUs written with erf, and the bias before them; return how many.

    ONNX Runtime does not recognise them in the order in which torch's exporter writes them.
    """
    found = int(fuse_erfgelu(model))
    fuse_bias_gelu(model)
    return found


def fuse_skip_norm(model: ir.Model) -> int:
    """Fuse residual sums with the LayerNormalization after them; return how many."""
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
    """The addition after a product, and its constant operand [width]."""

    add: ir.Node
    value: ir.Value


def _sharing_input(graph: ir.Graph) -> list[list[ir.Node]]:
    """Return groups of products of the same value with constant weights [depth, width]."""
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
