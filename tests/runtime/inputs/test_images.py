"""Images from files, bytes, Pillow images and arrays, as upright RGB."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import (
    LIMIT_VARIABLE,
    ImageInput,
    array_to_rgb,
    decode_image,
    image_to_rgb,
    load_image,
)
from edgeclip.runtime.inputs.preprocess import preprocess
from edgeclip.runtime.spec import ImageSpec

ORIENTATION = 0x0112
SPEC = ImageSpec(size=16, resize=20, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def gradient(width: int, height: int) -> Image.Image:
    """Smooth, and different in every corner and channel."""
    x = np.linspace(0, 1, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    weights = np.array([[200.0, 20.0], [30.0, 210.0], [90.0, 110.0]])
    values = 15 + x * weights[:, 0] + y * weights[:, 1]
    return Image.fromarray(values.round().astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def oriented(width: int, height: int, orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(gradient(width, height), form, exif=exif, **_quality(form))


def _quality(form: str) -> dict[str, object]:
    return {"quality": 95, "subsampling": 0} if form == "JPEG" else {}


def difference(first: Image.Image, second: Image.Image) -> float:
    assert first.size == second.size
    gap = np.asarray(first).astype(float) - np.asarray(second).astype(float)
    return float(np.abs(gap).mean())


def test_every_kind_of_input_gives_the_same_picture(tmp_path: Path) -> None:
    picture = gradient(9, 6)
    data = encoded(picture, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    inputs: list[ImageInput] = [path, str(path), data, picture, np.asarray(picture)]
    for source in inputs:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == picture.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats(form: str) -> None:
    loaded = load_image(encoded(gradient(24, 16), form))
    # GIF has 256 colours; the lossy ones are near.
    assert difference(loaded, gradient(24, 16)) < 6


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """Turn as the EXIF table says: where the stored first row and column are shown."""
    pixels = np.asarray(picture)
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return Image.fromarray(np.ascontiguousarray(pixels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(orientation: int, form: str) -> None:
    loaded = load_image(oriented(48, 32, orientation, form))
    assert difference(loaded, upright(gradient(48, 32), orientation)) < 3
    picture = decode_image(oriented(48, 32, orientation, form))
    assert picture.full_size == loaded.size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_rotation_is_applied_once(orientation: int, form: str) -> None:
    data = oriented(48, 32, orientation, form)
    assert np.array_equal(preprocess(load_image(data), SPEC), preprocess(data, SPEC))


def test_rotation_by_other_tags_is_applied_once() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    raw = exif.tobytes()
    for key, value in (
        ("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n"),
        ("xmp", b'<x tiff:Orientation="6"/>'),
        ("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>'),
    ):
        turned = gradient(48, 32)
        turned.info[key] = value
        once = load_image(turned)
        assert once.size == (32, 48)
        assert load_image(once).size == (32, 48)
        assert key in turned.info


def test_exif_rotation_of_a_pillow_image_leaves_the_callers_alone() -> None:
    with Image.open(io.BytesIO(oriented(48, 32, 6))) as opened:
        assert load_image(opened).size == (32, 48)
        assert opened.size == (48, 32)


def test_damaged_exif_does_not_spoil_the_picture() -> None:
    data = encoded(gradient(16, 16), "JPEG", exif=b"Exif\0\0no EXIF data at all")
    assert load_image(data).size == (16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpeg_keeps_its_geometry(orientation: int) -> None:
    width, height = 1003, 773  # no multiple of any reduction
    picture = decode_image(oriented(width, height, orientation), min_side=30)
    reduced_size = (126, 97)  # a reduction by 8, rounded up
    whole = (width, height)
    if orientation >= 5:
        reduced_size, whole = reduced_size[::-1], whole[::-1]
    assert picture.image.size == reduced_size
    assert picture.full_size == whole
    left, upper, right, lower = picture.region
    assert right - left == pytest.approx(whole[0] / 8)
    assert lower - upper == pytest.approx(whole[1] / 8)
    # The region shows exactly the full picture: resampled, the two agree.
    shown = picture.image.resize((60, 60), Image.Resampling.BICUBIC, box=picture.region)
    full = load_image(oriented(width, height, orientation)).resize((60, 60))
    assert difference(shown, full) < 0.6


@pytest.mark.parametrize(
    ("min_side", "shortest"), [(30, 97), (40, 194), (64, 194), (100, 387), (400, 773)]
)
def test_reduction_leaves_three_times_the_side_that_is_needed(min_side: int, shortest: int) -> None:
    picture = load_image(oriented(1003, 773, 1), min_side=min_side)
    assert min(picture.size) == shortest
    assert shortest == 773 or shortest >= 3 * min_side


def test_cmyk_jpeg() -> None:
    loaded = load_image(encoded(gradient(32, 32).convert("CMYK"), "JPEG", quality=95))
    assert difference(loaded, gradient(32, 32)) < 4


def test_ycck_jpeg() -> None:
    # Pillow writes CMYK only. Write Y, Cb, Cr, K in its four planes and mark it as YCCK.
    cyan, magenta, yellow, black = 200, 80, 30, 60
    chroma = Image.new("RGB", (32, 32), (cyan, magenta, yellow)).convert("YCbCr")
    planes = [plane.point(lambda value: 255 - value) for plane in chroma.split()]
    stored = Image.merge("CMYK", (*planes, Image.new("L", (32, 32), black)))
    data = bytearray(encoded(stored, "JPEG", quality=100))
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    data[marker + 11] = 2
    ink = Image.new("CMYK", (32, 32), (cyan, magenta, yellow, black))
    assert difference(load_image(bytes(data)), ink.convert("RGB")) < 3


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PGM"])
def test_sixteen_bit_grey_files(form: str) -> None:
    grey = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    if form == "PGM":
        data = b"P5 8 8 65535\n" + grey.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(grey), form)
    pixels = np.asarray(load_image(data)).astype(float)
    assert np.abs(pixels[:, :, 1] - grey / 257).max() <= 0.5


def test_float_tiff_outside_the_unit_range_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.full((4, 4), 7.5, dtype=np.float32)).save(path)
    with pytest.raises(InputError, match=r"depth\.tiff.*must lie in \[0, 1\]"):
        load_image(path)


def test_transparent_palette_files() -> None:
    picture = Image.new("P", (4, 4))
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.putpixel((1, 1), 1)
    for form in ("PNG", "GIF"):
        pixels = np.asarray(load_image(encoded(picture, form, transparency=0)))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[1, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animated_files_give_their_first_frame(form: str) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(red, form, save_all=True, append_images=[blue], duration=50, **options)
    assert load_image(data).getpixel((4, 4)) == (255, 0, 0)
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(1)
        assert load_image(opened).getpixel((4, 4)) == (0, 0, 255)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_name_the_path(form: str, share: float, tmp_path: Path) -> None:
    data = encoded(gradient(64, 48), form)
    path = tmp_path / "half.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"half\.img"):
        load_image(path)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_corrupt_bytes_give_a_picture_or_one_clear_error(
    form: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(gradient(20, 14), form))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        loaded = load_image(bytes(data))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert loaded.mode == "RGB"


def test_png_bomb_is_refused() -> None:
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(InputError, match="too many pixels"):
        load_image(bytes(data))


def test_a_panorama_is_read_where_its_size_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "panorama.jpg"  # decoded at an eighth of its size
    Image.new("L", (20_000, 10_000), 99).save(path)
    script = (
        "import sys; from edgeclip.runtime.inputs.images import load_image;"
        "print(load_image(sys.argv[1], min_side=32).size)"
    )

    def load(allowed: str | None) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != LIMIT_VARIABLE}
        environment |= {} if allowed is None else {LIMIT_VARIABLE: allowed}
        command = [sys.executable, "-W", "error", "-c", script, str(path)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert "too many pixels" in load(None).stderr
    assert f"{LIMIT_VARIABLE}=NUMBER" in load("199.9").stderr
    assert load("200").stdout == "(2500, 1250)\n"
    assert "give a number of megapixels" in load("many").stderr


def test_postscript_is_not_run() -> None:
    with pytest.raises(InputError, match="not an image of a known format"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes is not an image"),
        (b"hello", "known format"),
        ("missing.jpg", r"missing\.jpg does not exist"),
        ("null\0.jpg", "cannot be used"),
        ("x" * 5000, "cannot be used"),
        (".", "is a directory"),
        (Image.new("RGB", (0, 4)), "empty"),
        (np.full((4, 4, 3), np.nan), "NaN"),
    ],
)
def test_what_cannot_be_loaded_is_refused(source: ImageInput, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(source)


@pytest.mark.parametrize("source", [None, 7, [1, 2]])
def test_other_types_are_refused(source: object) -> None:
    with pytest.raises(InputError, match="give a path, bytes"):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(gradient(4, 4), "PNG"))
    path.chmod(0)
    with pytest.raises(InputError, match="permissions"):
        load_image(path)


def test_closed_pillow_image_is_refused() -> None:
    image = Image.open(io.BytesIO(encoded(gradient(4, 4), "PNG")))
    image.close()
    with pytest.raises(InputError, match="Pillow image"):
        load_image(image)


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
