import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.wire.codec import IMAGE_CODECS, check_image_codec, encode_picture

SPEC = ImageSpec(size=24, resize=24, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def picture() -> bytes:
    """A JPEG file of 200 x 120 pixels with soft shapes."""
    rows, columns = np.mgrid[0:120, 0:200] / 40
    pixels = 127 * (1 + np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], -1))
    written = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(written, "JPEG", quality=95)
    return written.getvalue()


def test_file_is_sent_as_it_is(picture: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(picture)
    assert encode_picture("file", picture, SPEC) == picture
    assert encode_picture("file", path, SPEC) == picture
    assert encode_picture("file", str(path), SPEC) == picture


@pytest.mark.parametrize("margin", [0, 8], ids=["no margin", "margin"])
def test_lossless_gives_the_server_the_same_pixels(picture: bytes, margin: int) -> None:
    spec = dataclasses.replace(SPEC, resize=SPEC.size + margin)
    sent = encode_picture("webp-lossless", picture, spec)
    np.testing.assert_array_equal(resize_and_crop(sent, spec), resize_and_crop(picture, spec))


@pytest.mark.parametrize("codec", ["jpeg-90", "webp-80"])
def test_lossy_is_near_and_small(picture: bytes, codec: str) -> None:
    sent = encode_picture(codec, picture, SPEC)
    exact = resize_and_crop(picture, SPEC).astype(float)
    assert len(sent) < 24 * 24 * 3
    assert np.abs(resize_and_crop(sent, SPEC) - exact).mean() < 8


def test_quality_costs_bytes(picture: bytes) -> None:
    sizes = [len(encode_picture(f"jpeg-{q}", picture, SPEC)) for q in (10, 50, 95)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_known_codecs_can_be_written() -> None:
    for codec in IMAGE_CODECS:
        check_image_codec(codec)


@pytest.mark.parametrize("codec", ["png", "jpeg", "jpeg-0", "jpeg-101", "webp-", "JPEG-90", ""])
def test_unknown_codecs_are_refused(picture: bytes, codec: str) -> None:
    with pytest.raises(InputError, match="use file, jpeg-Q or webp-Q"):
        encode_picture(codec, picture, SPEC)


def test_what_is_no_file_cannot_be_sent_as_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use jpeg-90"):
        encode_picture("file", np.zeros((30, 30, 3), np.uint8), SPEC)
    with pytest.raises(InputError, match="cannot read"):
        encode_picture("file", tmp_path / "none.jpg", SPEC)
    with pytest.raises(InputError):
        encode_picture("jpeg-90", b"no picture", SPEC)
