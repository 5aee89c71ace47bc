"""Towers to ONNX in fp32, by torch's own exporter."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import limit_masks, save_graph
from edgeclip.export.towers import tower_module
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.errors import first_line
from edgeclip.runtime.spec import INPUT_NAMES, OUTPUT_NAMES, Tower

OPSET = 18  # LayerNormalization is one operator since 17; TensorRT 10 and 11 read 18
_SAMPLES = 2  # the exporter takes a batch of 1 for a constant


@dataclass(frozen=True, slots=True)
class TowerPaths:
    """The ONNX files of both towers."""

    image: Path
    text: Path


def export_towers(dual: DualEncoder, folder: Path) -> TowerPaths:
    """Write both towers in fp32, named as in a bundle: `onnx/vision_model.onnx` and so on.

    Raises:
        ExportError: see `export_tower`.
    """
    paths = TowerPaths(
        folder / tower_path("image", "fp32"),
        folder / tower_path("text", "fp32"),
    )
    export_tower(dual, "image", paths.image)
    export_tower(dual, "text", paths.text)
    return paths


def export_tower(dual: DualEncoder, tower: Tower, path: Path) -> None:
    """Write one tower in fp32, with a dynamic batch and, for texts, a dynamic length.

    The image tower maps `pixel_values` float32 [batch, 3, size, size] to `image_embeds`
    float32 [batch, dim], the text tower `input_ids` int64 [batch, length] to
    `text_embeds`. Embeddings are L2-normalised. `dual` is left in evaluation mode.

    Raises:
        ExportError: torch cannot capture the model, or the graph is not what it should be.
    """
    dual.eval()
    model = _capture(dual, tower)
    limit_masks(model)
    _check_inputs(tower, model)
    _check_layer_norms(dual, tower, model)
    save_graph(model, path)


def _capture(dual: DualEncoder, tower: Tower) -> onnx.ModelProto:
    dynamic: dict[int, object] = {0: torch.export.Dim("batch")}
    if tower == "text":
        dynamic[1] = torch.export.Dim("length", min=2, max=dual.spec.text.context_length)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                tower_module(dual, tower),
                (_sample(dual, tower),),
                input_names=[INPUT_NAMES[tower]],
                output_names=[OUTPUT_NAMES[tower]],
                opset_version=OPSET,
                dynamic_shapes=(dynamic,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many classes, all with a long report
        raise ExportError(f"torch cannot export the {tower} tower: {first_line(error)}") from error
    assert program is not None
    return program.model_proto


def _sample(dual: DualEncoder, tower: Tower) -> Tensor:
    device = next(dual.parameters()).device
    spec = dual.spec
    if tower == "image":
        return torch.zeros(_SAMPLES, 3, spec.image.size, spec.image.size, device=device)
    length = spec.text.context_length - 1  # any but the full context, which is a constant
    ids = torch.full((_SAMPLES, length), spec.text.eos_id, device=device)
    ids[:, 0] = spec.text.bos_id
    return ids


def _check_inputs(tower: Tower, model: onnx.ModelProto) -> None:
    """Refuse a graph for one batch size or one text length: the exporter makes it in silence."""
    shape = model.graph.input[0].type.tensor_type.shape
    dynamic = [axis for axis, dim in enumerate(shape.dim) if dim.dim_param]
    if dynamic != ([0] if tower == "image" else [0, 1]):
        raise ExportError(
            f"the {tower} tower was exported for fixed sizes: its forward pass must take batch "
            "and text length from tensor shapes, not as Python numbers"
        )


def _check_layer_norms(dual: DualEncoder, tower: Tower, model: onnx.ModelProto) -> None:
    """Refuse LayerNorms taken apart into means and powers, which overflow in fp16."""
    module = tower_module(dual, tower)
    has_any = any(isinstance(part, torch.nn.LayerNorm) for part in module.modules())
    kinds = {node.op_type for node in model.graph.node}
    powers = {name for node in model.graph.node if node.op_type == "Pow" for name in node.output}
    variance = any(
        node.op_type == "ReduceMean" and node.input[0] in powers for node in model.graph.node
    )
    if variance or (has_any and "LayerNormalization" not in kinds):
        raise ExportError(
            f"the {tower} tower's layer normalisation was not exported as LayerNormalization, "
            "and would overflow in fp16: use torch.nn.LayerNorm in the model"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling of optional packages and its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
