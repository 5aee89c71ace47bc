"""Attention as one operator of ONNX Runtime, from the pieces that torch's exporter writes.

The fusions that come with onnxruntime.transformers and onnxscript know other pieces than
these; neither finds any attention in an exported CLIP tower.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import (
    MatchResult,
    RewriteRule,
    RewriteRuleClassBase,
    RewriteRuleSet,
)

_HEADS_FIRST, _KEYS_LAST = [0, 2, 1, 3], [0, 2, 3, 1]


class _Attention(RewriteRuleClassBase):
    """softmax(q k^T scale [+ mask]) v -> MultiHeadAttention.

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
        """Return what is looked for."""
        q = op.Transpose(op.Reshape(query, query_shape, _outputs=["heads"]), perm=_HEADS_FIRST)
        k = op.Transpose(op.Reshape(key, key_shape), perm=_KEYS_LAST)
        v = op.Transpose(op.Reshape(value, value_shape), perm=_HEADS_FIRST)
        scores = op.Mul(op.MatMul(q, k), scale)
        if self._masked:
            scores = op.Add(scores, mask)
        mixed = op.Transpose(op.MatMul(op.Softmax(scores, axis=-1), v), perm=_HEADS_FIRST)
        return op.Reshape(mixed, joined_shape)

    def check(self, op: Any, *args: Any, **values: Any) -> MatchResult:
        """Tell whether scale and sizes are constants."""
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
        """Return what takes its place."""
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
    """The last size of a value, if shape inference knows it."""
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
