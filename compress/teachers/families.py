"""What differs between families of dual encoders: one small adapter for each.

Everything else reaches into a model of transformers through its adapter only.
"""

from typing import Any, Literal, Protocol

from torch import Tensor, nn
from transformers import (
    AltCLIPModel,
    ChineseCLIPModel,
    CLIPModel,
    MetaClip2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipModel,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.teachers.mixed_towers import MixedDualEncoder
from edgeclip.compress.teachers.own_settings import with_own_settings
from edgeclip.runtime.spec import Tower

# How a text tower meets padding. "unseen": attention is causal, and the tower pools at the end
# token. "masked": attention leaves padding out. "seen": every text fills the context, and attention
# sees the padding, as in training.
Padding = Literal["unseen", "masked", "seen"]
_PADDING: dict[str, Padding] = {
    "clip_text_model": "unseen",
    "metaclip_2_text_model": "unseen",
    "siglip_text_model": "seen",
}
_NAMES: dict[Tower, tuple[str, str]] = {
    "image": ("vision_model", "visual_projection"),
    "text": ("text_model", "text_projection"),
}


class Family(Protocol):
    """The adapter of a family of dual encoders.

    `model_type` is what config.json calls it.
    """

    model_type: str

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """Return the class that computes a model of this config."""
        ...

    def dim(self, config: PreTrainedConfig) -> int:
        """Return the length of an embedding."""
        ...

    def tower_names(self, tower: Tower) -> tuple[str, ...]:
        """Return the names of the modules of a tower in the model."""
        ...

    def project(self, model: PreTrainedModel, tower: Tower, pooled: Tensor) -> Tensor:
        """Map what a tower pools, float32 [N, width], to embeddings [N, dim], not normalised."""
        ...


class ProjectedFamily:
    """Towers with a linear projection each: CLIP, MetaCLIP 2, AltCLIP, Chinese-CLIP."""

    def __init__(self, model_type: str, model_class: type[PreTrainedModel]) -> None:
        self.model_type = model_type
        self._model_class = model_class

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """Return the class of the family."""
        return with_own_settings(self._model_class, config)

    def dim(self, config: PreTrainedConfig) -> int:
        """Return the outputs of the projections."""
        return int(config.projection_dim)

    def tower_names(self, tower: Tower) -> tuple[str, ...]:
        """Return the tower and its projection."""
        return _NAMES[tower]

    def project(self, model: PreTrainedModel, tower: Tower, pooled: Tensor) -> Tensor:
        """Multiply by the projection."""
        projection: nn.Module = getattr(model, _NAMES[tower][1])
        projected: Tensor = projection(pooled)
        return projected


class MixedFamily(ProjectedFamily):
    """Any image tower beside any text tower: `VisionTextDualEncoderModel`."""

    def __init__(self) -> None:
        super().__init__("vision-text-dual-encoder", VisionTextDualEncoderModel)

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """Return transformers' class, or ours for towers that it cannot make."""
        mixed = MixedDualEncoder.is_needed(config)
        return with_own_settings(MixedDualEncoder if mixed else self._model_class, config)


class SiglipFamily:
    """SigLIP, and SigLIP 2 of fixed resolution: towers that end in the embedding.

    The image tower pools by attention, the text tower at the last place, with a linear head.
    """

    model_type = "siglip"

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """Return the class of the family."""
        return with_own_settings(SiglipModel, config)

    def dim(self, config: PreTrainedConfig) -> int:
        """Return the width of the image tower, which is that of the embeddings."""
        return int(config.vision_config.hidden_size)

    def tower_names(self, tower: Tower) -> tuple[str, ...]:
        """Return the tower alone."""
        return _NAMES[tower][:1]

    def project(self, model: PreTrainedModel, tower: Tower, pooled: Tensor) -> Tensor:
        """Return the embeddings as they are."""
        return pooled


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        ProjectedFamily("clip", CLIPModel),
        SiglipFamily(),
        ProjectedFamily("altclip", AltCLIPModel),
        ProjectedFamily("chinese_clip", ChineseCLIPModel),
        ProjectedFamily("metaclip_2", MetaClip2Model),
        MixedFamily(),
    )
}


def family_of(model: PreTrainedModel) -> Family:
    """Return the adapter of a model.

    Raises:
        KeyError: the model is of no family that is supported.
    """
    return FAMILIES[str(model.config.model_type)]


def text_padding(model: PreTrainedModel) -> Padding:
    """Return how the text tower of a model meets padding."""
    return _PADDING.get(str(model.config.text_config.model_type), "masked")


def text_positions(model: PreTrainedModel) -> int:
    """Return the number of tokens that the text tower has positions for."""
    count = int(model.config.text_config.max_position_embeddings)
    tower: Any = model.text_model
    for name, module in tower.named_modules():
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and offset is not None:
            return count - int(offset) - 1  # RoBERTa and its kin count positions from there
    return count
