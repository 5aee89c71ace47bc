"""Build towers of any size with random weights: they take as long as trained ones of that size."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import limit_masks, save_graph
from edgeclip.export.graph.to_onnx import GraphForm, capture, to_device_form
from edgeclip.export.quantizing.config import default_config
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.profiles.predict.tower_shapes import AnyTower, ConvTower, TransformerTower
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import PIXEL_INPUTS, TEXT_INPUT, ImageSpec

_CALIBRATION = 2  # inputs: ranges change no time
_TINY = 16  # width of the other tower


class Stem(nn.Module):
    """The stem of an image tower: everything before its first block."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        model: Any = dual.model
        self.vision_model = model.vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [N, 3, size, size] -> [N, tokens, width], or [N, width, rows, columns]."""
        model: Any = self.vision_model
        hidden: Tensor = model.embeddings(pixel_values)
        return model.pre_layrnorm(hidden) if hasattr(model, "pre_layrnorm") else hidden


def random_dual(tower: AnyTower, *, seed: int = 0, context: int = 77) -> DualEncoder:
    """Make a dual encoder with a tower of these sizes; its other tower is tiny.

    Args:
        tower: its shape; for a text tower `tokens` is not used.
        seed: random seed of the weights.
        context: the longest text of a text tower.
    """
    torch.manual_seed(seed)
    if isinstance(tower, ConvTower):
        base = _clip(_tiny_image(tower.image_size), _tiny(), tower.image_size, tower.dim, context)
        shape = StudentShape(
            family="convnextv2" if tower.grn else "convolutional",
            whole_text=True,
            conv_widths=tower.widths,
            conv_depths=tower.depths,
        )
        return new_student(base, shape, seed=seed).eval()
    sizes = {
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": "gelu" if tower.gelu else "quick_gelu",
    }
    if tower.part == "text":
        return _clip(_tiny_image(_TINY), sizes, _TINY, tower.dim, context)
    size = tower.image_size
    image = {**sizes, "image_size": size, "patch_size": tower.patch}
    return _clip(image, _tiny(), size, tower.dim, context)


def export_stem(dual: DualEncoder, path: Path, device: DeviceProfile) -> None:
    """Export the stem of an image tower in the form that a device takes.

    Raises:
        ExportError: torch cannot capture it.
    """
    form = GraphForm.for_device(device)
    model = capture(dual, "image", form, Stem(dual).eval()).model_proto
    limit_masks(model)
    if form.pixels == "uint8-nhwc":
        to_device_form(model, dual.image_spec)
    save_graph(model, path)


def quantize_random(
    source: Path, target: Path, tower: AnyTower, device: DeviceProfile, *, seed: int = 0
) -> None:
    """Quantize an exported tower to int8 as `edgeclip export` does for a device.

    Raises:
        ExportError: nothing in it can be quantized.
    """
    draw = np.random.default_rng(seed)
    values = [example(tower, device, draw) for _ in range(_CALIBRATION)]
    data = CalibrationData(len(values), lambda index: values[index])
    write_int8(source, target, data, default_config("int8", device))


def example(
    tower: AnyTower, device: DeviceProfile, draw: np.random.Generator | None = None
) -> NDArray[Any]:
    """Make an input of the tower as it is exported for a device; zeros without a generator.

    uint8 [N, size, size, 3], float32 [N, 3, size, size] or int64 [N, tokens], N being 1 or the
    device's only batch.
    """
    batch = device.static_batch or 1
    if tower.part == "text":
        assert isinstance(tower, TransformerTower)
        shape: tuple[int, ...] = (batch, tower.tokens)
        return np.zeros(shape, np.int64) if draw is None else draw.integers(3, 200, shape)
    size = tower.image_size
    if device.pixels == "uint8-nhwc":
        shape = (batch, size, size, 3)
        if draw is None:
            return np.zeros(shape, np.uint8)
        return draw.integers(0, 256, shape, dtype=np.uint8)
    shape = (batch, 3, size, size)
    if draw is None:
        return np.zeros(shape, np.float32)
    return draw.normal(size=shape).astype(np.float32)


def input_name(tower: AnyTower, device: DeviceProfile) -> str:
    """Return the name of the graph's only input."""
    return TEXT_INPUT if tower.part == "text" else PIXEL_INPUTS[device.pixels]


def _tiny() -> dict[str, Any]:
    return {
        "hidden_size": _TINY,
        "intermediate_size": _TINY,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }


def _tiny_image(size: int) -> dict[str, Any]:
    return {**_tiny(), "image_size": size, "patch_size": size}


def _clip(
    image: dict[str, Any], text: dict[str, Any], size: int, dim: int, context: int
) -> DualEncoder:
    tokenizer = _tokenizer()
    config = CLIPConfig(
        projection_dim=dim,
        vision_config=image,
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": context,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    half = (0.5, 0.5, 0.5)
    spec = ImageSpec(size=size, resize=size, mean=half, std=half)
    return DualEncoder(CLIPModel(config).eval(), spec, tokenizer)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Load the built-in teacher's tokenizer alone: an installed wheel leaves its weights out."""
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN_TEACHER)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.model_max_length = 2**31 - 1  # a probe's texts are as long as its positions
    return tokenizer
