"""Make a student: a smaller dual encoder that inherits a part of the teacher's weights."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.students.image_families import ImageFamilyName, image_tower
from edgeclip.compress.students.importance import Importance, choose, is_plain_transformer
from edgeclip.compress.students.inherit import Choice, Inherit, inherit
from edgeclip.compress.students.text_tokens import with_byte_tokens, with_token_rank
from edgeclip.compress.students.token_merging import with_merging
from edgeclip.compress.students.vocabulary import prune_vocabulary
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.families import FAMILIES
from edgeclip.compress.teachers.licence import joined
from edgeclip.compress.teachers.mixed_towers import MixedDualEncoder, tower_of
from edgeclip.compress.teachers.own_settings import with_own_settings
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.text_files import read_lines
from edgeclip.runtime.spec import ImageSpec, Tower

Family = Literal["inherited", ImageFamilyName]

# Settings of an image tower that is inherited, and of one that is not.
_OF_TRANSFORMERS = ("image_heads", "image_layers", "patch_size")
_OF_CONVOLUTIONS = ("conv_widths", "conv_depths")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentShape:
    """Sizes of a student; space, dim and tokenizer are the teacher's.

    Args:
        family: `inherited`, a smaller copy of the teacher's own towers, or one of
            `IMAGE_FAMILIES`: an image tower of random weights with an inherited text tower.
        image_heads: attention heads of the image tower; a head keeps the teacher's size,
            so the width is heads x size of a head. None is half the teacher's, rounded up.
        image_layers: transformer layers of the image tower; None is half the teacher's as well.
        text_heads, text_layers: the same for the text tower.
        whole_text: keep the teacher's text tower as it is.
        image_size: side of the student's pictures in pixels; None is the teacher's.
        patch_size: side of an inherited image tower's patches in pixels; None is the teacher's.
        conv_widths, conv_depths: channels and blocks of each stage of such a tower; None for what
            is usual in its family.
        merge_after: layers of the image tower after which four patches become one; see
            `with_merging`.
        text_tokenizer: the teacher's tokens, or bytes; see `with_byte_tokens`.
        vocabulary: text file, one text per line, whose tokens alone are kept of the teacher's; see
            `prune_vocabulary`.
        token_rank: width of the table of token embeddings; None for that of the tower. See
            `with_token_rank`.
        inherit: what a smaller tower begins with: the `leading` heads, channels and neurons and
            every so many layers of the teacher's; those `selected` by importance; these, then
            `mapped`, see `learn_mapping`; or `random` weights.
        mapping_steps: steps in which the mapping is learned, where it is.
    """

    family: Family = "inherited"
    image_heads: int | None = None
    image_layers: int | None = None
    text_heads: int | None = None
    text_layers: int | None = None
    whole_text: bool = False
    image_size: int | None = None
    patch_size: int | None = None
    conv_widths: tuple[int, ...] | None = None
    conv_depths: tuple[int, ...] | None = None
    merge_after: tuple[int, ...] = ()
    text_tokenizer: Literal["teacher", "bytes"] = "teacher"
    vocabulary: str | None = None
    token_rank: int | None = None
    inherit: Inherit = "leading"
    mapping_steps: Annotated[int, Ge(1)] = 100

    def __post_init__(self) -> None:
        inherits = self.family == "inherited"
        names = _OF_CONVOLUTIONS if inherits else _OF_TRANSFORMERS
        if unused := [name for name in names if getattr(self, name) is not None]:
            mend = (
                "choose a family that has them, such as convnextv2"
                if inherits
                else "choose the inherited family"
            )
            raise ConfigError(
                f"an image tower of the family {self.family} has no {' and no '.join(unused)}: "
                f"leave out, or {mend}"
            )
        if self.text_tokenizer == "bytes" and self.vocabulary is not None:
            raise ConfigError("vocabulary keeps some of the teacher's tokens: not with bytes")
        others = [
            name for name in ("vocabulary", "token_rank", "merge_after") if getattr(self, name)
        ]
        others += ["text_tokenizer"] * (self.text_tokenizer != "teacher")
        if self.inherit == "mapped" and others:
            raise ConfigError(
                "a mapped student has the tokens of its teacher: leave out "
                f"{' and '.join(others)}, or let it inherit what is selected"
            )


_TEXT = ("text_model.", "text_projection.")


def new_student(
    teacher: DualEncoder,
    shape: StudentShape,
    *,
    seed: int = 0,
    importance: Importance | None = None,
) -> DualEncoder:
    """Make an untrained student that inherits from `teacher` where it can.

    One that is to be mapped begins as it is selected; `learn_mapping` does the rest.

    Args:
        teacher: what it inherits from.
        shape: its sizes.
        seed: of what it does not inherit.
        importance: of the teacher's units and layers, where the shape asks for a selection.

    Raises:
        ConfigError: a shape larger than the teacher, or an inherited tower of a teacher's that is
            no plain transformer; the message says what can be chosen. Or no importance where the
            shape asks for a selection.
    """
    image = _image_spec(teacher.image_spec, shape.image_size)
    torch.manual_seed(seed)
    if shape.family == "inherited":
        model = _inherited(teacher, shape)
    else:
        size = shape.image_size or teacher.image_spec.size
        tower = image_tower(shape.family, shape.conv_widths, shape.conv_depths, size)
        model = _beside_text(teacher, shape, tower)
    student = DualEncoder(
        model, image, teacher.tokenizer, space=teacher.space, licence=teacher.licence
    )
    begun, source = inheritance(student, teacher, shape)
    if shape.inherit == "random":
        whole = _TEXT if shape.whole_text else ()
        inherit({name: own for name, own in begun.items() if name.startswith(whole)}, source)
    elif shape.inherit == "leading":
        inherit(begun, source)
    else:
        inherit(begun, source, chosen(student, teacher, shape, importance))
    student = _with_its_tokens(student, shape, seed)
    _freeze_what_is_not_distilled(student, teacher)
    return student


def _with_its_tokens(student: DualEncoder, shape: StudentShape, seed: int) -> DualEncoder:
    """Change what both towers take for tokens, as the shape asks for."""
    if shape.text_tokenizer == "bytes":
        student = with_byte_tokens(student, seed=seed)
    if shape.vocabulary is not None:
        student = prune_vocabulary(student, read_lines(Path(shape.vocabulary)))
    if shape.token_rank is not None:
        student = with_token_rank(student, shape.token_rank)
    return with_merging(student, shape.merge_after) if shape.merge_after else student


def inheritance(
    student: DualEncoder, teacher: DualEncoder, shape: StudentShape
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of a student's inherited towers, and those of the teacher's, by name.

    The teacher's are resampled to the student's pictures and patches.
    """
    config: Any = student.model.config
    begun = dict(student.model.state_dict())
    del begun["logit_scale"]
    source = dict(teacher.model.state_dict())
    if shape.family == "inherited":
        _resample_pictures(source, teacher, config.vision_config)
    else:
        begun = {name: own for name, own in begun.items() if name.startswith(_TEXT)}
    if isinstance(teacher.model, SiglipModel):  # a smaller image tower has a projection
        source["visual_projection.weight"] = torch.eye(teacher.spec.dim, device=teacher.device)
    return begun, source


