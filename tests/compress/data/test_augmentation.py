import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeclip.compress.data.augmentation import Augmentation, augment


def _picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_view_0_is_the_picture_itself() -> None:
    picture = _picture(20, 30)
    assert augment(picture, Augmentation(crop=0.5, colour=0.9), index=3, view=0) is picture


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    crop=st.floats(0.05, 1),
    colour=st.floats(0, 0.99),
    index=st.integers(0, 2**40),
    view=st.integers(1, 50),
)
def test_views_are_replayable_and_keep_the_size(
    width: int, height: int, crop: float, colour: float, index: int, view: int
) -> None:
    picture = _picture(width, height)
    before = picture.tobytes()
    how = Augmentation(crop=crop, colour=colour)
    first = augment(picture, how, index=index, view=view)
    augment(picture, how, index=index + 1, view=view)
    again = augment(picture, how, index=index, view=view)
    assert (first.size, first.mode) == (picture.size, "RGB")
    assert first.tobytes() == again.tobytes()
    assert picture.tobytes() == before


def test_views_differ_by_view_index_and_seed() -> None:
    picture = _picture(32, 32)
    views = {
        augment(picture, Augmentation(seed=seed), index=index, view=view).tobytes()
        for seed in (0, 1)
        for index in (0, 1)
        for view in (0, 1, 2, 3)
    }
    assert len(views) == 1 + 2 * 2 * 3  # view 0 is always the picture


def test_no_change_allowed_means_no_change() -> None:
    picture = _picture(24, 18)
    still = augment(picture, Augmentation(crop=1.0, colour=0.0), index=5, view=2)
    assert still.tobytes() == picture.tobytes()


def test_left_stays_left() -> None:
    picture = Image.new("RGB", (32, 32), (10, 10, 200))
    picture.paste((200, 10, 10), (0, 0, 16, 32))
    for view in range(1, 30):
        pixels = np.asarray(augment(picture, Augmentation(), index=0, view=view), np.int16)
        assert (pixels[:, :8, 0] > pixels[:, :8, 2]).all()
        assert (pixels[:, -8:, 2] > pixels[:, -8:, 0]).all()


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.1}, {"colour": -0.1}, {"colour": 1.0}])
def test_impossible_changes(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need 0 < crop <= 1 and 0 <= colour < 1"):
        Augmentation(**wrong)  # type: ignore[arg-type]
