"""Make a student: a smaller dual encoder that inherits a part of the teacher's weights."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.errors import ConfigError

_ENCODER_LAYERS = "encoder.layers."


def even_stride(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Return the teacher layers that the student keeps: evenly spread, starting with the first.

    Raises:
        ConfigError: more layers than the teacher has, or none.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ConfigError(
            f"a student of {student_layers} layers cannot inherit from a teacher of "
            f"{teacher_layers}: choose 1 to {teacher_layers}"
        )
    return tuple(round(i * teacher_layers / student_layers) for i in range(student_layers))


def inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Fill every weight of `student` with the leading part of the teacher's weight of that name.

    Both are towers (or whole models) of one family; the student may be narrower and
    shallower. `encoder.layers.I` is filled from the teacher's layer at an even stride.

    Raises:
        ConfigError: the teacher lacks a weight, or has a smaller one.
    """
    source = teacher.state_dict()
    layers = _layer_map(student.state_dict(), source)
    with torch.no_grad():
        for name, target in student.state_dict().items():
            origin = _renamed(name, layers)
            if origin not in source:
                raise ConfigError(f"the teacher has no weight {origin} to inherit")
            target.copy_(_leading(source[origin], target.shape, name))


def _leading(weight: Tensor, shape: torch.Size, name: str) -> Tensor:
    if weight.ndim != len(shape) or any(
        have < want for have, want in zip(weight.shape, shape, strict=True)
    ):
        raise ConfigError(
            f"{name}: the student wants {tuple(shape)}, the teacher has {tuple(weight.shape)}; "
            f"a student can only be smaller"
        )
    return weight[tuple(slice(0, size) for size in shape)]


def _layer_map(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, dict[int, int]]:
    """Map student layers to teacher layers, for each encoder by the prefix of its name."""
    counts = _count_layers(teacher)
    return {
        prefix: dict(enumerate(even_stride(counts.get(prefix, 0), layers)))
        for prefix, layers in _count_layers(student).items()
    }


def _count_layers(state: dict[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in state:
        prefix, found, rest = name.partition(_ENCODER_LAYERS)
        if found:
            counts[prefix] = max(counts.get(prefix, 0), int(rest.split(".")[0]) + 1)
    return counts


def _renamed(name: str, layers: dict[str, dict[int, int]]) -> str:
    prefix, found, rest = name.partition(_ENCODER_LAYERS)
    if not found:
        return name
    number, _, tail = rest.partition(".")
    return f"{prefix}{_ENCODER_LAYERS}{layers[prefix][int(number)]}.{tail}"


Family = Literal["inherited", "convolutional"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentShape:
    """Sizes of a student; space, dim, tokenizer and picture size are the teacher's.

    Args:
        family: `inherited`, a smaller copy of the teacher's own towers, or
            `convolutional`, a ConvNeXt image tower with an inherited text tower.
        image_heads: attention heads of the image tower; a head keeps the teacher's size,
            so the width is heads x size of a head. None is half the teacher's, rounded up.
        image_layers: transformer layers of the image tower; None is half the teacher's as well.
        text_heads, text_layers: the same for the text tower.
        whole_text: keep the teacher's text tower as it is.
        conv_widths, conv_depths: channels and blocks of each ConvNeXt stage.
    """

    family: Family = "inherited"
    image_heads: int | None = None
    image_layers: int | None = None
    text_heads: int | None = None
    text_layers: int | None = None
    whole_text: bool = False
    conv_widths: tuple[int, ...] = (48, 96, 192)
    conv_depths: tuple[int, ...] = (2, 2, 4)


def new_student(teacher: DualEncoder, shape: StudentShape, *, seed: int = 0) -> DualEncoder:
    """Make an untrained student that inherits from `teacher` where it can.

    Raises:
        ConfigError: a shape larger than the teacher, or a teacher that is not a CLIP.
    """
    if not isinstance(teacher.model, CLIPModel):
        raise ConfigError("only a CLIP model can be a teacher of students so far")
    torch.manual_seed(seed)
    config = copy.deepcopy(teacher.model.config)
    vision, text = config.vision_config, config.text_config
    assert isinstance(vision, CLIPVisionConfig)
    assert isinstance(text, CLIPTextConfig)
    if shape.family == "inherited":
        _shrink(vision, shape.image_heads, shape.image_layers)
    else:
        _shrink(vision, 1, 1)  # gives way to the convolutional tower
    if not shape.whole_text:
        _shrink(text, shape.text_heads, shape.text_layers)
    inherited = CLIPModel(config)
    inherit(inherited, teacher.model)
    model: PreTrainedModel = inherited
    if shape.family == "convolutional":
        model = _convolutional(inherited, text, teacher.image_spec.size, shape)
    student = DualEncoder(model, teacher.image_spec, teacher.tokenizer, space=teacher.space)
    with torch.no_grad():
        student.logit_scale.copy_(teacher.logit_scale)
    student.logit_scale.requires_grad_(False)  # both answer at the teacher's temperature
    return student


def _shrink(
    config: CLIPVisionConfig | CLIPTextConfig, heads: int | None, layers: int | None
) -> None:
    heads = (config.num_attention_heads + 1) // 2 if heads is None else heads
    layers = (config.num_hidden_layers + 1) // 2 if layers is None else layers
    if heads < 1 or layers < 1:
        raise ConfigError(
            f"a tower needs at least one attention head and one layer, got {heads} and {layers}"
        )
    head_size = config.hidden_size // config.num_attention_heads
    ratio = config.intermediate_size / config.hidden_size
    config.num_attention_heads = heads
    config.hidden_size = heads * head_size
    config.intermediate_size = round(heads * head_size * ratio)
    config.num_hidden_layers = layers


def _convolutional(
    inherited: CLIPModel, text: CLIPTextConfig, image_size: int, shape: StudentShape
) -> VisionTextDualEncoderModel:
    """Replace the image tower by a randomly initialised ConvNeXt (Liu et al. 2022)."""
    if len(shape.conv_widths) != len(shape.conv_depths):
        raise ConfigError("conv_widths and conv_depths need one number for each stage")
    vision = ConvNextConfig(
        num_stages=len(shape.conv_widths),
        hidden_sizes=list(shape.conv_widths),
        depths=list(shape.conv_depths),
        image_size=image_size,
        layer_scale_init_value=0.0,  # made for very deep networks; slows small ones
    )
    vision.hidden_size = shape.conv_widths[-1]  # the dual encoder's projection asks for it
    text_model = CLIPTextModel(text)
    text_model.load_state_dict(inherited.text_model.state_dict())
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=inherited.config.projection_dim
    )
    model = VisionTextDualEncoderModel(config, ConvNextModel(vision), text_model)
    model.text_projection.load_state_dict(inherited.text_projection.state_dict())
    return model
