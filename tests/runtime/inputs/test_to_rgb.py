import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import array_to_rgb, image_to_rgb

GREY_16 = np.array([[0, 128, 129, 257], [25_700, 32_768, 65_406, 65_535]], dtype=np.uint16)
GREY_8 = np.array([[0, 0, 1, 1], [100, 128, 254, 255]], dtype=np.uint8)


def first_channel(image: Image.Image) -> list[list[int]]:
    pixels: list[list[int]] = np.asarray(image)[:, :, 0].tolist()
    return pixels


def test_sixteen_bit_grey_is_scaled_and_rounded() -> None:
    expected = GREY_8.tolist()
    expected[0] = [0, 0, 1, 1]  # 128/257 rounds down, 129/257 up
    expected[1] = [100, 128, 254, 255]
    assert first_channel(array_to_rgb(GREY_16)) == expected
    assert first_channel(image_to_rgb(Image.fromarray(GREY_16))) == expected
    assert first_channel(image_to_rgb(Image.fromarray(GREY_16.astype(np.int32)))) == expected


@pytest.mark.parametrize("value", [-1, 65_536])
def test_integer_grey_beyond_sixteen_bits_is_refused(value: int) -> None:
    grey = Image.fromarray(np.full((2, 2), value, dtype=np.int32))
    with pytest.raises(InputError, match="0 to 65535"):
        image_to_rgb(grey)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_plain_modes_become_rgb_as_pillow_converts_them(mode: str) -> None:
    picture = Image.new("RGB", (3, 2), (200, 40, 90))
    source = picture.convert(mode) if mode != "LAB" else Image.new("LAB", (3, 2), (120, 130, 140))
    assert image_to_rgb(source).tobytes() == source.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    grey = Image.new("RGBA", (3, 1), (100, 100, 100, 255))
    grey.putpixel((1, 0), (100, 100, 100, 128))
    grey.putpixel((2, 0), (0, 0, 0, 0))
    if mode == "PA":
        source = Image.new("PA", (3, 1))
        source.putpalette([100, 100, 100] * 2)
        source.putalpha(grey.getchannel("A"))
    elif mode == "La":
        source = grey.convert("LA").convert("La")
    else:
        source = grey.convert(mode)
    opaque, half, clear = first_channel(image_to_rgb(source))[0]
    assert opaque == 100
    assert abs(half - 177) <= 2  # 100 * .502 + 255 * .498
    assert clear == 255


def test_key_colour_and_palette_transparency_become_white() -> None:
    keyed = Image.new("RGB", (2, 1), (10, 20, 30))
    keyed.putpixel((1, 0), (200, 0, 0))
    keyed.info["transparency"] = (10, 20, 30)
    assert np.asarray(image_to_rgb(keyed)).tolist() == [[[255, 255, 255], [200, 0, 0]]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert np.asarray(image_to_rgb(palette)).tolist() == [[[255, 255, 255], [9, 8, 7]]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_float_arrays_in_unit_range(dtype: type[np.floating], channels: int | None) -> None:
    grey = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=dtype)
    array = grey if channels is None else np.repeat(grey[:, :, None], channels, axis=2)
    assert first_channel(array_to_rgb(array)) == [[0, 64], [128, 255]]


def test_rgba_array_and_strided_array() -> None:
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    assert first_channel(array_to_rgb(clear)) == [[255, 255], [255, 255]]
    wide = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    strided = wide[::2, ::-3]
    assert np.array_equal(np.asarray(array_to_rgb(strided)), strided)


def test_sixteen_bit_colour_array() -> None:
    colour = np.array([[[65_535, 257, 0]]], dtype=np.uint16)
    assert np.asarray(array_to_rgb(colour)).tolist() == [[[255, 1, 0]]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), "shape"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((3, 8, 8), np.uint8), "transpose"),
        (np.zeros((2, 8, 8, 3), np.uint8), "batch"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
        (np.zeros((8, 0), np.float32), "empty"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.zeros((8, 8), np.complex64), "complex64"),
        (np.zeros((8, 8), object), "object"),
        (np.full((8, 8), 128.0), "divide by 255"),
        (np.full((8, 8), -0.5), "scale them to"),
        (np.full((8, 8), 1e9), "scale them to"),
        (np.full((8, 8), np.nan, np.float16), "NaN"),
        (np.full((8, 8, 3), np.inf), "infinity"),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        array_to_rgb(array)


def test_a_little_overshoot_is_clipped() -> None:
    array = np.array([[-5e-4, 1.0005]])
    assert first_channel(array_to_rgb(array)) == [[0, 255]]
