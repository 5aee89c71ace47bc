"""Settings of EdgeCLIP's own in config.json, and what they change in a tower of transformers.

`vision_config.merge_after`: after these layers of a ViT, each square of two by two patches becomes
one token, their mean. `text_config.token_rank`: token embeddings are the product of a table of this
width and a matrix (ALBERT, Lan et al. 2020, section 3.1).

transformers itself reads over both: its classes find other weights than they look for, or leave all
patches apart.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from edgeclip.runtime.errors import ConfigError


def with_own_settings(kind: type[PreTrainedModel], config: Any) -> type[PreTrainedModel]:
    """Return the class that computes a dual encoder of this config: `kind`, or one made of it."""
    if not own_settings(config):
        return kind
    hashable: Any = kind  # which mypy doubts of this class
    changed: type[PreTrainedModel] = _changed(hashable)
    return changed


def own_settings(config: Any) -> list[object]:
    """Return the settings that a config has, for a fingerprint; an empty list for most."""
    towers = ((config.vision_config, "merge_after"), (config.text_config, "token_rank"))
    return [value for tower, name in towers if (value := getattr(tower, name, None))]


@functools.cache
def _changed(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def initialise(self: Any, config: Any, *towers: Any, **given: Any) -> None:
        kind.__init__(self, config, *towers, **given)
        _merge_patches(self.vision_model, config.vision_config)
        _factorise(self.text_model, getattr(config.text_config, "token_rank", None))

    return type(kind.__name__, (kind,), {"__init__": initialise, "__module__": kind.__module__})


def _factorise(tower: Any, rank: int | None) -> None:
    """Replace the token embeddings by a table of `rank` numbers per token and a matrix."""
    if rank is None:
        return
    whole: Any = tower.get_input_embeddings()
    tower.set_input_embeddings(
        FactorisedEmbedding(*whole.weight.shape, rank=rank, padding_idx=whole.padding_idx)
    )


class FactorisedEmbedding(nn.Embedding):
    """A table of token embeddings of `rank` numbers, and a matrix that makes them `width` wide."""

    def __init__(self, count: int, width: int, *, rank: int, padding_idx: int | None) -> None:
        super().__init__(count, rank, padding_idx=padding_idx)
        self.widen = nn.Linear(rank, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """int64 [N, length] -> [N, length, width]."""
        found: Tensor = self.widen(super().forward(input))
        return found


def _merge_patches(tower: Any, config: PreTrainedConfig) -> None:
    """Let the layers of `config.merge_after`, counted from 1, give a quarter of their patches."""
    after: list[int] = list(getattr(config, "merge_after", None) or ())
    if not after:
        return
    layers = _layers(tower, config)
    if sorted(set(after)) != after or not 1 <= after[0] <= after[-1] < len(layers):
        raise ConfigError(
            f"patches are merged after some of the layers 1 to {len(layers) - 1} of {len(layers)}, "
            f"in ascending order, not after {', '.join(map(str, after))}"
        )
    settings: Any = config
    side = settings.image_size // settings.patch_size
    for number in after:
        if side < 2:
            raise ConfigError(
                f"one patch alone is left before layer {number + 1}: merge less often"
            )
        layers[number - 1].register_forward_hook(functools.partial(_hook, side))
        side = math.ceil(side / 2)


def _layers(tower: Any, config: Any) -> nn.ModuleList:
    for part in tower.modules() if hasattr(config, "num_attention_heads") else ():
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers:
            return part
    raise ConfigError(f"patches of a {config.model_type} cannot be merged: it is no ViT")


def _hook(side: int, layer: nn.Module, given: object, hidden: Tensor) -> Tensor:
    return merged_patches(hidden, side=side)


def merged_patches(hidden: Tensor, *, side: int) -> Tensor:
    """Take the mean of each two by two patches: [N, extra + side x side, width] to a quarter.

    The extra tokens, such as the class token, come first and stay. Of an odd side the last row and
    column are merged in pairs and alone.
    """
    extra = hidden.shape[1] - side * side
    grid = hidden[:, extra:].unflatten(1, (side, side))
    if side % 2:
        grid = torch.cat([grid, grid[:, -1:]], dim=1)
        grid = torch.cat([grid, grid[:, :, -1:]], dim=2)
    half = math.ceil(side / 2)
    patches = grid.unflatten(2, (half, 2)).unflatten(1, (half, 2)).mean(dim=(2, 4)).flatten(1, 2)
    return torch.cat([hidden[:, :extra], patches], dim=1) if extra else patches
