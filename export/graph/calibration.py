"""Make calibration batches for a tower, from pairs that are not of the test split.

Batches are made on demand, so memory stays bounded for any source. The test split is refused:
gates that are measured on the calibration data prove nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.sources import Pair, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.preprocess import crop_batch, preprocess_batch
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import ImageSpec, PixelForm

CALIBRATION_SPLITS: tuple[Split, ...] = ("calibration", "train")
FEWEST_PAIRS = 8  # fewer pairs show too little of any range
BEST = (128, 512)  # recommended pairs; more hardly change any range, and take longer

_BATCH = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """A source that may be calibrated on: its split is `calibration` or `train`.

    Attributes:
        source: the pairs.
        fewest: the smallest allowed number of pairs.

    Raises:
        ConfigError: the pairs are of another split, or of an unknown one, or too few.
    """

    source: Source
    fewest: int = FEWEST_PAIRS

    def __post_init__(self) -> None:
        if self.split not in CALIBRATION_SPLITS:
            raise ConfigError(
                f"{self.name}: its split is {self.split or 'unknown'}, and only calibration and "
                "train may be calibrated on; what ranges were found on must not decide whether "
                "they are good enough"
            )
        if len(self) == 0:
            raise ConfigError(f"{self.name} is empty: calibration needs some pairs")
        if len(self) < self.fewest:
            raise ConfigError(
                f"{self.name}: too few to calibrate on, give at least {self.fewest} "
                f"({BEST[0]} to {BEST[1]} are best)"
            )

    @property
    def split(self) -> Split | None:
        """The split of the pairs."""
        return self.source.split

    @property
    def name(self) -> str:
        """The name for messages."""
        return self.source.name

    @property
    def identity(self) -> str:
        """A string that changes whenever any pair does."""
        return self.source.identity

    @property
    def has_captions(self) -> bool:
        """Whether any pair has a caption."""
        return self.source.has_captions

    @property
    def advice(self) -> str | None:
        """A remark if there are few pairs; None if there are enough."""
        if len(self) >= BEST[0]:
            return None
        return f"{len(self)} pairs are few to calibrate on: {BEST[0]} to {BEST[1]} are best"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        return self.source[index]

    def caption(self, index: int) -> str | None:
        """Return the caption alone."""
        return self.source.caption(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions of a picture."""
        return self.source.captions(index)

    def content(self, index: int) -> str:
        """Return the content of a picture; see `Source`."""
        return self.source.content(index)


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """`count` batches for one tower, each made by `batch(index)`."""

    count: int
    batch: Callable[[int], NDArray[Any]]

    def reader(self, input_name: str) -> "BatchReader":
        """Return a reader for ONNX Runtime's quantizer."""
        return BatchReader(self, input_name)


def calibration_data(
    student: DualEncoder, source: Source, pixels: PixelForm | None, *, batch: int | None
) -> CalibrationData:
    """Make calibration batches for a tower: pictures in the form `pixels`, or captions if None.

    Raises:
        ConfigError: as `calibration_images` and `calibration_texts` do.
    """
    if pixels is None:
        return calibration_texts(source, student.text_tokenizer, batch=batch)
    return calibration_images(source, student.spec.image, pixels, batch=batch)


def calibration_images(
    source: Source,
    spec: ImageSpec,
    pixels: PixelForm = "float32-nchw",
    *,
    batch: int | None = None,
) -> CalibrationData:
    """Make calibration batches of the source's pictures, in the tower's input form.

    They are float32 [N, 3, size, size], normalised, or uint8 [N, size, size, 3]. `batch` is the
    fixed N of the graph; None if the batch size is free.

    Raises:
        ConfigError: the source is empty, or its split is not for calibration.
    """
    source = _usable(source)
    chosen = _in_batches(range(len(source)), batch)
    prepare = crop_batch if pixels == "uint8-nhwc" else preprocess_batch

    def pictures(index: int) -> NDArray[Any]:
        return prepare([source[item].image for item in chosen[index]], spec)

    return CalibrationData(len(chosen), pictures)


def calibration_texts(
    source: Source, tokenizer: TextTokenizer, *, batch: int | None = None
) -> CalibrationData:
    """Make calibration batches int64 [N, length] of the source's captions.

    `batch` is the fixed N of the graph; None if the batch size is free. A batch holds captions of
    one length only: values at padding positions are never used, and must not widen the ranges.

    Raises:
        ConfigError: the source is empty or has no captions, or its split is not for calibration.
    """
    source = _usable(source)
    captions = [source.captions(index) for index in range(len(source))]
    texts = [caption for own in captions for caption in own]
    if not all(captions):
        raise ConfigError(f"{source.name}: calibrating the text tower needs captions")
    by_length: dict[int, list[str]] = {}
    for text, length in zip(texts, tokenizer.token_counts(texts), strict=True):
        by_length.setdefault(min(length, tokenizer.spec.context_length), []).append(text)
    batches = [part for _, same in sorted(by_length.items()) for part in _in_batches(same, batch)]
    return CalibrationData(
        len(batches), lambda index: tokenizer.encode(batches[index], truncate=True)
    )


class BatchReader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime is untyped
    """Gives a range of batches to ONNX Runtime's calibrator, each once."""

    def __init__(self, data: CalibrationData, input_name: str) -> None:
        self._data = data
        self._input_name = input_name
        self.set_range(0, data.count)

    def __len__(self) -> int:
        return self._data.count

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the batches from `start_index` up to `end_index` next."""
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch, or None when there are no more."""
        if self._next >= self._end:
            return None
        self._next += 1
        return {self._input_name: self._data.batch(self._next - 1)}


def _in_batches(items: Sequence[T], batch: int | None) -> list[list[T]]:
    """Cut into batches; with a fixed size the last one is filled by repeating its items."""
    size = batch or _BATCH
    parts = [list(items[start : start + size]) for start in range(0, len(items), size)]
    if batch is None:
        return parts
    return [[part[place % len(part)] for place in range(batch)] for part in parts]


def _usable(source: Source) -> CalibrationSource:
    if isinstance(source, CalibrationSource):
        return source
    return CalibrationSource(source, fewest=1)
