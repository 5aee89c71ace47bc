"""Time every stage of every split plan on this machine, in turns."""

import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.record.conditions import CpuSnapshot, CpuTime
from edgeclip.profiles.sensors.energy import EnergyMeter, find_meter, joules_of
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.console import Progress, columns, digits
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.preprocess import crop_batch, resize_and_crop
from edgeclip.runtime.planning.cut_set import (
    WEIGHTS_NAME,
    CutHead,
    CutManifest,
    CutPoint,
    CutSet,
    tail_model_name,
)
from edgeclip.runtime.planning.stage_times import Payload, SplitStage, StageSamples, StageTimes
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.wire.codec import (
    FLOAT_CODECS,
    IMAGE_CODECS,
    PIXEL_CODECS,
    CodecName,
    decode,
    encode,
    encode_picture,
)
from edgeclip.runtime.wire.messages import (
    BUNDLE,
    CODEC,
    CUT,
    JSON_LENGTH_HEADER,
    SPACE_ID,
    InferRequest,
    decode_request,
    encode_request,
)

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile


@dataclass(frozen=True, slots=True)
class TimedStage:
    """A stage, and what does it for a picture by its number; it returns what comes of it."""

    stage: SplitStage
    run: Callable[[int], object]


@dataclass(frozen=True, slots=True)
class _Message:
    """A request as it crosses."""

    headers: dict[str, str]
    body: bytes

    def read(self) -> InferRequest:
        """Read it as the server does."""
        return decode_request("", self.body, int(self.headers[JSON_LENGTH_HEADER]))


class StageBuilder:
    """Pictures in every form that a stage begins with.

    Args:
        cuts: the tower.
        device: engine and threads.
        files: image files; batch 1 throughout.

    Raises:
        InputError: a picture that cannot be read.
        EngineError, CutSetError, MissingExtraError: see `CutHead`.
    """

    def __init__(self, cuts: CutSet, device: "DeviceProfile", files: Sequence[Path]) -> None:
        self._cuts, self._device = cuts, device
        self._spec = cuts.manifest.image
        self._files = [path.read_bytes() for path in files]
        self._pixels = crop_batch(self._files, self._spec)
        self._whole = CutTail(cuts, 0, device)
        self._exact = self._whole.embed(self._pixels)

    def of_pictures(self) -> Iterator[TimedStage]:
        """Stages that have nothing to do with a cut."""
        yield TimedStage(SplitStage(kind="prepare"), self._prepare)
        for codec in IMAGE_CODECS:
            sent = [self._sent(codec, file) for file in self._files]
            yield self._compress(codec)
            yield self._open(codec, sent)

    def picture_payloads(self) -> Iterator[Payload]:
        """What the picture takes in each codec, and what that codec costs."""
        for codec in IMAGE_CODECS:
            sent = [encode_picture(codec, file, self._spec) for file in self._files]
            found = self._whole.embed(crop_batch(sent, self._spec))
            sizes = [len(self._sent(codec, file).body) for file in self._files]
            yield _payload(None, codec, sizes, cosines(found, self._exact))

    def of_cut(self, point: CutPoint) -> tuple[list[TimedStage], list[Payload]]:
        """The stages of one cut, and what crosses there."""
        head = CutHead(self._cuts, point.number, self._device)
        tail = CutTail(self._cuts, point.number, self._device) if point.number else self._whole
        values, number = head.run(self._pixels), point.number

        def run_tail(at: int) -> object:
            return tail.embed(values[at : at + 1])

        def run_head(at: int) -> object:
            return head.run(self._pixels[at : at + 1])

        works = [TimedStage(SplitStage(kind="tail", cut=number), run_tail)]
        works += [TimedStage(SplitStage(kind="head", cut=number), run_head)] if number else []
        payloads = []
        for codec in _codecs(point):
            made, payload = self._of_codec(point, codec, values, tail)
            works += made
            payloads.append(payload)
        return works, payloads

    def _of_codec(
        self, point: CutPoint, codec: CodecName, values: NDArray[Any], tail: CutTail
    ) -> tuple[list[TimedStage], Payload]:
        number = point.number

        def pack(at: int) -> _Message:
            tensors = encode(codec, values[at : at + 1], axis=point.axis)
            model = tail_model_name(self._cuts.manifest.bundle, number)
            return self._message(model, tensors, {CODEC: codec, CUT: str(number)})

        messages = [pack(at) for at in range(len(values))]

        def unpack(at: int) -> NDArray[Any]:
            inputs = messages[at].read().inputs
            return decode(codec, inputs, shape=point.shape, axis=point.axis)

        found = np.concatenate([tail.embed(unpack(at)) for at in range(len(messages))])
        sizes = [len(message.body) for message in messages]
        works = [
            TimedStage(SplitStage(kind="encode", cut=number, codec=codec), pack),
            TimedStage(SplitStage(kind="decode", cut=number, codec=codec), unpack),
        ]
        return works, _payload(number, codec, sizes, cosines(found, self._exact))

    def _prepare(self, at: int) -> object:
        return resize_and_crop(self._files[at], self._spec)

    def _compress(self, codec: str) -> TimedStage:
        def run(at: int) -> object:
            return self._sent(codec, self._files[at])

        return TimedStage(SplitStage(kind="compress", codec=codec), run)

    def _open(self, codec: str, sent: Sequence[_Message]) -> TimedStage:
        def run(at: int) -> object:
            (content,) = sent[at].read().inputs["images"]
            return resize_and_crop(content, self._spec)

        return TimedStage(SplitStage(kind="open", codec=codec), run)

    def _sent(self, codec: str, file: bytes) -> _Message:
        images = np.array([encode_picture(codec, file, self._spec)], dtype=object)
        return self._message(f"{self._cuts.manifest.bundle}-image", {"images": images}, {})

    def _message(
        self, model: str, inputs: dict[str, NDArray[Any]], parameters: dict[str, str]
    ) -> _Message:
        manifest = self._cuts.manifest
        known = {SPACE_ID: manifest.space, BUNDLE: manifest.bundle, **parameters}
        return _Message(*encode_request(InferRequest(model=model, inputs=inputs, parameters=known)))


