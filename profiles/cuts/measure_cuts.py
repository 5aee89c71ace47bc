"""Time every stage of every split plan on this machine, interleaved stage by stage."""

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import no_garbage_collection, round_order
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


# Bytes of weights that are loaded at a time; head and tail of one cut are one whole tower.
_MAX_LOADED_BYTES = 2**30
_WARM_UP_ROUNDS = 5
_MIN_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class TimedStage:
    """A stage and a function that does its work for the picture of a given number."""

    stage: SplitStage
    run: Callable[[int], object]


def measure_cuts(
    cuts: CutSet,
    *,
    device: "DeviceProfile",
    command: str,
    pictures: Sequence[Path] = (),
    rounds: int = 100,
    progress: Progress | None = None,
    replace_stage: Callable[[TimedStage], TimedStage] = lambda stage: stage,
) -> StageTimes:
    """Time all stages of device and server, and the bytes and accuracy of each codec.

    In each round every stage runs once, see `StageSampler`. Cuts are measured in groups whose
    weights fit into memory together.

    Args:
        cuts: the cut tower.
        device: engine and threads.
        command: the command line that the user typed, for the record.
        pictures: image files; by default those of the cut set.
        rounds: samples of each stage, at least 10.
        progress: called after each round of each group.
        replace_stage: replaces a stage by another one, such as one of a slower device.

    Raises:
        InputError: no pictures, a picture that cannot be read, or fewer than 10 rounds.
        EngineError, CutSetError, MissingExtraError: see `CutHead`.
    """
    files = list(pictures or cuts.pictures)[:rounds]
    if not files:
        raise InputError(f"{cuts.path} has no pictures: give --pictures, a folder of some")
    if rounds < _MIN_ROUNDS:
        raise InputError(
            f"{rounds} rounds tell too little of how times vary: take {_MIN_ROUNDS} at least, and "
            "19 for a 95th percentile"
        )
    builder, meter = StageBuilder(cuts, device, files), find_meter(device)
    payloads, samples = list[Payload](builder.picture_payloads()), list[StageSamples]()
    groups = list(_groups(cuts))
    with no_garbage_collection():
        before, wall, thread = CpuSnapshot.take(), time.perf_counter(), time.thread_time()
        for number, group in enumerate(groups):
            stages = list(builder.picture_stages()) if number == 0 else []
            for point in group:
                of_cut, of_codecs = builder.cut_stages(point)
                stages += of_cut
                payloads += of_codecs
            sampler = StageSampler([*map(replace_stage, stages)], len(files))
            sampler.warm_up()
            for done in range(1, rounds + 1):
                sampler.run_round()
                if progress is not None:
                    progress(number * rounds + done, len(groups) * rounds)
            samples += sampler.samples(meter)
        after = CpuSnapshot.take()
        waiting, steal = after.denied_since(before)
        cpu = CpuTime(
            wall_s=time.perf_counter() - wall,
            thread_s=time.thread_time() - thread,
            process_s=after.process_s - before.process_s,
            waiting_share=waiting,
            steal_share=steal,
        )
    manifest = cuts.manifest
    return StageTimes(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=detect_machine(),
        device=device.name,
        bundle=manifest.bundle,
        space=manifest.space,
        precision=manifest.precision,
        rounds=rounds,
        pictures=len(files),
        stages=tuple(samples),
        payloads=tuple(payloads),
        waiting_share=cpu.waiting_share,
        steal_share=cpu.steal_share,
        contended=cpu.contended,
        energy_sensor=None if meter is None else meter.name,
        on_cpu=device.on_cpu,
    )


