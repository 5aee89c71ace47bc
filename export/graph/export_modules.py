"""Wrap each tower of a dual encoder in a torch module that is ready for ONNX export.

A CLIP tower uses one token of its last layer: the class token (image) or the end-of-text token
(text). So the last layer computes keys and values for all tokens, but query, projection and MLP for
that token only. This is exact, and saves about a tenth of a ViT's time. So does a SigLIP's text
tower, which uses the last place; its image tower pools by attention, written out here so that the
query, a constant, is computed once. Other families run as `DualEncoder` runs them. An image tower
with patch features needs the whole last layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AltCLIPVisionModel,
    ChineseCLIPVisionModel,
    CLIPTextModel,
    CLIPVisionModel,
    MetaClip2TextModel,
    MetaClip2VisionModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.runtime.spec import Tower

# Added to the scores of masked tokens. Its softmax is 0 in fp32 and in fp16, which cannot hold the
# usual -3e38.
MASKED = -1e4
# Towers of the layers and names of CLIP's.
_CLIP_IMAGE = (CLIPVisionModel, MetaClip2VisionModel, AltCLIPVisionModel, ChineseCLIPVisionModel)
_CLIP_TEXT = (CLIPTextModel, MetaClip2TextModel)


def tower_module(dual: DualEncoder, tower: Tower, *, patch_features: bool = False) -> nn.Module:
    """Return the export module of a tower, which shares its weights with `dual`, in eval mode.

    The image tower maps float32 [N, 3, size, size] to float32 [N, dim]; the text tower
    int64 [N, length] to float32 [N, dim]. Both results are L2-normalised. With
    `patch_features` the image tower gives the last hidden state of each patch too, float32
    [N, rows, columns, width].

    Raises:
        ExportError: patch features of a tower that has none.
    """
    model: Any = dual.model
    kind: type[nn.Module]
    if tower == "image":
        kind = PlainImageTower
        if patch_features:
            kind = PatchImageTower
        elif isinstance(model.vision_model, _CLIP_IMAGE):
            kind = ClipImageTower
        elif isinstance(model.vision_model, SiglipVisionModel):
            kind = SiglipImageTower
    else:
        kind = PlainTextTower
        if isinstance(model.text_model, _CLIP_TEXT):
            kind = ClipTextTower
        elif isinstance(model.text_model, SiglipTextModel):
            kind = SiglipTextTower
    return kind(dual).eval()


class PlainImageTower(nn.Module):
    """Any image tower, as `DualEncoder.embed_image` runs it."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [N, 3, size, size] -> float32 [N, dim]."""
        return self.dual.embed_image(pixel_values)


class PatchImageTower(nn.Module):
    """Any image tower, with its last hidden state as a second output.

    Hidden states are a sequence [N, class token and patches, width] in transformers, and a
    map [N, width, rows, columns] in convolutional networks.
    """

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, 3, size, size] -> float32 [N, dim], [N, rows, columns, width]."""
        model: Any = self.dual.model
        found = model.vision_model(pixel_values=pixel_values)
        features = self.dual.project("image", found.pooler_output)
        return _normalised(features), patch_map(found.last_hidden_state)


def patch_map(hidden: Tensor) -> Tensor:
    """[N, width, rows, columns] or [N, tokens, width] -> [N, rows, columns, width]."""
    if hidden.dim() == 4:
        return torch.permute(hidden, (0, 2, 3, 1))
    side = math.isqrt(hidden.shape[1])  # one more token than patches, or as many
    extra = hidden.shape[1] - side * side
    if extra not in (0, 1):
        raise ExportError("patch features need a square grid of patches, with one class token")
    return torch.unflatten(hidden[:, extra:], 1, (side, side))


class PlainTextTower(nn.Module):
    """Any text tower, as `DualEncoder.embed_text` runs it."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [N, length] -> float32 [N, dim]."""
        return self.dual.embed_text(input_ids)


