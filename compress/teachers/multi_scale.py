"""An image tower that pools features of several scales by attention.

A ConvNeXt (Liu et al. 2022) makes feature maps of falling size. All but the first are brought to
one width and summed from the coarsest to the finest (feature pyramid, Lin et al. 2017); a learned
query attends to the places of all of them (attention pooling, Lee et al. 2019, as in SigLIP).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, ConvNextConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextEncoder


class MultiScaleConfig(PreTrainedConfig):
    """Sizes of a `MultiScaleTower`.

    Args:
        hidden_sizes, depths: channels and blocks of each stage of the ConvNeXt.
        hidden_size: channels of the pyramid, a multiple of `num_attention_heads`.
        num_attention_heads: of the attention that pools.
        image_size: side of a picture in pixels.
        patch_size: side of the patches that the first stage begins with, in pixels.
    """

    model_type = "edgeclip_multi_scale"

    hidden_sizes: list[int] | tuple[int, ...] = (48, 96, 192)
    depths: list[int] | tuple[int, ...] = (2, 2, 4)
    hidden_size: int = 192
    num_attention_heads: int = 6
    image_size: int = 64
    patch_size: int = 4
    num_channels: int = 3
    initializer_range: float = 0.02


class MultiScaleTower(PreTrainedModel):
    """The tower: float32 [N, 3, size, size] to a map and to what attention pools of all maps."""

    config: Any
    config_class = MultiScaleConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stages = ConvNextConfig(
            num_stages=len(config.hidden_sizes),
            hidden_sizes=list(config.hidden_sizes),
            depths=list(config.depths),
            patch_size=config.patch_size,
            image_size=config.image_size,
            layer_scale_init_value=0.0,
        )
        width, levels = config.hidden_size, len(config.hidden_sizes) - 1
        self.embeddings = ConvNextEmbeddings(stages)
        self.encoder = ConvNextEncoder(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(size, width, 1) for size in config.hidden_sizes[1:])
        self.level = nn.Parameter(torch.zeros(levels, width))
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPool(width, config.num_attention_heads)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, AttentionPool):
            nn.init.normal_(module.query, std=module.query.shape[-1] ** -0.5)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the finest map [N, width, rows, columns], and `pooler_output` [N, width]."""
        hidden = self.embeddings(pixel_values)
        maps = []
        for stage in self.encoder.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        summed = [side(found) for side, found in zip(self.lateral, maps[1:], strict=True)]
        for number in reversed(range(len(summed) - 1)):
            coarser = nn.functional.interpolate(summed[number + 1], scale_factor=2.0)  # nearest
            summed[number] = summed[number] + coarser
        places = [
            found.flatten(2).transpose(1, 2) + level
            for found, level in zip(summed, self.level, strict=True)
        ]
        pooled = self.pool(self.norm(torch.cat(places, dim=1)))
        return BaseModelOutputWithPooling(last_hidden_state=summed[0], pooler_output=pooled)


class AttentionPool(nn.Module):
    """Pool places [N, places, width] to [N, width] with one learned query, and an MLP behind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """float32 [N, places, width] -> [N, width]."""
        heads, _, size = self.query.shape
        key = self.key(hidden).unflatten(-1, (heads, size)).transpose(1, 2)
        value = self.value(hidden).unflatten(-1, (heads, size)).transpose(1, 2)
        # No product with a constant, which a quantizer would take for a linear layer.
        scores = (key * self.query).sum(dim=-1, keepdim=True) * size**-0.5
        shares = scores.softmax(dim=-2)  # [N, heads, places, 1]
        mixed = (shares.transpose(-1, -2) @ value).flatten(1)
        pooled: Tensor = self.out(mixed)
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled


AutoConfig.register(MultiScaleConfig.model_type, MultiScaleConfig)
