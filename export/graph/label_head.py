"""Add a zero-shot classification head to an image tower: best label and its score as outputs.

For devices whose program needs a label rather than an embedding. The head comes last in the graph
and stays in fp32: logits are the cosines times the logit scale, and the score is the softmax
probability of the best label (Radford et al. 2021, section 3.1).
"""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.runtime.bundle.labels import LabelSet
from edgeclip.runtime.spec import LABEL_OUTPUTS, OUTPUT_NAMES


def add_label_head(path: Path, labels: LabelSet, logit_scale: float) -> None:
    """Add the outputs `label_index` int64 [N] and `label_score` float32 [N] to an image tower.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    model = load_graph(path)
    graph = model.graph
    weights = (logit_scale * labels.embeddings.T).astype(np.float32)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.ascontiguousarray(weights), "label_weights"),
            numpy_helper.from_array(np.array([1]), "label_axis"),
        ]
    )
    index, score = LABEL_OUTPUTS
    embeds, logits, shares = OUTPUT_NAMES["image"], "label_logits", "label_shares"
    graph.node.extend(
        [
            helper.make_node("MatMul", [embeds, "label_weights"], [logits], logits),
            helper.make_node("ArgMax", [logits], [index], index, axis=1, keepdims=0),
            helper.make_node("Softmax", [logits], [shares], shares, axis=1),
            helper.make_node("ReduceMax", [shares, "label_axis"], [score], score, keepdims=0),
        ]
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0]
    count = [batch.dim_param or batch.dim_value]
    graph.output.extend(
        [
            helper.make_tensor_value_info(index, TensorProto.INT64, count),
            helper.make_tensor_value_info(score, TensorProto.FLOAT, count),
        ]
    )
    save_graph(model, path)