class ClipImageTower(nn.Module):
    """A CLIP's image tower whose last layer is computed for the class token only."""

    vision_model: nn.Module
    projection: nn.Module

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        model: Any = dual.model
        self.vision_model = model.vision_model
        self.projection = model.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [N, 3, size, size] -> float32 [N, dim]."""
        model: Any = self.vision_model
        hidden = model.pre_layrnorm(model.embeddings(pixel_values))
        *earlier, last = model.encoder.layers
        for layer in earlier:
            hidden = layer(hidden, None)
        pooled = _layer_for_one_token(last, hidden, hidden[:, :1], None)
        return _normalised(self.projection(model.post_layernorm(pooled)))


class ClipTextTower(nn.Module):
    """A CLIP's text tower whose last layer is computed for the end-of-text token only.

    Attention is causal, so nothing behind that token can change the result.
    """

    text_model: nn.Module
    projection: nn.Module
    mask: Tensor

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        model: Any = dual.model
        self.text_model = model.text_model
        self.projection = model.text_projection
        self.eos_id = int(model.text_model.eos_token_id)
        self.at_largest_id = dual.pools_at_largest_id
        length = model.text_model.config.max_position_embeddings
        device = next(self.text_model.parameters()).device
        mask = torch.full((length, length), MASKED, device=device).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [N, length] -> float32 [N, dim]."""
        model: Any = self.text_model
        count, length = input_ids.shape
        mask = self.mask[:length, :length]
        hidden = model.embeddings(input_ids)
        *earlier, last = model.encoder.layers
        for layer in earlier:
            hidden = layer(hidden, mask[None, None])
        end = end_of_text(input_ids, None if self.at_largest_id else self.eos_id)
        token = hidden[torch.arange(count, device=input_ids.device), end]
        pooled = _layer_for_one_token(last, hidden, token[:, None], mask[end][:, None, None])
        return _normalised(self.projection(model.final_layer_norm(pooled)))


def end_of_text(input_ids: Tensor, eos_id: int | None) -> Tensor:
    """Return the position of the token that CLIP pools at: int64 [N, length] -> int64 [N].

    It is the first `eos_id`; None for the largest id, see `DualEncoder.pools_at_largest_id`.
    """
    ids = input_ids.to(torch.int32)
    return (ids if eos_id is None else (ids == eos_id).to(torch.int32)).argmax(dim=-1)


class SiglipImageTower(nn.Module):
    """A `SiglipVisionModel` with its pooling by attention written out.

    The one query is the same for all pictures: a constant of the graph.
    """

    query: Tensor

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        model: Any = dual.model
        self.dual = dual
        head = model.vision_model.head
        self.heads = (head.attention.num_heads, head.attention.head_dim)
        # Separate layers share the memory of the joint weights of query, key and value.
        weights = head.attention.in_proj_weight.chunk(3)
        biases = head.attention.in_proj_bias.chunk(3)
        self.key, self.value = (_linear(weights[place], biases[place]) for place in (1, 2))
        with torch.no_grad():
            query = nn.functional.linear(head.probe, weights[0], biases[0])
        self.register_buffer("query", query.unflatten(-1, self.heads).transpose(1, 2))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [N, 3, size, size] -> float32 [N, dim]."""
        whole: Any = self.dual.model
        model = whole.vision_model
        hidden = model.embeddings(pixel_values)
        for layer in model.encoder.layers:
            hidden = layer(hidden, None)
        hidden = model.post_layernorm(hidden)
        head = model.head
        key = self.key(hidden).unflatten(-1, self.heads).transpose(1, 2)
        value = self.value(hidden).unflatten(-1, self.heads).transpose(1, 2)
        scores = self.query @ key.transpose(-1, -2) * self.heads[1] ** -0.5
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2)
        pooled = head.attention.out_proj(mixed)
        pooled = pooled + head.mlp(head.layernorm(pooled))
        return _normalised(self.dual.project("image", pooled[:, 0]))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return made


class SiglipTextTower(nn.Module):
    """A `SiglipTextModel` whose last layer is computed for the last place only."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [N, context_length] -> float32 [N, dim]."""
        whole: Any = self.dual.model
        model = whole.text_model
        hidden = model.embeddings(input_ids)
        *earlier, last = model.encoder.layers
        for layer in earlier:
            hidden = layer(hidden, None)
        pooled = _layer_for_one_token(last, hidden, hidden[:, -1:], None)
        features = model.head(model.final_layer_norm(pooled))
        return _normalised(self.dual.project("text", features))


def _layer_for_one_token(layer: Any, hidden: Tensor, token: Tensor, mask: Tensor | None) -> Tensor:
    """Run a `CLIPEncoderLayer` for `token` [N, 1, width], which sees `hidden` [N, L, width].

    `mask` [N, 1, 1, L] is added to the scores. Returns [N, width].
    """
    attention = layer.self_attn
    heads = (attention.num_heads, attention.head_dim)
    seen = layer.layer_norm1(hidden)
    query = attention.q_proj(layer.layer_norm1(token)).unflatten(-1, heads).transpose(1, 2)
    key = attention.k_proj(seen).unflatten(-1, heads).transpose(1, 2)
    value = attention.v_proj(seen).unflatten(-1, heads).transpose(1, 2)
    scores = query @ key.transpose(-1, -2) * attention.scale
    if mask is not None:
        scores = scores + mask
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2)
    token = token + attention.out_proj(mixed)
    result: Tensor = token + layer.mlp(layer.layer_norm2(token))
    return result[:, 0]


def _normalised(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1)
