from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from edgeclip.compress.data.augmentation import Augmentation, keep_picture_memory, view_crop
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.spec import ImageSpec, Resample


def _spec(size: int, resize: int | None = None, resample: Resample = "bicubic") -> ImageSpec:
    return ImageSpec(
        size=size, resize=resize or size, mean=(0, 0, 0), std=(1, 1, 1), resample=resample
    )


def _noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _smooth(width: int, height: int) -> Image.Image:
    return _noise(5, 4).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("spec", [_spec(24), _spec(24, 32), _spec(24, resample="bilinear")])
def test_view_0_is_what_the_runtime_sees(spec: ImageSpec) -> None:
    picture = _noise(40, 30)
    seen = view_crop(picture, spec, Augmentation(crop=0.5, colour=0.9), picture_seed=3, view=0)
    np.testing.assert_array_equal(seen, resize_and_crop(picture, spec))


def test_views_of_a_stretched_picture_reach_its_edges() -> None:
    wide = Image.new("RGB", (300, 100))
    wide.paste((255, 0, 0), (0, 0, 60, 100))
    wide.paste((0, 0, 255), (240, 0, 300, 100))
    spec = replace(_spec(30), stretch=True)
    for view in range(4):
        seen = view_crop(wide, spec, Augmentation(colour=0), picture_seed=1, view=view)
        assert (seen[:, 0] == (255, 0, 0)).all()
        assert (seen[:, -1] == (0, 0, 255)).all()


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    crop=st.floats(0.05, 1),
    colour=st.floats(0, 0.99),
    picture_seed=st.integers(0, 2**64),
    view=st.integers(1, 50),
    size=st.integers(1, 40),
    margin=st.integers(0, 8),
)
def test_views_are_replayable(
    width: int,
    height: int,
    crop: float,
    colour: float,
    picture_seed: int,
    view: int,
    size: int,
    margin: int,
) -> None:
    picture = _noise(width, height)
    before = picture.tobytes()
    spec, how = _spec(size, size + margin), Augmentation(crop=crop, colour=colour)
    first = view_crop(picture, spec, how, picture_seed=picture_seed, view=view)
    view_crop(picture, spec, how, picture_seed=picture_seed + 1, view=view)
    again = view_crop(picture, spec, how, picture_seed=picture_seed, view=view)
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert picture.tobytes() == before


def test_views_differ_by_view_picture_and_seed() -> None:
    views = {
        view_crop(
            _noise(32, 32), _spec(16), Augmentation(seed=seed), picture_seed=picture, view=view
        ).tobytes()
        for seed in (0, 1)
        for picture in (0, 1)
        for view in (0, 1, 2, 3)
    }
    assert len(views) == 1 + 2 * 2 * 3  # view 0 is always the picture


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (64, 64), (2000, 20)])
@pytest.mark.parametrize("spec", [_spec(24), _spec(24, 32), _spec(48, resample="bilinear")])
def test_no_change_allowed_means_no_change(spec: ImageSpec, shape: tuple[int, int]) -> None:
    picture = _smooth(*shape)
    still = view_crop(picture, spec, Augmentation(crop=1, colour=0), picture_seed=5, view=2)
    difference = np.abs(still.astype(int) - resize_and_crop(picture, spec))
    assert difference.max() <= 2


@given(view=st.integers(1, 200), wide=st.booleans())
def test_models_of_other_resolutions_see_the_same_view(view: int, wide: bool) -> None:
    picture = _smooth(240, 160) if wide else _smooth(160, 240)
    how = Augmentation(crop=0.5, colour=0.3)
    small, large = (
        view_crop(picture, _spec(size), how, picture_seed=1, view=view) for size in (24, 96)
    )
    shrunk = Image.fromarray(large).resize((24, 24), Image.Resampling.BOX)
    assert np.abs(np.asarray(shrunk, int) - small).mean() < 3


def test_colours_change_as_pillow_changes_them() -> None:
    """Mild enough that no value is clipped on the way."""
    picture = Image.fromarray((np.asarray(_smooth(64, 64)) // 3 + 80).astype(np.uint8))
    size = picture.width
    how = Augmentation(crop=1.0, colour=0.25)
    for view in range(1, 10):
        seen = view_crop(picture, _spec(size), how, picture_seed=0, view=view).astype(float)
        # The factors are what the module draws; they are found again by a fit.
        rows = np.asarray(picture, float).reshape(-1, 3)
        design = np.column_stack([rows, np.ones(len(rows))])
        fit, *_ = np.linalg.lstsq(design, seen.reshape(-1, 3), rcond=None)
        own = np.diag(fit[:3]).mean() - (fit[:3].sum() - np.trace(fit[:3])) / 6
        whole = fit[:3].sum(axis=0).mean()
        grey = np.asarray(picture.convert("L")).mean()
        # whole = brightness contrast, own = whole saturation, offset = (1 - contrast) brightness
        brightness = whole + fit[3].mean() / grey
        factors = (brightness, whole / brightness, own / whole)
        assert all(0.74 < factor < 1.26 for factor in factors)
        expected = picture
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color),
            factors,
            strict=True,
        ):
            expected = enhance(expected).enhance(float(factor))
        assert np.abs(np.asarray(expected, float) - seen).max() <= 3


def test_left_stays_left() -> None:
    picture = Image.new("RGB", (32, 32), (10, 10, 200))
    picture.paste((200, 10, 10), (0, 0, 16, 32))
    for view in range(1, 30):
        pixels = view_crop(picture, _spec(32), Augmentation(), picture_seed=0, view=view)
        assert (pixels[:, :8, 0] > pixels[:, :8, 2]).all()
        assert (pixels[:, -8:, 2] > pixels[:, -8:, 0]).all()


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.1}, {"colour": -0.1}, {"colour": 1.0}])
def test_impossible_changes(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need 0 < crop <= 1 and 0 <= colour < 1"):
        Augmentation(**wrong)  # type: ignore[arg-type]


def test_kept_memory_changes_no_picture() -> None:
    how = Augmentation(crop=0.6)

    def views() -> list[bytes]:
        return [
            view_crop(_noise(90 + n, 70), _spec(32), how, picture_seed=n, view=n).tobytes()
            for n in range(12)
        ]

    before = views()
    keep_picture_memory()
    try:
        assert views() == before
    finally:
        keep_picture_memory(0)
