"""Store a tower's weights in 4 or 8 bits; activations stay float (for size, not for speed).

A weight [inputs, outputs] is cut into blocks of `block` inputs for each output, and each block
w becomes whole numbers q with a scale s and a zero point z: w ~ (q - z) * s. With 8 bits they
are s = max|w| / 127, z = 128. With 4 bits s = (high - low) / 15, z = round(-low / s), where
`low` and `high` are the extremes of the block and 0, both drawn in by the share that makes the
squared error of the block smallest. The last product gives the embedding, and no
layer behind it averages its rounding error out, so it always takes 8 bits: that costs the
built-in text tower 3% of its bytes and avoids two thirds of its loss.

ONNX Runtime multiplies them as MatMulNBits (com.microsoft). With `accuracy_level` 4 its CPU
kernels round each row of the activations to int8 block by block: several times faster with 8
bits than to leave them in float, hardly less exact, and no row depends on another. So unlike with
`dynamic_int8` an embedding does not depend on its batch, and no calibration is needed. Engines
without MatMulNBits, such as TensorRT and OpenVINO, do not read these graphs.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphEdit, attribute
from edgeclip.export.quantizing.dynamic_int8 import quantize_token_tables
from edgeclip.export.quantizing.static_int8 import quantizable_nodes

_DOMAIN = "com.microsoft"
_IN_INT8 = 4  # accuracy_level: what the activations are rounded to
_SHARES = np.linspace(1, 0.7, 7)  # of a block's range, of which the best is used


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the layout of MatMulNBits.

    Attributes:
        packed: uint8 [outputs, blocks, bytes of a block]; of 4 bits, the first is the low half.
        scales: float32 [outputs * blocks].
        zeros: uint8 [outputs * bytes], packed like the weights; None for the middle.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None


def write_weight_only(
    source: Path, target: Path, *, bits: int, block: int, kept: Collection[str] = ()
) -> None:
    """Store the weights of a tower's products in 4 or 8 bits, and its token table in int8.

    Args:
        source, target: the ONNX files.
        bits: 4 or 8, of all products but the last, which takes 8.
        block: inputs that share a scale: a power of two from 16 on.
        kept: names of nodes whose weights stay as they are.

    Raises:
        ExportError: there is no such weight, or the result is not valid ONNX.
    """
    model = load_graph(source)
    *_, last = able = quantizable_nodes(source)
    chosen = set(able) - set(kept)
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    constants: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    done = 0
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.name in chosen else None
        if weight is None or not _is_plain(node, weight):
            nodes.append(node)
            continue
        width = 8 if node.name == last else bits
        nodes += _packed_product(node, weight, width, block, constants)
        done += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants.values())
    if done + quantize_token_tables(model, kept) == 0:
        raise ExportError(f"{source.name} has no weights that could be stored in {bits} bits")
    GraphEdit(model).drop_unread()
    if all(item.domain != _DOMAIN for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    save_graph(model, target)


def pack(weight: NDArray[np.floating], bits: int, block: int) -> PackedWeight:
    """Quantize and pack a weight [inputs, outputs]; each output's last block is zero-padded."""
    inputs, outputs = weight.shape
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block))
    padded[:, :inputs] = weight.T
    parts = padded.reshape(outputs, blocks, block)
    if bits == 8:
        whole, scales = _symmetric(parts)
        return PackedWeight(whole, scales.reshape(-1), None)
    whole, scales, zeros = _asymmetric(parts)
    return PackedWeight(_halves(whole), scales.reshape(-1), _halves(zeros).reshape(-1))


def _symmetric(parts: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round blocks [..., block] to 8 bits around 128; return them and their scales [...]."""
    scales = (np.abs(parts).max(axis=-1) / 127).astype(np.float32)
    scales[scales == 0] = 1
    return (np.rint(parts / scales[..., None]) + 128).astype(np.uint8), scales


def _asymmetric(
    parts: NDArray[np.float64],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Round blocks [..., block] to 4 bits; return them, their scales and zero points [...]."""
    low = np.minimum(parts.min(axis=-1), 0)
    high = np.maximum(parts.max(axis=-1), 0)
    least = np.full(low.shape, np.inf)
    best = np.zeros(parts.shape, np.uint8), np.ones(low.shape, np.float32), np.zeros_like(low)
    for share in _SHARES:
        scales = (share * (high - low) / 15).astype(np.float32)
        scales[scales == 0] = 1
        zeros = np.rint(-share * low / scales)
        whole = np.clip(np.rint(parts / scales[..., None]) + zeros[..., None], 0, 15)
        error = np.square((whole - zeros[..., None]) * scales[..., None] - parts).sum(axis=-1)
        better = error < least
        least = np.where(better, error, least)
        best = (
            np.where(better[..., None], whole, best[0]).astype(np.uint8),
            np.where(better, scales, best[1]),
            np.where(better, zeros, best[2]),
        )
    return best[0], best[1], best[2].astype(np.uint8)


def _halves(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack pairs of 4-bit numbers on the last axis into bytes, the first in the low half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return np.asarray(values[..., ::2] | values[..., 1::2] << 4, np.uint8)


def _is_plain(node: onnx.NodeProto, weight: NDArray[np.floating]) -> bool:
    """Return whether a node multiplies its first input by a weight and at most adds a bias."""
    if node.op_type == "Gemm":
        scaled = attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1
        return not scaled and not attribute(node, "transA", 0)
    return node.op_type == "MatMul" and weight.ndim == 2


def _packed_product(
    node: onnx.NodeProto,
    weight: NDArray[np.floating],
    bits: int,
    block: int,
    constants: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Return the MatMulNBits that replaces a node, and the Add of its bias; add its constants."""
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    plain = weight.T if transposed else weight
    stem = f"{node.input[1]}_{bits}bit" + ("_transposed" if transposed else "")
    if f"{stem}_scale" not in constants:
        made = pack(plain, bits, block)
        parts = (("weight", made.packed), ("scale", made.scales), ("zero_point", made.zeros))
        for suffix, values in parts:
            if values is not None:
                name = f"{stem}_{suffix}"
                constants[name] = numpy_helper.from_array(values, name)
    names = [f"{stem}_{suffix}" for suffix in ("weight", "scale", "zero_point")]
    has_bias = len(node.input) > 2 and bool(node.input[2])
    result = f"{node.output[0]}_unbiased" if has_bias else node.output[0]
    product = helper.make_node(
        "MatMulNBits",
        [node.input[0], *(name for name in names if name in constants)],
        [result],
        node.name,
        domain=_DOMAIN,
        K=plain.shape[0],
        N=plain.shape[1],
        bits=bits,
        block_size=block,
        accuracy_level=_IN_INT8,
    )
    if not has_bias:
        return [product]
    bias = helper.make_node("Add", [result, node.input[2]], [node.output[0]], f"{node.name}_bias")
    return [product, bias]
