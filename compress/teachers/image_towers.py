"""Image towers that transformers has in another form: what `AutoModel` makes would not do.

SwiftFormer pools nothing there. EfficientNet, LeViT and MobileViTV2 are written so that they can be
exported, with the same weights and the same answers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetModel,
    LevitConfig,
    LevitModel,
    MobileViTV2Config,
    MobileViTV2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SwiftFormerConfig,
    SwiftFormerModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.levit.modeling_levit import LevitAttention, LevitAttentionSubsample
from transformers.models.mobilevitv2.modeling_mobilevitv2 import MobileViTV2Layer

from edgeclip.compress.teachers.multi_scale import MultiScaleConfig, MultiScaleTower


class PooledSwiftFormer(SwiftFormerModel):
    """A SwiftFormer (Shaker et al. 2023) with the norm and the mean of its classifier."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm2d(config.embed_dims[-1], eps=config.batch_norm_eps)

    def forward(self, pixel_values: Any = None, **kwargs: Any) -> Any:
        """float32 [N, 3, size, size] -> a map, and `pooler_output` [N, width]."""
        hidden = super().forward(pixel_values, return_dict=True).last_hidden_state
        pooled = self.norm(hidden).mean((-2, -1))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class PlainEfficientNet(EfficientNetModel):
    """An EfficientNet whose mean over all places is no window larger than the map."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.pooling_type == "mean":
            self.pooler: nn.Module = nn.AdaptiveAvgPool2d(1)  # type: ignore[assignment]


class _Attention(LevitAttention):
    def get_attention_biases(self, device: torch.device) -> Tensor:
        return _biases(self)


class _AttentionSubsample(LevitAttentionSubsample):
    def get_attention_biases(self, device: torch.device) -> Tensor:
        return _biases(self)


def _biases(attention: Any) -> Tensor:
    biases: Tensor = attention.attention_biases[:, attention.attention_bias_idxs]
    return biases


class FreshLevit(LevitModel):
    """A LeViT that keeps no biases of attention, which outlive a change of its weights."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for module in self.modules():
            if type(module) is LevitAttention:
                module.__class__ = _Attention
            elif type(module) is LevitAttentionSubsample:
                module.__class__ = _AttentionSubsample


class _Layer(MobileViTV2Layer):
    """Cuts a map into patches by reshaping, where its sides are multiples of theirs."""

    @property
    def _patch(self) -> tuple[int, int]:
        high: Any = self.patch_height
        wide: Any = self.patch_width
        return int(high), int(wide)

    def unfolding(self, feature_map: Tensor) -> tuple[Tensor, tuple[int, int]]:
        rows, columns = (int(side) for side in feature_map.shape[-2:])
        high, wide = self._patch
        if rows % high or columns % wide:
            found: tuple[Tensor, tuple[int, int]] = super().unfolding(feature_map)
            return found
        grid = feature_map.unflatten(-2, (-1, high)).unflatten(-1, (-1, wide))
        patches = grid.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)
        return patches, (rows, columns)

    def folding(self, patches: Tensor, output_size: tuple[int, int]) -> Tensor:
        rows, columns = output_size
        high, wide = self._patch
        if rows % high or columns % wide:
            folded: Tensor = super().folding(patches, output_size)
            return folded
        grid = patches.unflatten(-1, (rows // high, columns // wide)).unflatten(2, (high, wide))
        whole: Tensor = grid.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
        return whole


class ReshapingMobileViTV2(MobileViTV2Model):
    """A MobileViTV2 without Unfold and Fold, which few engines have."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for module in self.modules():
            if type(module) is MobileViTV2Layer:
                module.__class__ = _Layer


IMAGE_TOWERS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    EfficientNetConfig: PlainEfficientNet,
    LevitConfig: FreshLevit,
    MobileViTV2Config: ReshapingMobileViTV2,
    MultiScaleConfig: MultiScaleTower,
    SwiftFormerConfig: PooledSwiftFormer,
}
