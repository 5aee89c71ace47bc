"""Where the time of one answer goes: from an image file, or a text, to its embedding.

The encoder's own functions are timed, one after the other, beside `Encoder.encode_image` and
`encode_text` themselves: what their time is more than the sum of the stages is on record as not
explained.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engine import Engine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.load_image import load_picture
from edgeclip.runtime.measuring.measurement import StageName, StageTime
from edgeclip.runtime.measuring.timing_statistics import percentile_interval
from edgeclip.runtime.preprocess import crop_batch
from edgeclip.runtime.tower_runner import TowerRunner

StageInput = Path | bytes | str
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """The stages of an answer beside the whole; medians over rounds, in milliseconds.

    Attributes:
        stages: in the order in which they happen.
        whole_ms: one call of the encoder, from input to embedding.
        unexplained_ms: the whole less the stages of the same round; it can be negative, since
            the two are separate runs.
    """

    stages: tuple[StageTime, ...]
    whole_ms: Interval
    unexplained_ms: Interval


def measure_stages(
    encoder: Encoder, inputs: Sequence[StageInput], *, runs: int = 50
) -> tuple[StageTime, ...]:
    """Time the stages alone; see `explain_whole`."""
    return explain_whole(encoder, inputs, runs=runs).stages


def explain_whole(
    encoder: Encoder,
    inputs: Sequence[StageInput],
    *,
    runs: int = 50,
    warm_up: int = 3,
    clock: Clock = time.perf_counter,
) -> StageReport:
    """Time the way from an image file, or a text, to its embedding, and its stages.

    - read: the file's bytes; the operating system may hold them in memory already.
    - decode: bytes to an upright RGB picture, a large JPEG reduced meanwhile.
    - resize: picture to uint8 pixels, resized and cut.
    - tokenize: text to token ids.
    - copy: the graph's input made, with the normalisation where the graph has none.
    - run: the engine; what a GPU's engine copies there and back is part of it.
    - post: the checks of what came out.

    Args:
        encoder: what is measured; its tower is loaded if it was not.
        inputs: image files (`Path`), bytes of image files, or texts (`str`), taken in turns.
        runs: rounds that count, at least 1; in each, one input takes both ways.
        warm_up: rounds before them.
        clock: seconds.

    Raises:
        InputError: nothing to measure, inputs of several kinds, `runs` below 1, or an input that
            cannot be read or that the encoder refuses.
        EngineError: see `Encoder.encode_image`.
    """
    if not inputs or runs < 1 or warm_up < 0:
        raise InputError("stages need at least one image file or text, and one run")
    if len({(isinstance(item, str), isinstance(item, bytes)) for item in inputs}) > 1:
        raise InputError(
            "stages are those of one kind of input: give paths of images, bytes of image files, or "
            "texts, not several kinds in one call"
        )
    laps, wholes = _Laps(clock), list[float]()
    for number in range(-warm_up, runs):
        if number == 0:
            laps.ms.clear()
            wholes.clear()
        item = inputs[number % len(inputs)]
        if number % 2:  # neither way is always the one that finds the caches warm
            _staged(encoder, item, laps)
        wholes.append(_whole(encoder, item, clock))
        if not number % 2:
            _staged(encoder, item, laps)
    times = {name: np.array(values) for name, values in laps.ms.items()}
    whole = np.array(wholes)
    return StageReport(
        stages=tuple(StageTime(name=name, ms=_median(ms)) for name, ms in times.items()),
        whole_ms=_median(whole),
        unexplained_ms=_median(whole - sum(times.values())),
    )


class _Laps:
    """Milliseconds of each stage, a value a round; a lap ends where the next one begins."""

    def __init__(self, clock: Clock) -> None:
        self.ms: dict[StageName, list[float]] = {}
        self._clock = clock
        self._last = 0.0

    def start(self) -> None:
        self._last = self._clock()

    def end(self, stage: StageName) -> None:
        now = self._clock()
        self.ms.setdefault(stage, []).append(1e3 * (now - self._last))
        self._last = now


@dataclass(frozen=True, slots=True)
class _WatchedEngine:
    """An engine whose runs end the laps "copy" and "run"."""

    engine: Engine
    laps: _Laps

    @property
    def name(self) -> str:
        return self.engine.name

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.laps.end("copy")
        found = self.engine.run(feeds)
        self.laps.end("run")
        return found


def _whole(encoder: Encoder, item: StageInput, clock: Clock) -> float:
    began = clock()
    if isinstance(item, str):
        encoder.encode_text([item])
    else:
        encoder.encode_image([item])
    return 1e3 * (clock() - began)


def _staged(encoder: Encoder, item: StageInput, laps: _Laps) -> None:
    if isinstance(item, str):
        tower, tokenizer = encoder._text_tower, encoder._tokenizer  # loaded before the clock runs
        laps.start()
        values: NDArray[Any] = tokenizer.encode([item])
        laps.end("tokenize")
    else:
        tower, spec = encoder._image_tower, encoder.spec.image
        laps.start()
        if isinstance(item, Path):
            item = read_file(item)
            laps.end("read")
        picture = load_picture(item, min_side=spec.resize)
        laps.end("decode")
        # As large as the real call has it, except that a reduced JPEG may be a row larger.
        values = crop_batch([picture.image], spec)
        laps.end("resize")
    with _watched(tower, laps):
        tower.run(values)
        laps.end("post")


def read_file(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"image {path} cannot be read ({error.strerror}): check the path"
        ) from error


@contextmanager
def _watched(tower: TowerRunner, laps: _Laps) -> Iterator[None]:
    """Put a watch around the tower's engine: a second engine would not be the one that runs."""
    engine = tower._engine
    tower._engine = _WatchedEngine(engine, laps)
    try:
        yield
    finally:
        tower._engine = engine


def _median(ms: NDArray[np.float64]) -> Interval:
    return percentile_interval(ms, 50)
