"""A layer that naive int8 ruins, planted into a sound tower."""

import numpy as np
import onnx

from edgeclip.export.quantizing.smoothquant import rescale


def plant_outlier(
    model: onnx.ModelProto, layer: str, channel: int, factor: float = 100
) -> onnx.ModelProto:
    """Return a copy in which one channel of a LayerNormalization is `factor` times as large.

    The weights behind it are divided by as much, so the tower computes what it did. One step
    of int8 for the whole layer then leaves hardly any for its other channels.

    Args:
        model: a tower in fp32.
        layer: name of a LayerNormalization that only products read (`smoothable`).
        channel: which one grows.
        factor: by how much.
    """
    planted = onnx.ModelProto()
    planted.CopyFrom(model)
    node = next(node for node in planted.graph.node if node.name == layer)
    (scale,) = (item for item in planted.graph.initializer if item.name == node.input[1])
    divisors = np.ones(scale.dims[0])
    divisors[channel] = 1 / factor
    rescale(planted, layer, divisors)
    return planted
