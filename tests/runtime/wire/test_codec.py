"""Codecs of tensors at a cut and of pictures."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.wire.codec import (
    FLOAT_CODECS,
    IMAGE_CODECS,
    MAX_FRAMES,
    PIXEL_CODECS,
    CodecName,
    check_image_codec,
    codec_name,
    decode,
    encode,
    encode_picture,
)

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
VALUES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=FINITE
)
TOKENS = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)


def frames(*contents: bytes) -> NDArray[Any]:
    found = np.empty(len(contents), object)
    found[:] = contents
    return found


@pytest.mark.parametrize("codec", ["fp32", "int8", "int8-zstd"])
@given(values=VALUES, data=st.data())
def test_floats_come_back_as_near_as_their_codec_allows(
    codec: CodecName, values: NDArray[np.float32], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(1, values.ndim - 1))
    tensors = encode(codec, values, axis=axis)
    found = decode(codec, tensors, shape=values.shape[1:], axis=axis)
    assert found.dtype == np.float32
    if codec == "fp32":
        np.testing.assert_array_equal(found, values)
        return
    others = tuple(at for at in range(1, values.ndim) if at != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    # Half a step, and what float32 itself rounds.
    assert (np.abs(found - values) <= largest / 254 * (1 + 1e-5) + 1e-37).all()


@given(values=VALUES)
def test_fp16_clips_what_it_cannot_hold(values: NDArray[np.float32]) -> None:
    found = decode("fp16", encode("fp16", values), shape=values.shape[1:])
    np.testing.assert_allclose(found, values.clip(-65504, 65504), rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("codec", PIXEL_CODECS)
@given(pixels=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_pixels_come_back_unaltered(codec: CodecName, pixels: NDArray[np.uint8]) -> None:
    found = decode(codec, encode(codec, pixels), shape=pixels.shape[1:])
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("codec", FLOAT_CODECS)
def test_rows_do_not_depend_on_each_other(codec: CodecName) -> None:
    together = encode(codec, TOKENS)
    for number in range(len(TOKENS)):
        alone = encode(codec, TOKENS[number : number + 1])
        for name, tensor in alone.items():
            np.testing.assert_array_equal(tensor, together[name][number : number + 1])


def test_channel_of_zeros_stays_zero() -> None:
    values = TOKENS * np.array([1, 0, 1, 0, 1], np.float32)
    np.testing.assert_array_equal(
        decode("int8", encode("int8", values), shape=(7, 5))[..., [1, 3]], 0
    )


@pytest.mark.parametrize("codec", FLOAT_CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_do_not_pass(codec: CodecName, bad: float) -> None:
    values = TOKENS.copy()
    values[1, 2, 3] = bad

    def there_and_back() -> NDArray[Any]:
        return decode(codec, encode(codec, values), shape=(7, 5))

    if codec == "fp16" and np.isinf(bad):
        assert np.isfinite(there_and_back()).all()  # clipped to the largest value
        return
    with pytest.raises(InputError, match=r"not finite|NaN or infinity"):
        there_and_back()


@pytest.mark.parametrize("codec", get_args(CodecName))
def test_other_shapes_and_dtypes_are_refused(codec: CodecName) -> None:
    values = TOKENS if codec in FLOAT_CODECS else TOKENS.astype(np.uint8)
    tensors = encode(codec, values)
    with pytest.raises(InputError):
        decode(codec, tensors, shape=(7, 6))
    with pytest.raises(InputError):
        decode(codec, {}, shape=(7, 5))
    with pytest.raises(InputError):
        decode(codec, {**tensors, "more": TOKENS}, shape=(7, 5))
    with pytest.raises(InputError, match="cut"):
        decode(codec, {**tensors, "cut": TOKENS.astype(np.float64)}, shape=(7, 5))
    with pytest.raises(InputError):
        encode(codec, TOKENS.astype(np.float64))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 3e38])
def test_scales_that_are_none_are_refused(scale: float) -> None:
    tensors = encode("int8", TOKENS)
    tensors["scale"] = np.full((3, 5), scale, np.float32)
    with pytest.raises(InputError, match="positive, finite"):
        decode("int8", tensors, shape=(7, 5))


def test_scales_of_other_rows_or_channels_are_refused() -> None:
    cut = encode("int8", TOKENS)["cut"]
    for shape in ((2, 5), (3, 4), (3,), (3, 5, 1)):
        with pytest.raises(InputError):
            decode("int8", {"cut": cut, "scale": np.ones(shape, np.float32)}, shape=(7, 5))


def packed(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(b"\x01" * size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no frame",
        packed(35)[:-3],
        packed(35) + b"more",
        packed(34),
        packed(2**30),
        zstandard.ZstdCompressor(write_content_size=False).compress(b"\x01" * 35),
        packed(35) + packed(35),
        None,
    ],
    ids=["empty", "noise", "cut", "longer", "short", "bomb", "unsized", "two", "not bytes"],
)
def test_frames_that_do_not_hold_one_row_are_refused(content: Any) -> None:
    tensors = {"cut": frames(content), "scale": np.ones((1, 5), np.float32)}
    with pytest.raises(InputError, match="zstd frame"):
        decode("int8-zstd", tensors, shape=(7, 5))


def test_many_small_frames_are_refused() -> None:
    count = MAX_FRAMES + 1
    tensors = {"cut": frames(*[packed(35)] * count), "scale": np.ones((count, 5), np.float32)}
    with pytest.raises(InputError, match=f"N from 1 to {MAX_FRAMES}"):
        decode("int8-zstd", tensors, shape=(7, 5))


@given(content=st.binary(max_size=60))
def test_noise_is_refused_in_one_way(content: bytes) -> None:
    with pytest.raises(InputError):
        decode("uint8-zstd", {"cut": frames(content)}, shape=(64,))


def test_names() -> None:
    assert codec_name("int8") == "int8"
    for wrong in ("int4", 3, None, True):
        with pytest.raises(InputError, match="use one of fp32, fp16"):
            codec_name(wrong)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"edgeclip\[split\]"):
        encode("int8-zstd", TOKENS)
    assert encode("int8", TOKENS)["cut"].dtype == np.int8


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
