"""What is measured of pictures: hand-worked values, what must not matter, and what is kept."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.data.picture_statistics import MEASURES, measure, measure_source
from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.errors import InputError

Pixels = NDArray[np.uint8]
pictures = of_numpy.arrays(np.uint8, st.tuples(st.integers(3, 9), st.integers(3, 9))).map(
    lambda grey: np.repeat(grey[..., None], 3, axis=2)
)


def found(pixels: Pixels) -> dict[str, float]:
    return dict(zip(MEASURES, measure(pixels).tolist(), strict=True))


def grey(levels: NDArray[np.float64]) -> Pixels:
    return np.repeat(levels.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def test_one_white_pixel_on_black() -> None:
    levels = np.zeros((5, 5))
    levels[2, 2] = 255
    values = found(grey(levels))
    # Of nine places the Laplacian is -4 at one, 1 at four, 0 at four, times 255; its mean is 0.
    assert values["sharpness"] == pytest.approx(255**2 * (16 + 4) / 9, rel=1e-5)
    assert values["brightness"] == pytest.approx(1 / 25, rel=1e-5)
    assert values["contrast"] == pytest.approx(math.sqrt(24) / 25, rel=1e-5)
    # The absolute values of Immerkaer's mask have the sum 16.
    assert values["noise"] == pytest.approx(math.sqrt(math.pi / 2) * 255 * 16 / 9 / 6, rel=1e-5)


def test_half_black_half_white_has_the_most_contrast() -> None:
    values = found(grey(np.repeat([[0.0, 0.0, 255.0, 255.0]], 4, axis=0)))
    assert values["brightness"] == pytest.approx(0.5, abs=1e-5)
    assert values["contrast"] == pytest.approx(0.5, abs=1e-5)
    assert values["noise"] == pytest.approx(0, abs=1e-3)  # an edge along a side is no noise


def test_luminance_is_that_of_bt_601() -> None:
    for channel, share in enumerate((0.299, 0.587, 0.114)):
        pixels = np.zeros((3, 3, 3), np.uint8)
        pixels[..., channel] = 255
        assert found(pixels)["brightness"] == pytest.approx(share, abs=1e-5)


@given(pictures)
def test_neither_turning_nor_a_negative_changes_what_they_should_not(pixels: Pixels) -> None:
    values = measure(pixels)
    for turned in (pixels[:, ::-1], pixels[::-1], pixels.swapaxes(0, 1)):
        np.testing.assert_allclose(measure(np.ascontiguousarray(turned)), values, atol=2e-2)
    negative = found(255 - pixels)
    assert negative.pop("brightness") == pytest.approx(1 - values[1], abs=1e-4)
    for name, value in negative.items():
        assert value == pytest.approx(values[MEASURES.index(name)], rel=1e-3, abs=2e-2)


@given(st.floats(2, 20), st.integers(0, 2**32 - 1))
def test_noise_is_that_which_was_added(sigma: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(128, sigma, (96, 96))
    assert found(grey(noise))["noise"] == pytest.approx(sigma, rel=0.05)


def test_blur_is_less_sharp() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    small = Image.fromarray(pixels).resize((16, 16)).resize((64, 64))
    assert found(np.asarray(small))["sharpness"] < found(pixels)["sharpness"] / 10


def test_a_source_is_measured_once(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few_pictures, tmp_path / "pictures")
    source, spec = FolderSource(folder), teacher.image_spec
    first = measure_source(source, spec, tmp_path / "kept")
    assert first.readable.all()
    assert set(first.short_side.tolist()) == {16.0}
    assert [row.tobytes().hex() for row in first.content] == [
        source.content(index) for index in range(len(source))
    ]
    size = (tmp_path / "kept" / "statistics.rows").stat().st_size
    again = measure_source(FolderSource(folder), spec, tmp_path / "kept")
    for name in MEASURES:
        np.testing.assert_array_equal(again.column(name), first.column(name))
    assert (tmp_path / "kept" / "statistics.rows").stat().st_size == size
    # Another picture is measured alone, and the file's own size is told.
    Image.new("RGB", (40, 90)).save(folder / "0000.bmp")
    changed = measure_source(FolderSource(folder), spec, tmp_path / "kept")
    assert (changed.short_side[0], changed.long_side[0]) == (40, 90)
    assert changed.sharpness[0] == 0
    grown = (tmp_path / "kept" / "statistics.rows").stat().st_size - size
    assert 0 < grown < size / 10


def test_pictures_that_cannot_be_read_are_named(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few_pictures, tmp_path / "pictures")
    for name in ("0003.bmp", "0007.bmp"):  # with the same content
        (folder / name).write_bytes(b"no picture")
    found = measure_source(FolderSource(folder), teacher.image_spec, tmp_path / "kept")
    assert np.flatnonzero(~found.readable).tolist() == [3, 7]
    assert set(found.reasons) == {3, 7}
    assert "0003.bmp" in found.reasons[3]
    assert np.isnan(found.column("noise")[[3, 7]]).all()


def test_many_pictures_are_measured_by_workers(
    teacher: DualEncoder, many_pictures: Path, few_pictures: Path, tmp_path: Path
) -> None:
    spec = teacher.image_spec
    many = measure_source(FolderSource(many_pictures), spec, tmp_path / "many")
    few = measure_source(FolderSource(few_pictures), spec, tmp_path / "few")
    assert many.readable.all()
    for name in MEASURES:  # the first pictures of both folders are the same
        np.testing.assert_array_equal(many.column(name)[:20], few.column(name))


def test_statistics_for_another_input_are_refused(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    source, spec = FolderSource(few_pictures), teacher.image_spec
    measure_source(source, spec, tmp_path)
    other = type(spec)(size=16, resize=16, mean=spec.mean, std=spec.std, resample=spec.resample)
    with pytest.raises(InputError, match="is of other settings"):
        measure_source(source, other, tmp_path)
