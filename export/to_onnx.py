"""Towers to ONNX in fp32, by torch's own exporter."""

from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.capture import capture
from edgeclip.export.device_form import to_device_form
from edgeclip.export.errors import ExportError
from edgeclip.export.exporter_config import TowerConfig, tower_config
from edgeclip.export.graph import limit_masks, save_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.towers import tower_module
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.spec import PixelForm, Tower

STANDARD = GraphForm()


@dataclass(frozen=True, slots=True)
class TowerPaths:
    """The ONNX files of both towers in fp32, and what the image tower takes."""

    image: Path
    text: Path
    pixels: PixelForm

    def graph(self, tower: Tower) -> TowerGraph:
        """Return one of them."""
        if tower == "image":
            return TowerGraph("image", "fp32", self.image, self.pixels)
        return TowerGraph("text", "fp32", self.text, None)


def export_towers(dual: DualEncoder, folder: Path, form: GraphForm = STANDARD) -> TowerPaths:
    """Write both towers in fp32, named as in a bundle: `onnx/text_model.onnx` and so on.

    Raises:
        ExportError: see `export_tower`.
    """
    paths = TowerPaths(
        folder / tower_path("image", "fp32", form.pixels),
        folder / tower_path("text", "fp32"),
        form.pixels,
    )
    export_tower(dual, "image", paths.image, form)
    export_tower(dual, "text", paths.text, form)
    return paths


def export_tower(dual: DualEncoder, tower: Tower, path: Path, form: GraphForm = STANDARD) -> None:
    """Write one tower in fp32, for texts with a dynamic length.

    The image tower maps `pixel_values` float32 [batch, 3, size, size], or `pixels` uint8
    [batch, size, size, 3], to `image_embeds` float32 [batch, dim] and on request to
    `patch_features` float32 [batch, rows, columns, width]; the text tower `input_ids` int64
    [batch, length] to `text_embeds`. Embeddings are L2-normalised. `dual` is left in
    evaluation mode.

    Raises:
        ExportError: torch cannot capture the model, or the graph is not what it should be.
    """
    dual.eval()
    config = tower_config(dual, tower, form)
    model = capture(dual, tower, form).model_proto
    limit_masks(model)
    _check_inputs(tower, model, config)
    _check_layer_norms(dual, tower, model)
    if tower == "image" and form.pixels == "uint8-nhwc":
        to_device_form(model, dual.image_spec)
    save_graph(model, path)


def _check_inputs(tower: Tower, model: onnx.ModelProto, config: TowerConfig) -> None:
    """Refuse a graph for one batch size or one text length: the exporter makes it in silence."""
    shape = model.graph.input[0].type.tensor_type.shape
    dynamic = [axis for axis, dim in enumerate(shape.dim) if dim.dim_param]
    (axes,) = config.inputs.values()
    if dynamic != list(axes):
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