def chosen(
    student: DualEncoder, teacher: DualEncoder, shape: StudentShape, importance: Importance | None
) -> Choice:
    """Choose what a student inherits by the importance of the teacher's units and layers.

    Raises:
        ConfigError: no importance was measured, or not of the units that the student's towers have.
    """
    if importance is None:
        raise ConfigError(
            f"a student that is {shape.inherit} needs the importance of its teacher's units: "
            "measure it on pictures, or let it inherit the leading ones"
        )
    return choose(importance, *inheritance(student, teacher, shape))


def _freeze_what_is_not_distilled(student: DualEncoder, teacher: DualEncoder) -> None:
    """Let a student answer at the teacher's temperature, and train only what embeddings need.

    Processes that train together wait for the gradient of every weight that asks for one.
    """
    with torch.no_grad():
        student.logit_scale.copy_(teacher.logit_scale.reshape(student.logit_scale.shape))
    for name, weight in student.named_parameters():
        if name.endswith(("logit_scale", "logit_bias", "mask_token")):
            weight.requires_grad_(False)


def _image_spec(image: ImageSpec, size: int | None) -> ImageSpec:
    if size is None:
        return image
    if size < 1:
        raise ConfigError(f"pictures have a side of at least 1 pixel, not {size}")
    return replace(image, size=size, resize=round(image.resize * size / image.size))


