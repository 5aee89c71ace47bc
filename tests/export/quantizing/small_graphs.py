"""Small graphs with constant weights, and what they compute."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.runtime.engines.onnxruntime_engine import EXACT_INT8

Shape = Sequence[Any]


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, NDArray[Any]],
    *,
    given: Shape,
    outputs: Mapping[str, Shape],
    name: str = "x",
    opset: int = 18,
) -> onnx.ModelProto:
    """A graph with the input `name` of a shape, and constants by their names."""
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, kind, given)],
        [helper.make_tensor_value_info(key, kind, shape) for key, shape in outputs.items()],
        [
            numpy_helper.from_array(value.astype(np.float32), key)
            if np.issubdtype(value.dtype, np.floating)
            else numpy_helper.from_array(value, key)
            for key, value in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, values: NDArray[Any]) -> list[NDArray[Any]]:
    """All outputs of a graph with one input."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in EXACT_INT8.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [np.asarray(item) for item in session.run(None, {model.graph.input[0].name: values})]


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph with all rewrites that there are, ONNX Runtime's own operators among them."""
    for item in PASSES:
        model, _ = item.apply(model)
    return model


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def batches(values: NDArray[Any], size: int = 16) -> CalibrationData:
    """The rows of an array as calibration data."""
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return CalibrationData(len(parts), lambda index: parts[index])


def close(found: NDArray[Any], right: NDArray[Any]) -> bool:
    """Whether two results agree to 1e-5 of the largest value."""
    return bool(np.abs(found - right).max() <= 1e-5 * max(float(np.abs(right).max()), 1e-6))
