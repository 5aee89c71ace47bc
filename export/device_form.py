"""The image tower as a device wants it: uint8 pixels in, the normalisation inside.

With scale s and shift t of each channel, a normalised pixel is s x + t (s = 1 / (255 std),
t = -mean / std). Where the first thing a tower does is a convolution without padding, both
go into its weights: W (s x + t) + b = (W s) x + (b + sum W t). That is exact, and the
preprocessing of a picture ends with its crop. Padding would be zeros of the normalised
picture, so elsewhere one multiplication and one addition come first.
"""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.runtime.spec import PIXEL_INPUTS, ImageSpec

_STANDARD, _DEVICE = PIXEL_INPUTS["float32-nchw"], PIXEL_INPUTS["uint8-nhwc"]
_FLOATS, _CHANNELS_FIRST = f"{_DEVICE}_float", f"{_DEVICE}_nchw"


def to_device_form(model: onnx.ModelProto, spec: ImageSpec) -> None:
    """Let a captured fp32 image tower take uint8 [batch, size, size, 3], in place."""
    graph = model.graph
    given = graph.input[0]
    batch = given.type.tensor_type.shape.dim[0]
    scale = (1 / (255 * np.asarray(spec.std))).astype(np.float32)
    shift = (-np.asarray(spec.mean) / np.asarray(spec.std)).astype(np.float32)
    asking = [node for node in graph.node if _STANDARD in node.input]
    readers = [node for node in asking if node.op_type != "Shape"]
    before = [
        # TensorRT reads uint8 in nothing but a cast at the graph's edge.
        helper.make_node("Cast", [_DEVICE], [_FLOATS], "pixels_cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Transpose", [_FLOATS], [_CHANNELS_FIRST], "pixels_transpose", perm=[0, 3, 1, 2]
        ),
    ]
    if len(readers) == 1 and _foldable(graph, readers[0]):
        _fold(graph, readers[0], scale, shift)
        for node in asking:  # what is left asks for the batch size only
            node.input[:] = [_CHANNELS_FIRST if name == _STANDARD else name for name in node.input]
    else:
        before += _normalising(graph, scale, shift)
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    count = batch.dim_param or batch.dim_value
    given.CopyFrom(
        helper.make_tensor_value_info(_DEVICE, TensorProto.UINT8, [count, spec.size, spec.size, 3])
    )


def _foldable(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Tell whether a node is a convolution with constant weights and no padding."""
    settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    padded = any(settings.get("pads", ())) or settings.get("auto_pad", b"NOTSET") != b"NOTSET"
    constants = {item.name for item in graph.initializer}
    return (
        node.op_type == "Conv"
        and not padded
        and settings.get("group", 1) == 1
        and set(node.input[1:]) <= constants
    )


def _fold(
    graph: onnx.GraphProto,
    conv: onnx.NodeProto,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
) -> None:
    """Put scale and shift into a convolution's weights [out, 3, rows, columns] and bias [out]."""
    by_name = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = by_name[conv.input[1]].astype(np.float64)
    bias = by_name[conv.input[2]] if len(conv.input) > 2 else np.zeros(len(weights))
    per_channel = (slice(None), None, None)
    moved = bias + (weights * shift[per_channel]).sum(axis=(1, 2, 3))
    folded = {
        f"{conv.name}_folded_weight": weights * scale[per_channel],
        f"{conv.name}_folded_bias": moved,
    }
    old = set(conv.input[1:])
    conv.input[:] = [_CHANNELS_FIRST, *folded]
    still_read = {name for node in graph.node for name in node.input}
    for item in list(graph.initializer):
        if item.name in old - still_read:
            graph.initializer.remove(item)
    graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in folded.items()
    )


def _normalising(
    graph: onnx.GraphProto, scale: NDArray[np.float32], shift: NDArray[np.float32]
) -> list[onnx.NodeProto]:
    names = (f"{_DEVICE}_scale", f"{_DEVICE}_shift")
    graph.initializer.extend(
        numpy_helper.from_array(value.reshape(1, 3, 1, 1), name)
        for value, name in zip((scale, shift), names, strict=True)
    )
    scaled = f"{_DEVICE}_scaled"
    return [
        helper.make_node("Mul", [_CHANNELS_FIRST, names[0]], [scaled], "pixels_scale"),
        helper.make_node("Add", [scaled, names[1]], [_STANDARD], "pixels_shift"),
    ]