def _inherited(teacher: DualEncoder, shape: StudentShape) -> PreTrainedModel:
    """Make a smaller copy of the teacher's own towers."""
    config: Any = copy.deepcopy(teacher.model.config)
    vision, text = config.vision_config, config.text_config
    if hasattr(vision, "merge_after"):
        vision.merge_after = []  # the shape says where the student merges
    _shrink(vision, "image", shape.image_heads, shape.image_layers)
    if not shape.whole_text:
        _shrink(text, "text", shape.text_heads, shape.text_layers)
    if (shape.image_size or shape.patch_size) is not None:
        vision.image_size = shape.image_size or teacher.image_spec.size
        vision.patch_size = shape.patch_size or vision.patch_size
        if vision.image_size < vision.patch_size:
            raise ConfigError(
                f"a picture of {vision.image_size} pixels has no patch of {vision.patch_size}"
            )
    if isinstance(teacher.model, SiglipModel) and vision.hidden_size != teacher.spec.dim:
        config = _mixed_config(vision, text, teacher.spec.dim)
    return FAMILIES[str(config.model_type)].model_class(config)(config)


def _mixed_config(vision: PreTrainedConfig, text: PreTrainedConfig, dim: int) -> Any:
    return VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=dim)


def _shrink(config: Any, tower: Tower, heads: int | None, layers: int | None) -> None:
    """Make the config of a plain transformer smaller, in place.

    Raises:
        ConfigError: not a plain transformer, or no head or layer left.
    """
    if not is_plain_transformer(config):
        choose = "choose the convolutional family" if tower == "image" else "keep the whole tower"
        raise ConfigError(
            f"the teacher's {tower} tower, a {config.model_type}, is no plain transformer, so that "
            f"no smaller one can inherit from it: {choose}"
        )
    heads = (config.num_attention_heads + 1) // 2 if heads is None else heads
    layers = (config.num_hidden_layers + 1) // 2 if layers is None else layers
    if heads < 1 or layers < 1:
        raise ConfigError(
            f"a tower needs at least one attention head and one layer, got {heads} and {layers}"
        )
    before = config.hidden_size
    width = heads * (before // config.num_attention_heads)
    if isinstance(getattr(config, "intermediate_size", None), int):  # else a ratio
        config.intermediate_size = round(width * (config.intermediate_size / before))
    if getattr(config, "pooler_output_size", None) == before:
        config.pooler_output_size = width
    config.num_attention_heads = heads
    config.hidden_size = width
    config.num_hidden_layers = layers
    if getattr(config, "stage_names", None):  # a tower that can be a backbone names its layers
        config.stage_names = ["stem", *(f"stage{number + 1}" for number in range(layers))]
        config.set_output_features_output_indices(None, None)


def _resample_pictures(source: dict[str, Tensor], teacher: DualEncoder, vision: Any) -> None:
    """Resample positions and patches of the image tower to another grid and size of patches.

    Patches are resampled so that a smooth picture gives the same values: an enlarged kernel sums
    over more pixels, and is divided by their number.
    """
    theirs: Any = teacher.model.config.vision_config
    if (theirs.image_size, theirs.patch_size) == (vision.image_size, vision.patch_size):
        return
    side = vision.image_size // vision.patch_size
    for name, weight in list(source.items()):
        if not name.startswith("vision_model."):
            continue
        if "position_embedding" in name and weight.is_floating_point():
            source[name] = _resampled_positions(weight, side)
        elif weight.dim() == 4 and weight.shape[-1] == theirs.patch_size != vision.patch_size:
            size = (vision.patch_size, vision.patch_size)
            scale = (theirs.patch_size / vision.patch_size) ** 2
            source[name] = scale * nn.functional.interpolate(
                weight, size, mode="bicubic", antialias=True
            )


def _resampled_positions(weight: Tensor, side: int) -> Tensor:
    """Resample position embeddings [.., extra + grid, width] to a grid of side x side places."""
    rows = weight.flatten(0, -2)
    before = math.isqrt(len(rows))
    extra = len(rows) - before**2
    grid = rows[extra:].T.unflatten(1, (before, before))[None]
    grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    found = torch.cat([rows[:extra], grid[0].flatten(1).T])
    return found.reshape(*weight.shape[:-2], *found.shape)


def _beside_text(
    teacher: DualEncoder, shape: StudentShape, image: PreTrainedModel
) -> PreTrainedModel:
    """Put an image tower beside the teacher's text tower, or a smaller copy of it."""
    text: Any = copy.deepcopy(teacher.model.config.text_config)
    if not shape.whole_text:
        _shrink(text, "text", shape.text_heads, shape.text_layers)
    config = _mixed_config(image.config, text, teacher.spec.dim)
    towers = (image, tower_of(text) or AutoModel.from_config(text))
    kind = MixedDualEncoder if MixedDualEncoder.is_needed(config) else VisionTextDualEncoderModel
    made: Any = with_own_settings(kind, config)
    model: PreTrainedModel = made(config, *towers)
    return model


def adopt_student(model: DualEncoder, teacher: DualEncoder, *, seed: int = 0) -> DualEncoder:
    """Make a student of an existing dual encoder, such as a TinyCLIP, with all its weights.

    It keeps its own towers, tokenizer and preprocessing. Where its embeddings have another length
    than the teacher's, one linear map with orthonormal columns (rows, if the teacher's are shorter)
    is multiplied into the projections of both towers, so that longer embeddings keep their cosines.
    The temperature is the teacher's.

    Args:
        model: the model to start from; it is left as it is.
        teacher: defines the embedding space.
        seed: of the linear map.
    """
    made: Any = copy.deepcopy(model.model)
    dim = teacher.spec.dim
    if model.spec.dim != dim:
        made = _with_dim(made, dim, torch.Generator().manual_seed(seed))
    student = DualEncoder(
        made,
        model.image_spec,
        model.tokenizer,
        space=teacher.space,
        licence=joined(model.licence, teacher.licence),
    )
    _freeze_what_is_not_distilled(student, teacher)
    return student


def _with_dim(model: Any, dim: int, generator: torch.Generator) -> PreTrainedModel:
    """Return a model with embeddings of another length, the map folded into its projections."""
    if isinstance(model, SiglipModel):
        config: Any = model.config
        width = config.vision_config.hidden_size
        mixed = _mixed_config(config.vision_config, config.text_config, width)
        model = MixedDualEncoder(mixed, model.vision_model, model.text_model)
        model.add_module("visual_projection", nn.Identity())
    before = int(model.config.projection_dim)
    mapping = nn.init.orthogonal_(torch.empty(dim, before), generator=generator)
    for name in ("visual_projection", "text_projection"):
        projection = getattr(model, name)  # nothing where a SigLIP's head is the projection
        own = projection.weight if isinstance(projection, nn.Linear) else torch.eye(before)
        folded = nn.Linear(own.shape[1], dim, bias=False)
        with torch.no_grad():
            folded.weight.copy_(mapping.to(own.device) @ own)
        setattr(model, name, folded.to(own.device))
    model.config.projection_dim = dim
    for tower in (model.config.vision_config, model.config.text_config):
        if hasattr(tower, "projection_dim"):
            tower.projection_dim = dim
    made: PreTrainedModel = model
    return made
