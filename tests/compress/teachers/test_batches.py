from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.compress.data.sources import EmojiSource, FolderSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import (
    captions_of,
    embed_source,
    ids_of,
    inference,
    pixels_of,
)
from edgeclip.runtime.errors import ConfigError


def test_pixels_are_those_of_the_device(teacher: DualEncoder) -> None:
    white, black = Image.new("RGB", (50, 40), "white"), Image.new("RGB", (32, 32))
    pixels = pixels_of([white, black], teacher)
    assert (pixels.shape, pixels.dtype) == ((2, 3, 32, 32), torch.float32)
    assert pixels[0].unique().tolist() == [1.0]  # mean and std are a half
    assert pixels[1].unique().tolist() == [-1.0]


def test_ids_are_padded_and_cut(teacher: DualEncoder) -> None:
    ids = ids_of(["red apple", "tree " * 100], teacher)
    text = teacher.spec.text
    assert (ids.shape, ids.dtype) == ((2, 40), torch.int64)
    assert ids[:, 0].tolist() == [text.bos_id] * 2
    assert ids[1, -1] == text.eos_id
    assert ids[0, -1] == text.pad_id
    assert ids_of(["red apple"], teacher).shape[1] < 10


def test_captions(few_pictures: Path) -> None:
    source = FolderSource(few_pictures)
    assert captions_of(source, [3, 0]) == [source.caption(3), source.caption(0)]


def test_captions_where_there_are_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="1 pictures: this needs a caption for every picture"):
        captions_of(FolderSource(tmp_path), [0])


@pytest.mark.parametrize("training", [True, False])
def test_inference_leaves_the_mode_as_it_was(teacher: DualEncoder, training: bool) -> None:
    teacher.train(training)
    try:
        with inference(teacher):
            assert not teacher.training
            embedding = teacher.embed_text(ids_of(["a tree"], teacher))
        assert not embedding.requires_grad
        with pytest.raises(RuntimeError, match="stop"), inference(teacher):
            raise RuntimeError("stop")
        assert teacher.training is training
    finally:
        teacher.eval()


def test_embedding_a_source_in_any_batches(teacher: DualEncoder) -> None:
    source = EmojiSource("test", 7, size=32)
    image, text = embed_source(teacher, source, batch_size=3)
    assert image.shape == text.shape == (7, 32)
    with torch.inference_mode():
        for index in range(7):
            pair = source[index]
            alone = teacher.embed_image(pixels_of([pair.image], teacher))[0]
            np.testing.assert_allclose(image[index], alone, atol=1e-6)
            alone = teacher.embed_text(ids_of([str(pair.caption)], teacher))[0]
            np.testing.assert_allclose(text[index], alone, atol=1e-6)
