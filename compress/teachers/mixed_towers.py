"""Dual encoders of towers that transformers has no automatic class for.

`VisionTextDualEncoderModel` makes its towers by `AutoModel`, which knows neither the text towers
of SigLIP, AltCLIP, Chinese-CLIP and MetaCLIP 2 nor the image towers of AltCLIP and MetaCLIP 2.
Students of these families have them beside a projection, or beside an image tower of another kind,
some of which `image_towers.py` makes.
"""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AltCLIPTextConfig,
    AltCLIPTextModel,
    AltCLIPVisionConfig,
    AltCLIPVisionModel,
    ChineseCLIPTextConfig,
    ChineseCLIPTextModel,
    MetaClip2TextConfig,
    MetaClip2TextModel,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipTextConfig,
    SiglipTextModel,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.teachers.image_towers import IMAGE_TOWERS

_TOWERS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    **IMAGE_TOWERS,
    AltCLIPTextConfig: AltCLIPTextModel,
    AltCLIPVisionConfig: AltCLIPVisionModel,
    ChineseCLIPTextConfig: ChineseCLIPTextModel,
    MetaClip2TextConfig: MetaClip2TextModel,
    MetaClip2VisionConfig: MetaClip2VisionModel,
    SiglipTextConfig: SiglipTextModel,
}


def tower_of(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Make a tower of random weights; None if that is left to `AutoModel`."""
    if isinstance(config, ChineseCLIPTextConfig):
        return ChineseCLIPTextModel(config, add_pooling_layer=False)  # it pools at the first token
    made = _TOWERS.get(type(config))
    return None if made is None else made(config)


class MixedDualEncoder(VisionTextDualEncoderModel):
    """A `VisionTextDualEncoderModel` whose towers may be of the families above.

    SigLIP's text tower has no projection where its head gives embeddings of their length already.

    Args:
        config: a `VisionTextDualEncoderConfig`.
        vision_model, text_model: the towers; None makes them from the config.
    """

    def __init__(
        self,
        config: Any = None,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ) -> None:
        vision_model = vision_model or tower_of(config.vision_config)
        text_model = text_model or tower_of(config.text_config)
        super().__init__(config, vision_model, text_model)
        dim = int(config.projection_dim)
        self.add_module("visual_projection", _projection(config.vision_config, dim))
        self.add_module("text_projection", _projection(config.text_config, dim))

    @staticmethod
    def is_needed(config: Any) -> bool:
        """Tell whether transformers cannot make the towers of a config by itself."""
        return not _TOWERS.keys().isdisjoint((type(config.vision_config), type(config.text_config)))

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embed int64 [N, length]; `pooler_output` is float32 [N, dim]."""
        found = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        pooled = found.pooler_output
        if pooled is None:
            pooled = found.last_hidden_state[:, 0]
        found.pooler_output = self.text_projection(pooled)
        return found


def pooled_width(config: PreTrainedConfig) -> int:
    """Return the width of what a tower pools."""
    if isinstance(config, AltCLIPTextConfig):
        return int(config.project_dim)
    if isinstance(config, SiglipTextConfig):
        return int(config.projection_size or config.hidden_size)
    return int(config.hidden_size)


def _projection(config: PreTrainedConfig, dim: int) -> nn.Module:
    width = pooled_width(config)
    if width == dim and isinstance(config, SiglipTextConfig):
        return nn.Identity()
    return nn.Linear(width, dim, bias=False)
