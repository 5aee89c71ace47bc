"""Cross-layer equalisation: channels between two layers are scaled so that both layers suit int8.

If the output channel i of one layer is divided by s_i and what reads it is multiplied by s_i,
nothing changes, as long as all that lies between gives s times as much for s times as much.
With s_i = sqrt(r_i / t_i), r_i and t_i being the largest weights that make and read the channel,
both become sqrt(r_i t_i). Nagel et al., Data-Free Quantization Through Weight Equalization
and Bias Correction, ICCV 2019.

Between layers of the networks at hand lie:

- ReLU, leaky ReLU and pooling: these pairs are equalised, in convolutional networks of others.
- A mean of values, weighted by attention: the projection to values and the one behind
  attention are a pair, in every transformer.
- GELU and LayerNormalization, which mix scales up. So in a ConvNeXt there is no pair:
  depthwise convolution, norm, pointwise, GELU, pointwise, layer scale, residual sum. Its
  norms can be smoothed (`smooth`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from edgeclip.export.graph.graph import PRODUCTS
from edgeclip.export.graph.graph_values import GraphEdit, attribute, input_axis
from edgeclip.runtime.arrays import Values

# Give s times as much for s times as much, channel by channel, and keep the channels apart.
_EQUIVARIANT = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")
_HEADS_FIRST = [0, 2, 1, 3]

_ROUNDS = 20  # of a chain's pairs, each of which unsettles its neighbours
_SETTLED = 1e-3  # the largest relative change of a round after which there is no other
_LARGEST = 1e3  # and its inverse the smallest factor in one round: what is nearly 0 stays so


@dataclass(frozen=True, slots=True)
class _Part:
    """Output channels of a layer, from `start` on, with the node that adds its bias, if any."""

    layer: onnx.NodeProto
    bias: onnx.NodeProto | None = None
    place: int = 2  # of the bias among what that node reads
    start: int = 0


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two layers with nothing but scale-equivariant operators between them."""

    first: _Part
    second: onnx.NodeProto

    @property
    def name(self) -> str:
        return f"{self.first.layer.name} -> {self.second.name}"