def _codecs(point: CutPoint) -> tuple[CodecName, ...]:
    """The codecs of a cut that this machine has."""
    names = FLOAT_CODECS if point.number else PIXEL_CODECS
    if importlib.util.find_spec("zstandard") is not None:
        return names
    return tuple(name for name in names if not name.endswith("zstd"))


def _payload(
    cut: int | None, codec: str, sizes: Sequence[int], found: NDArray[np.floating[Any]]
) -> Payload:
    return Payload(
        cut=cut, codec=codec, bytes=tuple(sizes), cosines=tuple(round(float(v), 6) for v in found)
    )


# Of loaded halves at a time, in bytes of weights: the halves of one cut make one whole tower.
_MEMORY = 2**30
_WARM_ROUNDS = 5
_FEWEST_ROUNDS = 10


class StageSampler:
    """Runs stages in turn, once a round, and keeps how long each took.

    The order is rotated and reversed from round to round, so that each stage takes each place
    equally often.

    Args:
        works: the stages.
        pictures: how many there are; round i looks at picture i modulo that.
    """

    def __init__(self, works: Sequence[TimedStage], pictures: int) -> None:
        self._works, self._pictures = works, pictures
        self._rounds: list[NDArray[np.float64]] = []

    def warm_up(self) -> None:
        """Run each stage a few times; the first run of a graph plans its memory."""
        for number in range(_WARM_ROUNDS):
            for work in self._works:
                work.run(number % self._pictures)

    def run_round(self) -> None:
        """Run each stage once."""
        number, times = len(self._rounds), np.empty(len(self._works))
        for place in round_order(len(self._works), number):
            start = time.perf_counter()
            self._works[place].run(number % self._pictures)
            times[place] = time.perf_counter() - start
        self._rounds.append(times)

    def samples(self, meter: EnergyMeter | None = None) -> list[StageSamples]:
        """What was measured in the rounds so far, at least one; energy where there is a meter."""
        return [
            StageSamples(
                stage=work.stage,
                ms=tuple(round(1e3 * float(value), 4) for value in column),
                joules=None if meter is None else joules_of(meter, functools.partial(work.run, 0)),
            )
            for work, column in zip(self._works, np.transpose(self._rounds), strict=True)
        ]


def measure_cuts(
    cuts: CutSet,
    *,
    device: "DeviceProfile",
    command: str,
    pictures: Sequence[Path] = (),
    rounds: int = 100,
    progress: Progress | None = None,
    altered: Callable[[TimedStage], TimedStage] = lambda work: work,
) -> StageTimes:
    """Measure all stages of both sides, what crosses, and what each codec costs.

    See `StageSampler`. Cuts are measured in groups whose weights fit into memory together.

    Args:
        cuts: what is measured.
        device: engine and threads.
        command: what the user typed, for the record.
        pictures: image files; those of the cut set by default.
        rounds: how many samples of each stage.
        progress: called after each round of each group.
        altered: puts another in the place of a stage, such as one for a slower device.

    Raises:
        InputError: no pictures, one that cannot be read, or fewer than 10 rounds.
        EngineError, CutSetError, MissingExtraError: see `CutHead`.
    """
    files = _files(cuts, pictures, rounds)
    all_works, meter = StageBuilder(cuts, device, files), find_meter(device)
    payloads, stages = list[Payload](all_works.picture_payloads()), list[StageSamples]()
    groups = list(_groups(cuts))
    with _watched() as cpu:
        for number, group in enumerate(groups):
            works = list(all_works.of_pictures()) if number == 0 else []
            for point in group:
                made, crossing = all_works.of_cut(point)
                works += made
                payloads += crossing
            step = functools.partial(_step, progress, number, len(groups), rounds)
            stages += _sampled([*map(altered, works)], rounds, len(files), meter, step)
    denied, about = cpu[0], cuts.manifest
    return StageTimes(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=detect_machine(),
        device=device.name,
        bundle=about.bundle,
        space=about.space,
        precision=about.precision,
        rounds=rounds,
        pictures=len(files),
        stages=tuple(stages),
        payloads=tuple(payloads),
        waiting_share=denied.waiting_share,
        steal_share=denied.steal_share,
        contended=denied.contended,
        energy_sensor=None if meter is None else meter.name,
        on_cpu=device.on_cpu,
    )


