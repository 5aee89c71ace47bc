"""Profile where the time of one embedding goes: stages on device and server, layers of a tower."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.layers.layer_profile import profile_layers
from edgeclip.profiles.measure.open_subject import FixedPrecisionEncoder, sample_pictures
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.record.measurement import LayerProfile, StageName, StageTime
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import decode_image
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.split.retries_and_breaker import Clock
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.towers.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.runtime.split.http_client import Transfer
    from edgeclip.runtime.split.split_runtime import SplitRuntime

StageInput = Path | bytes | str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """Times of the stages of an embedding and of the whole; medians over rounds, in milliseconds.

    Attributes:
        stages: the stages, in the order in which they run.
        whole_ms: one call of the encoder, from input to embedding.
        unexplained_ms: the whole less the stages of the same round; it can be negative, since
            the two are separate runs.
    """

    stages: tuple[StageTime, ...]
    whole_ms: Interval
    unexplained_ms: Interval


def measure_stages(
    encoder: Encoder,
    inputs: Sequence[StageInput],
    *,
    runs: int = 50,
    warm_up: int = 3,
    clock: Clock = time.perf_counter,
) -> StageReport:
    """Time the encoder's way from an image file, or a text, to its embedding, and its stages.

    - read: the file's bytes; the operating system may hold them in memory already.
    - decode: bytes to an upright RGB image, a large JPEG reduced meanwhile.
    - resize: image to uint8 pixels, resized and cropped.
    - tokenize: text to token ids.
    - copy: make the graph's input, with the normalisation where the graph has none.
    - run: the engine, copies to a GPU and back included.
    - post: check the output.

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
    """Milliseconds of each stage, one value a round; a stage ends where the next one begins."""

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
    """Wrap an engine so that its runs end the stages "copy" and "run"."""

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
        picture = decode_image(item, min_side=spec.resize)
        laps.end("decode")
        # As large as the real call has it, except that a reduced JPEG may be a row larger.
        values = crop_batch([picture.image], spec)
        laps.end("resize")
    with _watched(tower, laps):
        tower.run(values)
        laps.end("post")


def read_file(path: Path) -> bytes:
    """Read an image file.

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
    """Wrap the tower's own engine for a while: a second engine would not be the one that runs."""
    engine = tower._engine
    tower._engine = _WatchedEngine(engine, laps)
    try:
        yield
    finally:
        tower._engine = engine


def _median(ms: NDArray[np.float64]) -> Interval:
    return percentile_interval(ms, 50)


def measure_split_stages(
    runtime: "SplitRuntime",
    transfers: "list[Transfer]",
    pictures: Sequence[Path],
    *,
    runs: int = 50,
    deadline_ms: float = 10_000.0,
    clock: Clock = time.perf_counter,
) -> tuple[StageTime, ...]:
    """Time the stages of `SplitRuntime.encode_image`; medians over rounds, in milliseconds.

    - read, decode, resize: as in `measure_stages`. With a plan of kind "image" the last two are
      not told apart from what follows: a small file is sent as it is.
    - run: the head of a cut tower, and the encoding of what crosses the cut.
    - copy: with a plan of kind "image", what is sent being made.
    - network: the exchange, from the request to its reply, the server's queue and work included.

    What the device does beside the exchange is the whole less the exchange, so that the stages
    add up to the whole. Plans of kind "device" and "embedding" embed pictures on the device.

    Args:
        runtime: what is measured.
        transfers: the list that the runtime's `Server` tells (`watch=transfers.append`).
        pictures: image files, taken in turns.
        runs: rounds, at least 1; one before them is not counted.
        deadline_ms: deadline of each call. Make it long: a call that the device had to answer is
            an error.
        clock: seconds.

    Raises:
        InputError: no pictures, `runs` below 1, a file that cannot be read, or a picture for
            which the server did not answer.
        EngineError: see `Encoder.encode_image`.
    """
    if runtime.plan.kind in ("device", "embedding"):
        return measure_stages(runtime.encoder, pictures, runs=runs).stages
    if not pictures or runs < 1:
        raise InputError("stages need at least one image file and one run")
    rounds = []
    for number in range(-1, runs):
        path = pictures[number % len(pictures)]
        here = _device_stages(runtime, path, clock)
        transfers.clear()
        began = clock()
        reply = runtime.encode_image([path], deadline_ms=deadline_ms)
        whole = 1e3 * (clock() - began)
        if reply.source != "server" or not transfers:
            raise InputError(
                f"the server did not answer for {path} ({reply.degraded or 'nothing was sent'}): "
                "measure with a server that works, whose `watch` adds to `transfers`"
            )
        network = transfers[0].ms
        rest: StageName = "run" if runtime.plan.kind == "cut" else "copy"
        rounds.append({**here, rest: whole - network - sum(here.values()), "network": network})
    return tuple(
        StageTime(name=name, ms=percentile_interval(np.array([r[name] for r in rounds[1:]]), 50))
        for name in rounds[0]
    )


