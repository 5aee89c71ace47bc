"""Calibration: what a tower sees while the ranges of its activations are found.

Inputs are made batch by batch when they are asked for, so memory stays bounded whatever
the source holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader

from edgeclip.compress.sources import Source
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.preprocess import preprocess_batch
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.tokenize_text import TextTokenizer

_BATCH = 16


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """`count` batches for one tower, each made by `batch(index)`."""

    count: int
    batch: Callable[[int], NDArray[Any]]

    def reader(self, input_name: str) -> "BatchReader":
        """Return them as ONNX Runtime's quantizer reads them."""
        return BatchReader(self, input_name)


def calibration_images(source: Source, spec: ImageSpec) -> CalibrationData:
    """Batches float32 [N, 3, size, size] of the source's pictures.

    Raises:
        ConfigError: the source is empty.
    """
    _check_some(source)
    starts = range(0, len(source), _BATCH)

    def batch(index: int) -> NDArray[Any]:
        chosen = range(starts[index], min(starts[index] + _BATCH, len(source)))
        return preprocess_batch([source[item].image for item in chosen], spec)

    return CalibrationData(len(starts), batch)


def calibration_texts(source: Source, tokenizer: TextTokenizer) -> CalibrationData:
    """Batches int64 [N, length] of the source's captions.

    A batch holds captions of one length only: what a tower computes for padding is never
    used, and must not widen the ranges.

    Raises:
        ConfigError: the source is empty or has no captions.
    """
    _check_some(source)
    captions = [source.caption(index) for index in range(len(source))]
    texts = [caption for caption in captions if caption is not None]
    if len(texts) < len(captions):
        raise ConfigError(f"{source.name}: calibrating the text tower needs captions")
    by_length: dict[int, list[str]] = {}
    for text, length in zip(texts, tokenizer.token_counts(texts), strict=True):
        by_length.setdefault(min(length, tokenizer.spec.context_length), []).append(text)
    batches = [
        same[start : start + _BATCH]
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), _BATCH)
    ]
    return CalibrationData(
        len(batches), lambda index: tokenizer.encode(batches[index], truncate=True)
    )


class BatchReader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime is untyped
    """Hands a range of batches to a calibrator, each once."""

    def __init__(self, data: CalibrationData, input_name: str) -> None:
        self._data = data
        self._input_name = input_name
        self.set_range(0, data.count)

    def __len__(self) -> int:
        return self._data.count

    def set_range(self, start_index: int, end_index: int) -> None:
        """Hand out the batches from `start_index` up to `end_index` next."""
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch, or None when there are no more."""
        if self._next >= self._end:
            return None
        self._next += 1
        return {self._input_name: self._data.batch(self._next - 1)}


def _check_some(source: Source) -> None:
    if len(source) == 0:
        raise ConfigError(f"{source.name} is empty: calibration needs some pairs")