def _groups(cuts: CutSet) -> Iterator[tuple[CutPoint, ...]]:
    """Yield the cuts that are loaded together."""
    weights = next((f.bytes for f in cuts.manifest.files if f.path == WEIGHTS_NAME), 0)
    size = max(1, _MAX_LOADED_BYTES // max(1, weights))
    points = cuts.manifest.points
    for start in range(0, len(points), size):
        yield points[start : start + size]


class StageSampler:
    """Runs stages once a round and keeps the time of each run.

    The order is rotated and reversed from round to round, so that each stage takes each place
    equally often.

    Args:
        stages: the stages.
        pictures: number of pictures; round i runs on picture i modulo that.
    """

    def __init__(self, stages: Sequence[TimedStage], pictures: int) -> None:
        self._stages, self._pictures = stages, pictures
        self._rounds: list[NDArray[np.float64]] = []

    def warm_up(self) -> None:
        """Run each stage a few times; the first run of a graph allocates memory."""
        for number in range(_WARM_UP_ROUNDS):
            for stage in self._stages:
                stage.run(number % self._pictures)

    def run_round(self) -> None:
        """Run and time each stage once."""
        number, times = len(self._rounds), np.empty(len(self._stages))
        for place in round_order(len(self._stages), number):
            start = time.perf_counter()
            self._stages[place].run(number % self._pictures)
            times[place] = time.perf_counter() - start
        self._rounds.append(times)

    def samples(self, meter: EnergyMeter | None = None) -> list[StageSamples]:
        """Return the times of all rounds, at least one, and the energy if there is a meter."""
        return [
            StageSamples(
                stage=timed.stage,
                ms=tuple(round(1e3 * float(value), 4) for value in column),
                joules=None if meter is None else joules_of(meter, functools.partial(timed.run, 0)),
            )
            for timed, column in zip(self._stages, np.transpose(self._rounds), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Message:
    """An HTTP request as it is sent."""

    headers: dict[str, str]
    body: bytes

    def read(self) -> InferRequest:
        """Decode it as the server does."""
        return decode_request("", self.body, int(self.headers[JSON_LENGTH_HEADER]))


class StageBuilder:
    """Builds the stages of all plans; holds the pictures in every form that a stage starts from.

    Args:
        cuts: the cut tower.
        device: engine and threads.
        files: image files; every stage runs at batch 1.

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

    def picture_stages(self) -> Iterator[TimedStage]:
        """Yield the stages that no cut belongs to: preprocessing, and sending pictures."""
        yield TimedStage(
            SplitStage(kind="prepare"), lambda at: resize_and_crop(self._files[at], self._spec)
        )
        for codec in IMAGE_CODECS:
            yield self._compress_stage(codec)
            yield self._open_stage(codec)

    def picture_payloads(self) -> Iterator[Payload]:
        """Yield size and accuracy of the pictures in each image codec."""
        for codec in IMAGE_CODECS:
            encoded = [encode_picture(codec, file, self._spec) for file in self._files]
            found = self._whole.embed(crop_batch(encoded, self._spec))
            sizes = [len(self._picture_message(codec, file).body) for file in self._files]
            yield _payload(None, codec, sizes, cosines(found, self._exact))

    def cut_stages(self, point: CutPoint) -> tuple[list[TimedStage], list[Payload]]:
        """Return the stages of one cut, and size and accuracy of its tensors in each codec."""
        head = CutHead(self._cuts, point.number, self._device)
        tail = CutTail(self._cuts, point.number, self._device) if point.number else self._whole
        values, number = head.run(self._pixels), point.number

        def run_tail(at: int) -> object:
            return tail.embed(values[at : at + 1])

        def run_head(at: int) -> object:
            return head.run(self._pixels[at : at + 1])

        stages = [TimedStage(SplitStage(kind="tail", cut=number), run_tail)]
        stages += [TimedStage(SplitStage(kind="head", cut=number), run_head)] if number else []
        payloads = []
        for codec in _available_codecs(point):
            of_codec, payload = self._codec_stages(point, codec, values, tail)
            stages += of_codec
            payloads.append(payload)
        return stages, payloads

    def _codec_stages(
        self, point: CutPoint, codec: CodecName, values: NDArray[Any], tail: CutTail
    ) -> tuple[list[TimedStage], Payload]:
        """Return encoding and decoding of a cut's tensors in one codec, and their payload."""
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
        stages = [
            TimedStage(SplitStage(kind="encode", cut=number, codec=codec), pack),
            TimedStage(SplitStage(kind="decode", cut=number, codec=codec), unpack),
        ]
        return stages, _payload(number, codec, sizes, cosines(found, self._exact))

    def _compress_stage(self, codec: str) -> TimedStage:
        """Encoding of a picture and its request on the device."""

        def run(at: int) -> object:
            return self._picture_message(codec, self._files[at])

        return TimedStage(SplitStage(kind="compress", codec=codec), run)

    def _open_stage(self, codec: str) -> TimedStage:
        """Decoding and preprocessing of a sent picture on the server."""
        messages = [self._picture_message(codec, file) for file in self._files]

        def run(at: int) -> object:
            (content,) = messages[at].read().inputs["images"]
            return resize_and_crop(content, self._spec)

        return TimedStage(SplitStage(kind="open", codec=codec), run)

    def _picture_message(self, codec: str, file: bytes) -> _Message:
        images = np.array([encode_picture(codec, file, self._spec)], dtype=object)
        return self._message(f"{self._cuts.manifest.bundle}-image", {"images": images}, {})

    def _message(
        self, model: str, inputs: dict[str, NDArray[Any]], parameters: dict[str, str]
    ) -> _Message:
        manifest = self._cuts.manifest
        known = {SPACE_ID: manifest.space, BUNDLE: manifest.bundle, **parameters}
        return _Message(*encode_request(InferRequest(model=model, inputs=inputs, parameters=known)))


def _available_codecs(point: CutPoint) -> tuple[CodecName, ...]:
    """List the codecs of a cut that are installed."""
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


def stage_table(times: StageTimes, manifest: CutManifest) -> str:
    """Format medians of every stage, bytes and cosines of every codec, and warnings as text."""
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