def _device_stages(runtime: "SplitRuntime", path: Path, clock: Clock) -> dict[StageName, float]:
    """Time what the device does to an image before the head runs, in milliseconds."""
    spec = runtime.encoder.spec.image
    times = [clock()]
    content = read_file(path)
    times.append(clock())
    if runtime.plan.kind == "cut":
        picture = decode_image(content, min_side=spec.resize)
        times.append(clock())
        crop_batch([picture.image], spec)
        times.append(clock())
    names: tuple[StageName, ...] = ("read", "decode", "resize")
    return {name: 1e3 * float(ms) for name, ms in zip(names, np.diff(times), strict=False)}


# Captions of usual lengths; a text tower's time depends on that.
_TEXTS = (
    "a photo of a dog",
    "two people on bicycles in front of a red brick house",
    "a bowl of soup",
    "an old fishing boat at the pier on a cloudy morning, seen from above",
)


def profile_stages(spec: SubjectSpec) -> tuple[StageTime, ...] | str:
    """Time the stages of a subject; for one without stages return the reason as a string.

    Raises:
        EngineError, BundleError, InputError: see `open_subject`.
    """
    if spec.bundle is None:
        return "not known for a plain ONNX file"
    if spec.part == "image":
        return "a tower alone is one stage; the part 'file' has them all"
    if spec.part == "split":
        return _split_stages(spec)
    encoder: Encoder
    if spec.part == "text":
        encoder = Encoder(Bundle.open(spec.bundle), spec.device)
        if spec.precision is not None and encoder.precisions["text"] != spec.precision:
            return f"only measured in {encoder.precisions['text']}, which the bundle chose"
        return measure_stages(encoder, _fitting_texts(encoder.bundle)).stages
    encoder = FixedPrecisionEncoder(Bundle.open(spec.bundle), spec.device, spec.precision)
    with ExitStack() as stack:
        return measure_stages(encoder, _pictures(spec, stack)).stages


def profile_tower_layers(spec: SubjectSpec) -> LayerProfile | str | None:
    """Time the layers of a subject that is one tower; None for any other subject.

    Where layers cannot be timed, a string says why.

    Raises:
        EngineError, BundleError: see `profile_layers`.
    """
    if spec.part not in ("image", "text"):
        return None
    if spec.bundle is None or spec.precision is None:
        return "not timed for a plain ONNX file"
    return profile_layers(Bundle.open(spec.bundle), spec.part, spec.precision, spec.device)


def _split_stages(spec: SubjectSpec) -> tuple[StageTime, ...] | str:
    from edgeclip.profiles.measure.open_subject import connect_split
    from edgeclip.runtime.split.http_client import Transfer

    transfers: list[Transfer] = []
    with ExitStack() as stack:
        runtime = connect_split(spec, Bundle.open(str(spec.bundle)), stack, watch=transfers.append)
        if runtime.plan.kind not in ("image", "cut"):
            return f"a plan of kind {runtime.plan.kind!r} sends no picture"
        return measure_split_stages(runtime, transfers, _pictures(spec, stack))


def _fitting_texts(bundle: Bundle) -> list[str]:
    """Return captions of usual lengths, shortened to the context of the tower."""
    tokenizer = TextTokenizer.from_file(bundle.tokenizer_path, bundle.manifest.spec.text)
    limit, found = tokenizer.spec.context_length, []
    for text in _TEXTS:
        while len(text) > 1 and tokenizer.token_counts([text])[0] > limit:
            text = text[: len(text) // 2]
        found.append(text)
    return found


def _pictures(spec: SubjectSpec, stack: ExitStack) -> list[Path]:
    """Return the subject's image files, or write some synthetic ones."""
    if spec.pictures:
        return [Path(path) for path in spec.pictures]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for number, content in enumerate(sample_pictures()):
        (folder / f"{number}.jpg").write_bytes(content)
    return sorted(folder.iterdir())
