"""From pairs to tensors, through the runtime's own preprocessing and tokenization."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from edgeclip.compress.compute import autocast
from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.preprocess import preprocess_batch


def pixels_of(images: Sequence[Image.Image], model: DualEncoder) -> Tensor:
    """RGB pictures -> float32 [N, 3, size, size] on the model's device."""
    return torch.from_numpy(preprocess_batch(images, model.image_spec)).to(model.device)


def ids_of(captions: Sequence[str], model: DualEncoder) -> Tensor:
    """Captions -> int64 [N, longest], cut at the model's context length, on its device."""
    return torch.from_numpy(model.text_tokenizer.encode(captions, truncate=True)).to(model.device)


def captions_of(source: Source, indices: Sequence[int]) -> list[str]:
    """The captions of some pairs.

    Raises:
        ConfigError: a pair has none.
    """
    found = [source.caption(index) for index in indices]
    captions = [caption for caption in found if caption is not None]
    if len(captions) < len(found):
        raise ConfigError(f"{source.name}: this needs a caption for every picture")
    return captions


@contextmanager
def inference(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode, no gradients, and the machine's fast number format."""
    before = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast("auto", model.device):
            yield
    finally:
        model.train(before)


def embed_source(
    model: DualEncoder, source: Source, *, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """All pictures and captions of a source -> two float32 [N, dim], in full precision."""
    image, text = [], []
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(source), batch_size):
            chunk = range(first, min(first + batch_size, len(source)))
            pictures = [source[index].image for index in chunk]
            image.append(model.embed_image(pixels_of(pictures, model)).cpu())
            text.append(model.embed_text(ids_of(captions_of(source, chunk), model)).cpu())
    return torch.cat(image), torch.cat(text)
