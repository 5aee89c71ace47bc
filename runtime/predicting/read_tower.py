"""The sizes of an image tower, from the `config.json` that Hugging Face writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.predicting.tower_pieces import (
    CONV_PATCH,
    AnyTower,
    ConvTower,
    TransformerTower,
    image_tokens,
)

_MOST_BYTES = 2**20


def read_image_tower(path: Path, *, image_size: int, dim: int) -> AnyTower:
    """Read what a CLIP's image tower consists of; no weights are looked at.

    Args:
        path: `config.json` of a `CLIPModel`, or of a dual encoder whose image tower is a ConvNeXt.
        image_size: side of the picture in pixels.
        dim: length of an embedding.

    Raises:
        ConfigError: unreadable, another kind of tower, or a size that is missing or is none.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} is too large for a configuration: export the bundle anew")
        vision = json.loads(path.read_text(encoding="utf-8"))["vision_config"]
        kind = vision.get("model_type", "clip_vision_model")
        if kind == "convnext" and vision.get("patch_size", CONV_PATCH) == CONV_PATCH:
            return ConvTower(
                widths=tuple(map(_whole, vision["hidden_sizes"])),
                depths=tuple(map(_whole, vision["depths"])),
                image_size=image_size,
                dim=dim,
            )
        if kind == "clip_vision_model":
            return _transformer(vision, image_size, dim)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} does not tell the sizes of an image tower ({error!r})") from None
    raise ConfigError(f"{path} is of a {kind}, whose pieces nobody knows: measure its cuts instead")


def _transformer(vision: Mapping[str, Any], image_size: int, dim: int) -> TransformerTower:
    patch = _whole(vision["patch_size"])
    return TransformerTower(
        part="image",
        width=_whole(vision["hidden_size"]),
        heads=_whole(vision["num_attention_heads"]),
        hidden=_whole(vision["intermediate_size"]),
        layers=_whole(vision["num_hidden_layers"]),
        tokens=image_tokens(image_size, max(1, patch)),
        dim=dim,
        patch=patch,
        gelu=vision.get("hidden_act", "quick_gelu") != "quick_gelu",
    )


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value