def equalisable(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the pairs of layers that can be equalised: "FIRST -> SECOND"."""
    edit = GraphEdit(model)
    return tuple(pair.name for pair in _pairs(edit))


def equalise(model: onnx.ModelProto) -> int:
    """Equalise all pairs in place, until they are settled; return how many there are."""
    edit = GraphEdit(model)
    pairs = list(_pairs(edit))
    for _ in range(_ROUNDS):
        changes = [_balance(edit, pair) for pair in pairs]
        if max(changes, default=0.0) < _SETTLED:
            break
    edit.drop_unread()
    return len(pairs)


def _balance(edit: GraphEdit, pair: _Pair) -> float:
    """Equalise a pair; return by how much a channel changed at most."""
    made, read = _made(edit, pair.first.layer), _read(edit, pair.second)
    start, stop = pair.first.start, pair.first.start + len(read)
    sizes, needs = np.abs(made[start:stop]).max(axis=1), np.abs(read).max(axis=1)
    alive = (sizes > 0) & (needs > 0)
    factors = np.sqrt(np.where(alive, sizes, 1.0) / np.where(alive, needs, 1.0))
    factors = np.clip(factors, 1 / _LARGEST, _LARGEST)
    made[start:stop] /= factors[:, None]
    _put_made(edit, pair.first.layer, made)
    _put_read(edit, pair.second, read * factors[:, None])
    if pair.first.bias is not None:
        bias = edit.needed(pair.first.bias, pair.first.place)
        flat = bias.astype(np.float64).reshape(-1)
        flat[start:stop] /= factors
        edit.replace(pair.first.bias, pair.first.place, flat.reshape(bias.shape))
    return float(np.abs(factors - 1).max())


def _pairs(edit: GraphEdit) -> Iterator[_Pair]:
    for node in edit.graph.node:
        if not _is_layer(edit, node):
            continue
        part = _before(edit, node) or _values_before_attention(edit, node)
        if part is not None:
            yield _Pair(part, node)


def _before(edit: GraphEdit, second: onnx.NodeProto) -> _Part | None:
    """Find the layer that makes what `second` reads, through what is equivariant."""
    value = second.input[0]
    while (maker := _private_maker(edit, value)) is not None:
        if maker.op_type not in _EQUIVARIANT:
            break
        value = maker.input[0]
    part = _layer_of(edit, value)
    if part is None or (part.layer.op_type == "Conv") != (second.op_type == "Conv"):
        return None
    return part if len(_made(edit, part.layer)) == len(_read(edit, second)) else None


def _values_before_attention(edit: GraphEdit, second: onnx.NodeProto) -> _Part | None:
    """Find the projection to the values that attention mixes for `second`."""
    joined = _private_maker(edit, second.input[0])
    if joined is None or second.op_type == "Conv":
        return None
    value: str | None = None
    if joined.op_type == "MultiHeadAttention" and _is_plain(joined):
        value = joined.input[2]
    elif joined.op_type == "Reshape":
        value = _split_heads(edit, joined)
    if value is None:
        return None
    width = len(_read(edit, second))
    whole = _part_of_wide(edit, value, width)
    return whole if whole is not None else _as_wide_as(edit, _layer_of(edit, value), width)


def _is_plain(attention: onnx.NodeProto) -> bool:
    """Tell whether a fused attention adds no bias to the values, and hands on nothing else."""
    biased = len(attention.input) > 3 and attention.input[3] != ""
    return not biased and len(attention.input) < 7 and len(attention.output) == 1


def _split_heads(edit: GraphEdit, joined: onnx.NodeProto) -> str | None:
    """Return the values [N, L, width] that are mixed, head by head, and joined again.

    Reshape, Transpose, the product with the shares, Transpose, Reshape: heads and the
    channels in them keep their order.
    """
    swapped = _private_maker(edit, joined.input[0])
    mixed = _swap_of_heads(edit, swapped)
    if mixed is None or mixed.op_type != "MatMul" or edit.constant(mixed, 1) is not None:
        return None
    split = _swap_of_heads(edit, _private_maker(edit, mixed.input[1]))
    if split is None or split.op_type != "Reshape":
        return None
    return split.input[0] if edit.only_reader(split.input[0]) is not None else None


def _swap_of_heads(edit: GraphEdit, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
    """Return what makes the input of a node that swaps heads and tokens; None if it does not."""
    if node is None or node.op_type != "Transpose" or attribute(node, "perm", []) != _HEADS_FIRST:
        return None
    return _private_maker(edit, node.input[0])


def _part_of_wide(edit: GraphEdit, value: str, width: int) -> _Part | None:
    """Find the channels of a wide product of which a Split makes `value`."""
    split = _private_maker(edit, value)
    if split is None or split.op_type != "Split" or attribute(split, "axis", 0) != -1:
        return None
    sizes = edit.constant(split, 1)
    part = _layer_of(edit, split.input[0])
    if sizes is None or part is None or part.layer.op_type == "Conv":
        return None
    place = list(split.output).index(value)
    start = int(sizes[:place].sum())
    return _Part(part.layer, part.bias, part.place, start) if sizes[place] == width else None


def _as_wide_as(edit: GraphEdit, part: _Part | None, width: int) -> _Part | None:
    if part is None or part.layer.op_type == "Conv":
        return None
    return part if len(_made(edit, part.layer)) == width else None


def _layer_of(edit: GraphEdit, value: str) -> _Part | None:
    """Find the layer that makes a value which nobody else reads, with its bias."""
    maker = _private_maker(edit, value)
    if maker is None:
        return None
    if maker.op_type != "Add":
        if not _is_layer(edit, maker):
            return None
        biased = len(maker.input) > 2 and maker.input[2] != ""
        return _Part(maker, maker if biased else None)
    for place in (0, 1):
        bias = edit.constant(maker, place)
        layer = _private_maker(edit, maker.input[1 - place])
        if bias is None or layer is None or layer.op_type != "MatMul" or not _is_layer(edit, layer):
            continue
        if bias.size == bias.shape[-1] == len(_made(edit, layer)):
            return _Part(layer, maker, place)
    return None


def _private_maker(edit: GraphEdit, value: str) -> onnx.NodeProto | None:
    return edit.maker(value) if edit.only_reader(value) is not None else None


def _is_layer(edit: GraphEdit, node: onnx.NodeProto) -> bool:
    """Tell whether a node is a product or convolution with a constant weight and bias."""
    if node.op_type not in PRODUCTS or node.domain or attribute(node, "transA", 0):
        return False
    weight = edit.constant(node, 1)
    biased = len(node.input) > 2 and node.input[2] != ""
    bias = edit.constant(node, 2)
    if weight is None or (biased and bias is None):
        return False
    if node.op_type == "Conv":
        return True
    # A bias of one number for all channels is none of theirs.
    return weight.ndim == 2 and (bias is None or bias.size == len(_made(edit, node)))


def _made(edit: GraphEdit, layer: onnx.NodeProto) -> Values:
    """Weights that make each output channel: [channels, others]."""
    weight = _weight(edit, layer)
    axis = 0 if layer.op_type == "Conv" else 1 - input_axis(layer)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _put_made(edit: GraphEdit, layer: onnx.NodeProto, made: Values) -> None:
    shape = _weight(edit, layer).shape
    turned = layer.op_type != "Conv" and input_axis(layer) == 0
    edit.replace(layer, 1, made.T if turned else made.reshape(shape))


def _read(edit: GraphEdit, layer: onnx.NodeProto) -> Values:
    """Weights that read each input channel: [channels, others]."""
    weight = _weight(edit, layer)
    if layer.op_type != "Conv":
        return np.moveaxis(weight, input_axis(layer), 0)
    groups = attribute(layer, "group", 1)
    # [outputs, inputs of a group, ...] -> [inputs, outputs of a group and the rest]
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    return np.moveaxis(parts, 2, 1).reshape(groups * weight.shape[1], -1)


def _put_read(edit: GraphEdit, layer: onnx.NodeProto, read: Values) -> None:
    weight = _weight(edit, layer)
    if layer.op_type != "Conv":
        edit.replace(layer, 1, np.moveaxis(read, 0, input_axis(layer)))
        return
    groups, depth = attribute(layer, "group", 1), weight.shape[1]
    parts = read.reshape(groups, depth, len(weight) // groups, *weight.shape[2:])
    edit.replace(layer, 1, np.moveaxis(parts, 1, 2).reshape(weight.shape))


def _weight(edit: GraphEdit, layer: onnx.NodeProto) -> Values:
    return edit.needed(layer, 1).astype(np.float64)
