from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.preprocess import crop_batch, preprocess

Make = Callable[..., Source]


def batches_of(data: CalibrationData) -> list[NDArray[Any]]:
    return [data.batch(index) for index in range(data.count)]


def test_pictures_come_once_each_as_the_runtime_prepares_them(
    blobs: Make, clip: DualEncoder
) -> None:
    source, spec = blobs(19), clip.spec.image
    data = calibration_images(source, spec)
    batches = [data.batch(index) for index in range(data.count)]
    assert [len(batch) for batch in batches] == [16, 3]
    np.testing.assert_array_equal(batches[1][2], preprocess(source[18].image, spec))


def test_pictures_come_as_pixels_where_the_graph_normalises(blobs: Make, clip: DualEncoder) -> None:
    source, spec = blobs(3), clip.spec.image
    (pixels,) = batches_of(calibration_images(source, spec, "uint8-nhwc"))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(
        pixels, crop_batch([source[index].image for index in range(len(source))], spec)
    )


@given(count=st.integers(1, 40), batch=st.integers(1, 9))
def test_batches_of_a_fixed_size_are_full_and_hold_everything(
    count: int, batch: int, blobs: Make, clip: DualEncoder
) -> None:
    source = blobs(count)
    tokenizer = clip.text_tokenizer
    batches = batches_of(calibration_texts(source, tokenizer, batch=batch))
    assert {len(found) for found in batches} == {batch}
    rows = {tuple(row) for found in batches for row in found.tolist()}
    captions = [str(source.caption(index)) for index in range(count)]
    assert rows == {tuple(tokenizer.encode([text])[0].tolist()) for text in captions}


def test_a_last_batch_of_a_fixed_size_repeats_its_pictures(blobs: Make, clip: DualEncoder) -> None:
    data = calibration_images(blobs(5), clip.spec.image, batch=3)
    first, second = batches_of(data)
    assert first.shape == second.shape
    np.testing.assert_array_equal(second[2], second[0])


def test_texts_of_a_batch_have_one_length_and_no_padding(blobs: Make, clip: DualEncoder) -> None:
    source = blobs(60)
    data = calibration_texts(source, clip.text_tokenizer)
    batches = [data.batch(index) for index in range(data.count)]
    assert sum(map(len, batches)) == len(source)
    assert len({batch.shape[1] for batch in batches}) > 3
    for batch in batches:
        assert not (batch == clip.spec.text.pad_id).any()
        assert (batch[:, -1] == clip.spec.text.eos_id).all()


def test_a_reader_hands_out_the_range_it_is_given(blobs: Make, clip: DualEncoder) -> None:
    data = calibration_images(blobs(40), clip.spec.image)
    reader = data.reader("pixel_values")
    assert len(reader) == 3
    assert [len(batch["pixel_values"]) for batch in reader] == [16, 16, 8]
    assert reader.get_next() is None
    reader.set_range(2, 3)
    assert [len(batch["pixel_values"]) for batch in reader] == [8]


def test_nothing_to_calibrate_with_is_refused(blobs: Make, clip: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        calibration_images(blobs(0), clip.spec.image)
    with pytest.raises(ConfigError, match="needs captions"):
        calibration_texts(blobs(3, has_captions=False), clip.text_tokenizer)
