"""Count the operations and bytes of a graph node from its operator and tensor shapes.

Products count 2 for a multiply-add and nothing for a bias, as is the custom. Elsewhere each
scalar operation counts 1, an `exp` or `erf` too. Operators are those of ONNX and of ONNX
Runtime's own fusions (github.com/microsoft/onnxruntime, docs/ContribOperators.md), without
their domain, which traces do not tell.
"""

import math
from collections.abc import Sequence

TensorType = tuple[str, tuple[int, ...]]  # such as ("float", (1, 65, 128))
Tensors = Sequence[TensorType]

_BITS = {
    **dict.fromkeys(("int4x2", "uint4x2", "float4e2m1x2"), 4),
    **dict.fromkeys(("bool", "int8", "uint8"), 8),
    **dict.fromkeys(("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"), 8),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 16),
    **dict.fromkeys(("float", "int32", "uint32"), 32),
    **dict.fromkeys(("double", "int64", "uint64"), 64),
}
_PACKED = {"MatMulNBits", "MatMulBnb4", "MatMulFpQ4"}  # weights in blocks of their own shape
_PRODUCTS = _PACKED | {
    *("DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "FusedMatMulActivation", "Gemm"),
    *("GemmFastGelu", "GemmFloat8", "MatMul", "MatMulInteger", "MatMulInteger16"),
    *("MatMulIntegerToFloat", "QGemm", "TransposeMatMul"),
}
_TENSORRT_PRODUCTS = {"convolution", "gemm", "matrixmultiply"}  # as its engine inspector says
_CONVOLUTIONS = {"Conv", "ConvInteger", "FusedConv", "NhwcConv", "NhwcFusedConv"}
_ATTENTIONS = {"Attention", "MultiHeadAttention", "QAttention"}
_MOVES = {
    *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand"),
    *("Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MemcpyFromHost"),
    *("MemcpyToHost", "OneHot", "Pad", "ReorderInput", "ReorderOutput", "Reshape"),
    *("ScatterElements", "ScatterND", "Shape", "Size", "Slice", "SpaceToDepth", "Split"),
    *("Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
}
_MOVES_NOTHING = {"Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze"}
_MOVES_NOTHING |= {"Unsqueeze"}  # ONNX Runtime gives them their input's memory
_READS_A_PART = {"Gather", "GatherElements", "GatherND", "Slice"}  # of the first input

# Sum, difference, square, sum, product, scale and shift for each value.
_NORM = 7
_PER_OUTPUT = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Neg", "Abs"), 1),
    **dict.fromkeys(("And", "Or", "Xor", "Not", "Equal", "Greater", "Less", "IsNaN"), 1),
    **dict.fromkeys(("GreaterOrEqual", "LessOrEqual", "Sqrt", "Reciprocal", "Exp", "Log"), 1),
    **dict.fromkeys(("Erf", "Tanh", "Sin", "Cos", "Sigmoid", "Relu", "Floor", "Ceil"), 1),
    **dict.fromkeys(("Round", "Sign", "Sum", "CumSum", "Range"), 1),
    **dict.fromkeys(("Clip", "LeakyRelu", "DequantizeLinear", "BatchNormalization"), 2),
    **dict.fromkeys(("QuantizeLinear", "QuickGelu", "RotaryEmbedding"), 3),
    **dict.fromkeys(("SimplifiedLayerNormalization", "RMSNormalization"), 4),
    **dict.fromkeys(("Gelu", "Softmax", "LogSoftmax", "SkipSimplifiedLayerNormalization"), 5),
    **dict.fromkeys(("BiasGelu", "BiasSoftmax"), 6),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNorm"), _NORM),
    "GroupNormalization": _NORM,
    "SkipLayerNormalization": _NORM + 1,
    "FastGelu": 9,
}
_PER_INPUT = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), 1),
    **dict.fromkeys(("ArgMax", "ArgMin", "GlobalAveragePool", "GlobalMaxPool"), 1),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare"), 2),
    **dict.fromkeys(("ReduceLogSumExp", "LpNormalization"), 3),
    "DynamicQuantizeLinear": 5,
}


def node_flops(op: str, inputs: Tensors, outputs: Tensors) -> float | None:
    """Count the operations of one run of a node; None where op and shapes do not tell.

    Args:
        op: operator, such as "MatMul".
        inputs: types and shapes in order; those that are missing are left out.
        outputs: likewise.
    """
    kind = _kind(op)
    if kind in _MOVES:
        return 0.0
    if not inputs or not outputs:
        return None
    given, made = inputs[0][1], outputs[0][1]
    if kind in _PER_OUTPUT:
        return float(_PER_OUTPUT[kind] * math.prod(made))
    if kind in _PER_INPUT:
        return float(_PER_INPUT[kind] * math.prod(given))
    if kind in _PRODUCTS:
        inner = _inner(given, made)
        return None if inner is None else 2.0 * inner * math.prod(made)
    if kind in _CONVOLUTIONS:
        weights = _kernel(inputs, outputs)
        return None if weights is None else 2.0 * math.prod(made) * math.prod(weights[1:])
    if kind == "ConvTranspose":
        weights = inputs[1][1] if len(inputs) > 1 else ()
        same = len(weights) == len(given)
        return 2.0 * math.prod(given) * math.prod(weights[1:]) if same else None
    return _attention(inputs, outputs) if kind in _ATTENTIONS else None