def _files(cuts: CutSet, pictures: Sequence[Path], rounds: int) -> list[Path]:
    """The pictures to measure with, no more than there are rounds."""
    files = list(pictures or cuts.pictures)[:rounds]
    if not files:
        raise InputError(f"{cuts.path} has no pictures: give --pictures, a folder of some")
    if rounds < _FEWEST_ROUNDS:
        raise InputError(
            f"{rounds} rounds tell nothing of a 95th percentile: take {_FEWEST_ROUNDS} at least"
        )
    return files


def _sampled(
    works: Sequence[TimedStage],
    rounds: int,
    pictures: int,
    meter: EnergyMeter | None,
    step: Callable[[int], None],
) -> list[StageSamples]:
    """Warm up, then run all rounds."""
    sampler = StageSampler(works, pictures)
    sampler.warm_up()
    for done in range(1, rounds + 1):
        sampler.run_round()
        step(done)
    return sampler.samples(meter)


def _groups(cuts: CutSet) -> Iterator[tuple[CutPoint, ...]]:
    """Cuts that are loaded together."""
    weights = next((f.bytes for f in cuts.manifest.files if f.path == WEIGHTS_NAME), 0)
    size = max(1, _MEMORY // max(1, weights))
    points = cuts.manifest.points
    for start in range(0, len(points), size):
        yield points[start : start + size]


@contextmanager
def _watched() -> Iterator[list[CpuTime]]:
    """Keep the garbage collector quiet; the list holds one entry when the block has ended."""
    found: list[CpuTime] = []
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    before = CpuSnapshot.take()
    began, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    try:
        yield found
    finally:
        if was_on:
            gc.enable()
    waiting, steal = CpuSnapshot.take().denied_since(before)
    found.append(
        CpuTime(
            wall_s=time.perf_counter() - began,
            thread_s=time.thread_time() - thread,
            process_s=time.process_time() - process,
            waiting_share=waiting,
            steal_share=steal,
        )
    )


def _step(progress: Progress | None, group: int, groups: int, rounds: int, done: int) -> None:
    if progress is not None:
        progress(group * rounds + done, groups * rounds)


def stage_table(times: StageTimes, manifest: CutManifest) -> str:
    """Medians of every stage, bytes and cosines of every codec, and warnings."""
    cuts = [("cut", "where", "head ms", "tail ms")]
    for point in manifest.points:
        head = times.find(SplitStage(kind="head", cut=point.number))
        tail = times.ms(SplitStage(kind="tail", cut=point.number))
        before = "" if head is None else _median(np.array(head.ms))
        cuts.append((str(point.number), point.name, before, _median(tail)))
    what = f"{times.rounds} rounds over {times.pictures} pictures, batch 1; medians"
    head_line = f"{times.machine.cpu}, {times.machine.cores} cores, device {times.device}; {what}"
    codecs: list[tuple[str, ...]] = [
        ("sent", "codec", "send ms", "receive ms", "bytes", "p95", "cosine", "least")
    ]
    codecs += [_codec_row(times, payload) for payload in times.payloads]
    parts = [head_line, columns(cuts, left=2), columns(codecs, left=2)]
    if times.contended:
        parts.append(
            "CONTENDED: more than 10% of the CPU time was denied to these runs: measure again on "
            "a quiet machine."
        )
    if times.energy_sensor is None:
        parts.append("No energy counter can be read here: energy is left out.")
    return "\n\n".join(parts)


def _codec_row(times: StageTimes, payload: Payload) -> tuple[str, ...]:
    if payload.cut is None:
        sending = SplitStage(kind="compress", codec=payload.codec)
        receiving = SplitStage(kind="open", codec=payload.codec)
    else:
        sending = SplitStage(kind="encode", cut=payload.cut, codec=payload.codec)
        receiving = SplitStage(kind="decode", cut=payload.cut, codec=payload.codec)
    return (
        "picture" if payload.cut is None else f"cut {payload.cut}",
        payload.codec,
        _median(times.ms(sending)),
        _median(times.ms(receiving)),
        f"{np.median(payload.bytes):,.0f}",
        f"{np.percentile(payload.bytes, 95):,.0f}",
        f"{np.mean(payload.cosines):.5f}",
        f"{min(payload.cosines):.5f}",
    )


def _median(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    return digits(float(np.median(values)))
