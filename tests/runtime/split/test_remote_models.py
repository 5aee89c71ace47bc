import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.split.remote_models import ImageBatch, is_image_query, typical_image_file

WHOLE = ImageSpec(size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CROP = ImageSpec(size=12, resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def scene(width: int = 40, height: int = 30) -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def file_of(image: Image.Image, kind: str) -> bytes:
    written = io.BytesIO()
    image.save(written, kind)
    return written.getvalue()


def size_of(content: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(content)) as image:
        return image.format, image.size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_small_files_go_as_they_are(tmp_path: Path, kind: str) -> None:
    content = file_of(scene(), kind)
    path = tmp_path / "picture"
    path.write_bytes(content)
    pictures = ImageBatch([content, path, str(path)], WHOLE)
    assert pictures.compressed("file") == [content] * 3
    assert not pictures.is_decoded


@pytest.mark.parametrize(
    "picture",
    [
        file_of(scene(), "BMP"),
        file_of(scene(1100, 1000), "PNG"),
        scene(),
        np.asarray(scene()),
    ],
)
def test_everything_else_is_cut_to_size(picture: Any) -> None:
    (sent,) = ImageBatch(picture, WHOLE).compressed("file")
    assert size_of(sent) == ("JPEG", (16, 16))


def test_what_the_tower_will_cut_off_is_sent_too() -> None:
    (sent,) = ImageBatch(scene(), CROP).compressed("webp-lossless")
    assert size_of(sent) == ("WEBP", (16, 16))
    np.testing.assert_array_equal(crop_batch([sent], CROP), crop_batch([scene()], CROP))


def test_pixels_are_those_of_the_encoder_and_made_once() -> None:
    pictures = ImageBatch([scene(), scene(30, 40)], WHOLE)
    np.testing.assert_array_equal(pictures.pixels, crop_batch([scene(), scene(30, 40)], WHOLE))
    assert pictures.is_decoded
    assert pictures.pixels is pictures.pixels
    second = pictures.select(np.array([1]))
    np.testing.assert_array_equal(second.pixels, pictures.pixels[1:])
    assert len(second) == 1


def test_one_picture_or_several() -> None:
    batch = np.zeros((3, 16, 16, 3), np.uint8)
    assert [len(ImageBatch(item, WHOLE)) for item in (batch, batch[0], [scene()], [])] == [
        3,
        1,
        1,
        0,
    ]
    assert ImageBatch([], WHOLE).pixels.shape == (0, 16, 16, 3)


def test_what_is_no_picture() -> None:
    for bad in (b"nothing", "missing.png"):
        with pytest.raises(InputError):
            ImageBatch(bad, WHOLE).compressed("file")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("a text", False),
        (["a text", "another"], False),
        ([scene(), "a text"], False),
        ([], False),
        (np.zeros((2, 8), np.float32), False),
        (np.zeros((8, 8), np.uint8), True),
        (scene(), True),
        (Path("picture.png"), True),
        ([b"", Path("picture.png")], True),
    ],
)
def test_queries_that_are_pictures(query: Any, expected: bool) -> None:
    assert is_image_query(query) is expected


def test_typical_file_may_be_sent_as_it_is() -> None:
    content = typical_image_file()
    assert ImageBatch(content, WHOLE).compressed("file") == [content]
    assert size_of(content) == ("JPEG", (1024, 1024))