def node_bytes(op: str, inputs: Tensors, outputs: Tensors) -> float | None:
    """Count the bytes that one run of a node reads and writes at least; None if not known.

    Weights count like other inputs. ONNX Runtime's CPU kernels keep their own copy of constant
    weights and take them off the list of inputs (`session.disable_prepacking`): a product
    without them has None.
    """
    kind = _kind(op)
    if kind in _MOVES_NOTHING:
        return 0.0
    if kind in _READS_A_PART:
        return _size([*inputs[1:], *outputs, *outputs])
    known = kind in _MOVES or kind in _PER_OUTPUT or kind in _PER_INPUT
    return _size([*inputs, *outputs]) if known or _has_weights(kind, inputs, outputs) else None


def is_product(op: str) -> bool:
    """Whether nearly all of a node's operations are multiply-adds."""
    products = _PRODUCTS | _CONVOLUTIONS | _ATTENTIONS | _TENSORRT_PRODUCTS
    return _kind(op) in products


def _kind(op: str) -> str:
    """Return the plain form of a quantized operator: "QLinearConv" is a Conv."""
    return op.removeprefix("QLinear")


def _inner(left: tuple[int, ...], made: tuple[int, ...]) -> int | None:
    """K of [.., M, K] x [.., K, N]; the left matrix may be transposed."""
    if not left:
        return None
    if len(left) == 1 or len(made) < len(left):  # one of them is a vector
        return left[-1]
    rows = made[-2]
    if rows == 0:
        return 0
    inner, rest = divmod(left[-2] * left[-1], rows)
    return inner if rest == 0 else None


def _kernel(inputs: Tensors, outputs: Tensors) -> tuple[int, ...] | None:
    """Shape [out, in / groups, ...] of a convolution's weights; channels may come last."""
    made = outputs[0][1]
    if len(made) < 3:
        return None
    fits = (
        shape
        for _, shape in inputs[1:]
        if len(shape) == len(made) and shape[0] in (made[1], made[-1])
    )
    return next(fits, None)


def _attention(inputs: Tensors, outputs: Tensors) -> float | None:
    """Products of an attention, its projection included where it has one; softmax is not.

    Known forms: ONNX Runtime's own `Attention` [batch, S, in] with weights [in, 3 x width],
    and separate query, key and value [batch, length, width] or [batch, heads, length, size].
    """
    shapes = [shape for _, shape in inputs]
    query, made = shapes[0], outputs[0][1]
    if len(query) == 3 and len(shapes) > 1 and len(shapes[1]) == 2 and len(made) == 3:
        batch, length, width = query[0], query[1], made[-1]
        if shapes[1] != (query[2], 3 * width):  # heads of other sizes, or weights left out
            return None
        return 2.0 * batch * length * (math.prod(shapes[1]) + 2 * length * width)
    if len(shapes) < 3 or not len(query) == len(shapes[1]) == len(shapes[2]) in (3, 4):
        return None
    if any(len(shape) == 4 for shape in shapes[3:]):  # a mask, or what was seen before
        return None
    length = shapes[1][-2]
    scores = math.prod(query[:-1]) * length
    return 2.0 * scores * (query[-1] + made[-1]) if shapes[2][-2] == length else None


def _has_weights(kind: str, inputs: Tensors, outputs: Tensors) -> bool:
    """Whether both operands of a product are among its inputs."""
    if not inputs or not outputs or not is_product(kind):
        return False
    if kind in _CONVOLUTIONS:
        return _kernel(inputs, outputs) is not None
    if kind in _ATTENTIONS:
        return _attention(inputs, outputs) is not None
    made = outputs[0][1]
    inner, columns = _inner(inputs[0][1], made), made[-1] if made else 1
    rest = [shape for _, shape in inputs[1:]]
    if kind in _PACKED:  # at least one bit a weight
        return any(8 * math.prod(shape) >= (inner or 0) * columns for shape in rest)
    if len(made) < len(inputs[0][1]):  # times a vector
        return any(shape == (inner,) for shape in rest)
    return any(shape[-2:] in ((inner, columns), (columns, inner)) for shape in rest)


def _size(tensors: Tensors) -> float | None:
    bits = [_BITS.get(kind.lower(), 0) * math.prod(shape) for kind, shape in tensors]
    known = all(kind.lower() in _BITS for kind, _ in tensors)
    return sum(bits) / 8 if known else None
