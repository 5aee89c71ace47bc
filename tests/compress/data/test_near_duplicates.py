"""Near duplicates: held against every pair compared one by one, and copies of pictures."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.data.near_duplicates import NearDuplicates, copies_cosine, near_duplicates
from edgeclip.compress.data.sources import FolderSource
from edgeclip.runtime.arrays import FloatArray


def unit(rows: NDArray[np.float64]) -> NDArray[np.float16]:
    found: NDArray[np.float16] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found.astype(np.float16)


def around(angles: NDArray[np.float64]) -> NDArray[np.float16]:
    """Embeddings in a plane."""
    return unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))


def compared(
    embeddings: NDArray[np.float16], threshold: float, most_exact: int = 100_000
) -> NearDuplicates:
    """Compare all rows of pictures that look alike."""
    thumbnails = np.zeros((len(embeddings), 256), np.uint8)
    rows = np.arange(len(embeddings))
    return near_duplicates(embeddings, thumbnails, rows, threshold, most_exact=most_exact)


def cosine_matrix(embeddings: NDArray[np.float16]) -> NDArray[np.float64]:
    rows = embeddings.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_no_chain_joins_what_differs() -> None:
    # Each is 10 degrees from the next: a duplicate of it, but not of the one after the next.
    found = compared(around(np.radians([0.0, 10, 20, 30, 40])), math.cos(math.radians(12)))
    assert found.same_as.tolist() == [0, 0, 2, 2, 4]
    assert found.cosine[[1, 3]] == pytest.approx(np.cos(np.radians(10)), abs=1e-3)
    assert found.cosine[[0, 2, 4]].tolist() == [1, 1, 1]
    assert found.is_exact
    assert found.found is None


def test_the_order_of_rows_says_which_is_kept() -> None:
    embeddings = around(np.radians([0.0, 1, 90, 2]))
    thumbnails = np.zeros((4, 256), np.uint8)
    found = near_duplicates(embeddings, thumbnails, np.array([3, 1, 2]), 0.99, most_exact=10)
    assert found.same_as.tolist() == [0, 3, 2, 3]  # the first is not compared


def test_none_where_the_threshold_is_above_one() -> None:
    found = compared(around(np.zeros(4)), 1.5)
    assert found.same_as.tolist() == [0, 1, 2, 3]


def test_pictures_that_a_teacher_takes_for_each_other_are_no_duplicates() -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 200, (2, 256))
    darker_copy = thumbnails[0] // 2 + rng.integers(0, 5, 256)
    flat = np.full(256, 30)
    shown = np.stack([*thumbnails, darker_copy, flat, flat + 1]).astype(np.uint8)
    found = near_duplicates(around(np.zeros(5)), shown, np.arange(5), 0.99, most_exact=5)
    assert found.same_as.tolist() == [0, 1, 0, 3, 3]


@given(st.lists(st.integers(0, 359), max_size=40), st.integers(1, 40))
def test_as_if_compared_one_by_one(degrees: list[int], wide: int) -> None:
    embeddings = around(np.radians(np.array(degrees, float)))
    cosines = cosine_matrix(embeddings)
    threshold = float(np.cos(np.radians(wide + 0.5)))
    kept: list[int] = []
    expected = []
    for row in range(len(degrees)):
        near = [other for other in kept if cosines[row, other] >= threshold]
        if not near:
            kept.append(row)
        expected.append(bool(near))
    found = compared(embeddings, threshold)
    same = found.same_as != np.arange(len(degrees))
    assert same.tolist() == expected
    for row in np.flatnonzero(same).tolist():
        assert found.same_as[row] in kept
        assert cosines[row, found.same_as[row]] == pytest.approx(found.cosine[row], abs=1e-5)


def planted(count: int, copies: int) -> NDArray[np.float16]:
    """Random embeddings, the last `copies` of which are the first with a little noise."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 64))
    rows[count - copies :] = rows[:copies] + 0.1 * rng.normal(size=(copies, 64))
    return unit(rows)


def test_blocks_are_compared_with_each_other() -> None:
    embeddings = planted(5000, 700)
    found = compared(embeddings, 0.97)
    assert found.same_as[4300:].tolist() == list(range(700))
    assert found.same_as[:4300].tolist() == list(range(4300))


def test_cells_find_most_and_say_so() -> None:
    embeddings = planted(5000, 700)
    found = compared(embeddings, 0.97, most_exact=1000)
    same = np.flatnonzero(found.same_as != np.arange(5000))
    assert (same >= 4300).all()
    assert found.same_as[same].tolist() == (same - 4300).tolist()
    assert not found.is_exact
    assert found.compared < 0.2
    assert found.found is not None
    assert len(same) / 700 == pytest.approx(found.found.value, abs=0.1)
    assert len(same) > 600


def test_copies_tell_what_a_model_finds_the_same(source: FolderSource) -> None:
    def mean_colour(pictures: Sequence[Image.Image]) -> FloatArray:
        rows = [np.asarray(picture, float).mean(axis=(0, 1)) for picture in pictures]
        return np.array(rows, np.float32)

    def size(pictures: Sequence[Image.Image]) -> FloatArray:
        return np.array([(p.width == 16, p.width < 16) for p in pictures], np.float32)

    indices = range(len(source))
    assert 0.99 < copies_cosine(source, indices, mean_colour, side=8) <= 0.9999
    # It takes every smaller copy for another picture, and none is smaller than it sees.
    assert copies_cosine(source, indices, size, side=8) == 0.9
    assert copies_cosine(source, indices, size, side=16) == 0.9999
