from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.engines.tensorrt_engine import InputContract, check_feeds, shape_range
from edgeclip.runtime.errors import EngineError
from tests.runtime.tiny_graphs import a_key

PIXELS = InputContract("pixels", np.dtype(np.uint8), (1, 8, 8, 3), (4, 8, 8, 3))
IDS = InputContract("input_ids", np.dtype(np.int64), (1, 1), (4, 24))


def test_images_vary_in_number_only() -> None:
    found = shape_range("pixels", (-1, 8, 8, 3), a_key())
    assert (found.least, found.best, found.most) == ((1, 8, 8, 3), (4, 8, 8, 3), (32, 8, 8, 3))


@pytest.mark.parametrize(("length", "best"), [(77, 16), (16, 16), (9, 9), (1, 1)])
def test_texts_vary_in_number_and_length(length: int, best: int) -> None:
    found = shape_range("input_ids", (-1, -1), a_key(text_length=length))
    assert (found.least, found.best, found.most) == ((1, 1), (4, best), (32, length))


def test_a_fixed_length_and_a_single_number_stay() -> None:
    assert shape_range("input_ids", (-1, 64), a_key(text_length=64)).least == (1, 64)
    assert shape_range("scale", (), a_key()).most == ()


def test_fixed_batch_must_be_the_devices() -> None:
    key = a_key(batch_min=4, batch_best=4, batch_max=4)
    assert shape_range("pixels", (4, 8, 8, 3), key).most == (4, 8, 8, 3)
    with pytest.raises(EngineError, match="batches of 4 only, and the device asks for 1 to 32"):
        shape_range("pixels", (4, 8, 8, 3), a_key())


@pytest.mark.parametrize("shape", [(-1, -1), (-1, 3, -1, -1), (-1, 8, 8, -1)])
def test_axis_of_unknown_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"'pixels' of the graph varies along axis \d"):
        shape_range("pixels", shape, a_key())


@given(
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64)),
    st.integers(1, 200),
)
def test_ranges_are_in_order(batches: tuple[int, int, int], length: int) -> None:
    low, best, high = sorted(batches)
    key = a_key(batch_min=low, batch_best=best, batch_max=high, text_length=length)
    found = shape_range("input_ids", (-1, -1), key)
    for least, middle, most in zip(found.least, found.best, found.most, strict=True):
        assert 1 <= least <= middle <= most


@given(st.integers(0, 6), st.integers(0, 30))
def test_feeds_inside_the_range_and_no_others(batch: int, length: int) -> None:
    feeds = {"input_ids": np.zeros((batch, length), np.int64)}
    if 1 <= batch <= 4 and 1 <= length <= 24:
        check_feeds((IDS,), feeds)
    else:
        with pytest.raises(EngineError, match=rf"be 1\.\.4 x 1\.\.24, got {batch} x {length}:"):
            check_feeds((IDS,), feeds)


@pytest.mark.parametrize(
    ("feeds", "expected"),
    [
        ({}, "takes 'pixels', but was given nothing"),
        ({"pixel_values": np.zeros((1, 8, 8, 3), np.uint8)}, "but was given 'pixel_values'"),
        ({"pixels": np.zeros((1, 8, 8, 3), np.float32)}, "must be uint8, got float32"),
        ({"pixels": np.zeros((1, 3, 8, 8), np.uint8)}, r"must be 1\.\.4 x 8 x 8 x 3, got 1 x 3"),
        ({"pixels": np.zeros((8, 8, 3), np.uint8)}, "got 8 x 8 x 3"),
        ({"pixels": np.uint8(1)}, "got a single number"),
    ],
)
def test_feeds_that_do_not_fit(feeds: dict[str, Any], expected: str) -> None:
    with pytest.raises(EngineError, match=expected):
        check_feeds((PIXELS,), {name: np.asarray(array) for name, array in feeds.items()})
