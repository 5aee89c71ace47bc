"""From pairs to tensors, through the runtime's own preprocessing and tokenization."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Pair
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.preprocess import preprocess_batch


def pixels_of(images: Sequence[Image.Image], model: DualEncoder) -> Tensor:
    """RGB pictures -> float32 [N, 3, size, size] on the model's device."""
    return torch.from_numpy(preprocess_batch(images, model.image_spec))


def ids_of(captions: Sequence[str], model: DualEncoder) -> Tensor:
    """Captions -> int64 [N, longest], cut at the model's context length."""
    return torch.from_numpy(model.text_tokenizer.encode(captions, truncate=True))


def collate(pairs: Sequence[Pair], model: DualEncoder) -> tuple[Tensor, Tensor]:
    """Pairs -> (pixel values, input ids).

    Raises:
        ConfigError: a pair without a caption.
    """
    captions = [pair.caption for pair in pairs if pair.caption is not None]
    if len(captions) < len(pairs):
        raise ConfigError("this needs a caption for every picture")
    return pixels_of([pair.image for pair in pairs], model), ids_of(captions, model)
