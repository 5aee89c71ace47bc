"""The built-in student as a model: its weights, read back from the graphs of its bundle."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from onnx import GraphProto, numpy_helper
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.demo.demo import KEPT_BUNDLE
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import tower_path

_PROJECTIONS = {"image": "visual_projection.weight", "text": "text_projection.weight"}


def kept_student() -> DualEncoder:
    """Return the student whose bundle is kept in the repository.

    The exporter keeps the names of most weights. Those of products it transposes, and the bias
    that is added right behind has the name.

    Raises:
        RuntimeError: a weight was not found.
    """
    manifest = Bundle.open(KEPT_BUNDLE).manifest
    weights = {"logit_scale": torch.tensor(math.log(manifest.spec.logit_scale))}
    for tower, projection in _PROJECTIONS.items():
        graph = load_graph(KEPT_BUNDLE / tower_path(tower, "fp32")).graph  # type: ignore[arg-type]
        found = dict(_named(graph))
        weights[projection] = found.pop("projection.weight")
        weights |= {name: value for name, value in found.items() if "." in name}
    config = CLIPConfig.from_pretrained(KEPT_BUNDLE)
    model = CLIPModel(config)
    wanted = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights.items() if name in wanted})
    tokenizer: Any = AutoTokenizer.from_pretrained(KEPT_BUNDLE)
    return DualEncoder(model.eval(), manifest.spec.image, tokenizer, space=manifest.space)


def _named(graph: GraphProto) -> Iterator[tuple[str, Tensor]]:
    constants = {item.name: item for item in graph.initializer}
    for name, item in constants.items():
        yield name, torch.from_numpy(numpy_helper.to_array(item).copy())
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        biases = [name for name in node.input if name.endswith(".bias") and name in constants]
        made = [products[name] for name in node.input if name in products]
        if node.op_type == "Add" and biases and made:
            weight = numpy_helper.to_array(constants[made[0].input[1]])
            name = f"{biases[0].removesuffix('.bias')}.weight"
            yield name, torch.from_numpy(weight.T.copy())
