from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.export_modules import (
    ClipImageTower,
    ClipTextTower,
    PlainImageTower,
    PlainTextTower,
    end_of_text,
    tower_module,
)

EXACT = 1e-6


def texts(dual: DualEncoder, length: int, ends: list[int]) -> Tensor:
    """Random ids; row i ends at position `ends[i]`, with padding behind."""
    spec = dual.spec.text
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, spec.vocab_size, (len(ends), length), generator=generator)
    assert spec.bos_id is not None
    assert spec.eos_id is not None
    ids[:, 0] = spec.bos_id
    for row, end in zip(ids, ends, strict=True):
        row[end] = spec.eos_id
        row[end + 1 :] = spec.pad_id
    return ids


def gap(tower: torch.nn.Module, plain: Callable[[Tensor], Tensor], values: Tensor) -> float:
    with torch.inference_mode():
        return float((tower(values) - plain(values)).abs().max())


@pytest.mark.parametrize("count", [1, 5])
def test_the_class_token_alone_gives_the_same_embedding(clip: DualEncoder, count: int) -> None:
    tower = tower_module(clip, "image")
    assert isinstance(tower, ClipImageTower)
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    assert gap(tower, clip.embed_image, pixels) < EXACT


@pytest.mark.parametrize("length", [3, 4, 11, 23, 24])
def test_the_end_token_alone_gives_the_same_embedding(clip: DualEncoder, length: int) -> None:
    tower = tower_module(clip, "text")
    assert isinstance(tower, ClipTextTower)
    ids = texts(clip, length, [length - 1, length - 2, max(1, length // 2), 1])
    assert gap(tower, clip.embed_text, ids) < EXACT
    assert gap(tower, clip.embed_text, ids[:1]) < EXACT


def test_a_legacy_end_token_is_the_largest_id(legacy_clip: DualEncoder) -> None:
    tower = tower_module(legacy_clip, "text")
    ids = texts(legacy_clip, 12, [11, 7, 3])
    largest = ids.argmax(dim=-1)
    assert (largest != torch.tensor([11, 7, 3])).any()
    assert torch.equal(end_of_text(ids, None), largest)
    assert gap(tower, legacy_clip.embed_text, ids) < EXACT


def test_the_first_end_token_counts_where_padding_is_the_same() -> None:
    ids = torch.tensor([[7, 5, 9, 1, 1, 1], [7, 1, 1, 1, 1, 1]])
    assert end_of_text(ids, 1).tolist() == [3, 1]


def test_nothing_behind_the_end_of_a_text_matters(clip: DualEncoder) -> None:
    tower = tower_module(clip, "text")
    ids = texts(clip, 9, [8])
    padded = torch.nn.functional.pad(ids, (0, 10), value=clip.spec.text.pad_id)
    noise = padded.clone()
    noise[:, 9:] = 17
    with torch.inference_mode():
        alone, other, third = tower(ids), tower(padded), tower(noise)
    assert (alone - other).abs().max() < EXACT
    assert (alone - third).abs().max() < EXACT


def test_other_families_run_as_they_are(convnext: DualEncoder) -> None:
    image, text = tower_module(convnext, "image"), tower_module(convnext, "text")
    assert isinstance(image, PlainImageTower)
    assert isinstance(text, PlainTextTower)
    assert gap(image, convnext.embed_image, torch.randn(2, 3, 32, 32)) == 0
    assert gap(text, convnext.embed_text, texts(convnext, 8, [7, 4])) == 0


def test_a_tower_is_in_evaluation_mode(clip: DualEncoder) -> None:
    clip.train()
    assert not any(module.training for module in tower_module(clip, "text").modules())
    clip.eval()
