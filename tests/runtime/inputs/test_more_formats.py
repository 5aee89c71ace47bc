"""HEIC, AVIF, JPEG XL and camera raw files, made by libraries and decoded by others."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs import images as images_module
from edgeclip.runtime.inputs.images import load_image
from tests.runtime.inputs.dng import dng

FILES = Path(__file__).parent / "files"
BLUE, RED, WHITE = (30, 60, 200), (200, 30, 30), (250, 250, 250)


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """Blue on the left, red on the right, white in the upper left corner."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, 0, width // 2, height))
    image.paste(WHITE, (0, 0, width // 6, height // 4))
    return image


def check_scene(image: Image.Image, *, within: int = 12) -> None:
    assert image.mode == "RGB"
    width, height = image.size
    assert width * 32 == height * 48
    for place, colour in (((3, 3), WHITE), ((16, 24), BLUE), ((40, 24), RED)):
        found = image.getpixel((place[0] * width // 48, place[1] * height // 32))
        assert isinstance(found, tuple)
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= within


@pytest.mark.parametrize("name", ["picture.heic", "turned.heic"])
def test_heic(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pi_heif", reason="pip install 'edgeclip[images]'")
    check_scene(load_image(FILES / name))
    check_scene(load_image((FILES / name).read_bytes()))
    misnamed = tmp_path / "IMG_0001.JPG"  # as some phones and programs do
    misnamed.write_bytes((FILES / name).read_bytes())
    check_scene(load_image(misnamed, min_side=16))


def test_a_damaged_heic_is_one_line() -> None:
    pytest.importorskip("pi_heif", reason="pip install 'edgeclip[images]'")
    with pytest.raises(InputError, match="truncated or corrupt") as failed:
        load_image((FILES / "picture.heic").read_bytes()[:500])
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_avif_needs_only_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    turn = {1: None, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    stored = scene() if turn is None else scene().transpose(turn)
    file = io.BytesIO()
    stored.save(file, "AVIF", quality=90, exif=exif)
    check_scene(load_image(file.getvalue()))


def test_jpeg_xl(tmp_path: Path) -> None:
    pylibjxl = pytest.importorskip("pylibjxl", reason="pip install 'edgeclip[images]'")
    pixels = np.asarray(scene())
    path = tmp_path / "picture.jxl"
    path.write_bytes(pylibjxl.encode(pixels, lossless=True))
    assert np.array_equal(np.asarray(load_image(path)), pixels)
    check_scene(load_image(pylibjxl.encode(pixels, distance=1.0)), within=30)
    grey = load_image(pylibjxl.encode(np.ascontiguousarray(pixels[..., 0]), lossless=True))
    assert np.array_equal(np.asarray(grey)[..., 2], pixels[..., 0])
    alpha = np.dstack([pixels, np.zeros((32, 48), np.uint8)])
    assert np.asarray(load_image(pylibjxl.encode(alpha, lossless=True))).min() == 255  # over white
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"picture\.jxl cannot be decoded"):
        load_image(path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_raw_files_show_their_preview(orientation: int, tmp_path: Path) -> None:
    pytest.importorskip("rawpy", reason="pip install 'edgeclip[images]'")
    turn = {
        1: None,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = scene(480, 320) if turn is None else scene(480, 320).transpose(turn)
    path = tmp_path / "photo.dng"
    path.write_bytes(dng(stored, orientation))
    check_scene(load_image(path))
    check_scene(load_image(path.read_bytes()))  # a TIFF by its mark, a raw file by its tags
    with pytest.raises(InputError, match=r"has only .* a shortest side of 400 is needed"):
        load_image(path, min_side=400)


def test_raw_files_without_a_preview_or_damaged(tmp_path: Path) -> None:
    pytest.importorskip("rawpy", reason="pip install 'edgeclip[images]'")
    path = tmp_path / "photo.dng"
    path.write_bytes(dng(None))
    with pytest.raises(InputError, match=r"photo\.dng: a raw file without a preview"):
        load_image(path)
    path.write_bytes(dng(scene())[:600])
    with pytest.raises(InputError, match=r"photo\.dng: cannot be decoded as a raw file \("):
        load_image(path)


def test_what_needs_the_extra_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.runtime.inputs.images.find_spec", lambda name: None)
    files = {
        "a.heic": (FILES / "picture.heic").read_bytes(),
        "misnamed.jpg": (FILES / "picture.heic").read_bytes(),
        "b.jxl": b"\xff\x0a" + bytes(50),
        "c.dng": dng(scene()),
        "d.tif": dng(scene()),
        "e.nef": b"II*\0" + bytes(50),
        "f": b"FUJIFILMCCD-RAW " + bytes(50),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}: .*pip install 'edgeclip\[images\]'"):
            load_image(tmp_path / name)


def test_large_pictures_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pi_heif", reason="pip install 'edgeclip[images]'")
    pylibjxl = pytest.importorskip("pylibjxl", reason="pip install 'edgeclip[images]'")
    monkeypatch.setattr(images_module, "_pixel_limit", lambda: 1000)
    for data in (
        (FILES / "picture.heic").read_bytes(),
        pylibjxl.encode(np.asarray(scene()), lossless=True),
    ):
        with pytest.raises(InputError, match="too many pixels to be safe"):
            load_image(data)
