"""ONNX graphs: cleaned of what the exporter leaves behind, checked, and written."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.towers import MASKED

_LOWEST_FP16 = float(np.finfo(np.float16).min)
_PROTOBUF_LIMIT = 2**31 - 1


def clean_graph(model: onnx.ModelProto) -> None:
    """Drop notes of the exporter, in place; what is computed stays the same.

    Shapes that the exporter noted (`value_info`) are wrong after its own optimisation and
    stop ONNX Runtime's quantizer; source paths and module names are nobody's business.
    """
    del model.graph.value_info[:]
    del model.metadata_props[:]
    model.doc_string = ""
    for item in (
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        item.doc_string = ""
        del item.metadata_props[:]


def limit_masks(model: onnx.ModelProto) -> None:
    """Raise constants below what fp16 holds (masks of -3e38 or -inf) to `MASKED`, in place."""
    for tensor in _float_tensors(model.graph):
        values = numpy_helper.to_array(tensor)
        if values.size and values.min() < _LOWEST_FP16:
            limited = np.where(values < _LOWEST_FP16, np.float32(MASKED), values)
            tensor.CopyFrom(numpy_helper.from_array(limited, tensor.name))


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Clean, check and write a graph; the same graph always gives the same bytes.

    Raises:
        ExportError: larger than 2 GiB, or not valid ONNX.
    """
    clean_graph(model)
    if model.ByteSize() > _PROTOBUF_LIMIT:
        raise ExportError(
            f"{path.name} needs {model.ByteSize() / 2**30:.1f} GiB, but one ONNX file holds at "
            "most 2: choose a smaller model"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not a valid ONNX graph: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def constant_names(model: onnx.ModelProto) -> frozenset[str]:
    """Names of all values that are constants (weights) of the graph."""
    return frozenset(item.name for item in model.graph.initializer)


def _float_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every float32 constant: weights and attributes of nodes."""
    attributes = (attribute.t for node in graph.node for attribute in node.attribute)
    for tensor in (*graph.initializer, *attributes):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            yield tensor
