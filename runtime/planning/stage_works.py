"""The stages of every split plan as functions that can be timed, and what crosses."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.planning.cut_head import CutHead, tail_model
from edgeclip.runtime.planning.cut_set import CutPoint, CutSet
from edgeclip.runtime.planning.stage_times import Payload, Stage
from edgeclip.runtime.preprocess import crop_batch, resize_and_crop
from edgeclip.runtime.quality import cosines
from edgeclip.runtime.serving.cut_tail import CutTail
from edgeclip.runtime.wire.codec import FLOAT_CODECS, PIXEL_CODECS, CodecName, decode, encode
from edgeclip.runtime.wire.codec_image import IMAGE_CODECS, encode_picture
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
    from edgeclip.profiles.device import DeviceProfile


@dataclass(frozen=True, slots=True)
class StageWork:
    """A stage, and what does it for a picture by its number; it returns what comes of it."""

    stage: Stage
    run: Callable[[int], object]


@dataclass(frozen=True, slots=True)
class _Message:
    """A request as it crosses."""

    headers: dict[str, str]
    body: bytes

    def read(self) -> InferRequest:
        """Read it as the server does."""
        return decode_request("", self.body, int(self.headers[JSON_LENGTH_HEADER]))


class StageWorks:
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

    def of_pictures(self) -> Iterator[StageWork]:
        """Stages that have nothing to do with a cut."""
        yield StageWork(Stage(kind="prepare"), self._prepare)
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

    def of_cut(self, point: CutPoint) -> tuple[list[StageWork], list[Payload]]:
        """The stages of one cut, and what crosses there."""
        head = CutHead(self._cuts, point.number, self._device)
        tail = CutTail(self._cuts, point.number, self._device) if point.number else self._whole
        values, number = head.run(self._pixels), point.number

        def run_tail(at: int) -> object:
            return tail.embed(values[at : at + 1])

        def run_head(at: int) -> object:
            return head.run(self._pixels[at : at + 1])

        works = [StageWork(Stage(kind="tail", cut=number), run_tail)]
        works += [StageWork(Stage(kind="head", cut=number), run_head)] if number else []
        payloads = []
        for codec in _codecs(point):
            made, payload = self._of_codec(point, codec, values, tail)
            works += made
            payloads.append(payload)
        return works, payloads

    def _of_codec(
        self, point: CutPoint, codec: CodecName, values: NDArray[Any], tail: CutTail
    ) -> tuple[list[StageWork], Payload]:
        number = point.number

        def pack(at: int) -> _Message:
            tensors = encode(codec, values[at : at + 1], axis=point.axis)
            model = tail_model(self._cuts.manifest.bundle, number)
            return self._message(model, tensors, {CODEC: codec, CUT: str(number)})

        messages = [pack(at) for at in range(len(values))]

        def unpack(at: int) -> NDArray[Any]:
            inputs = messages[at].read().inputs
            return decode(codec, inputs, shape=point.shape, axis=point.axis)

        found = np.concatenate([tail.embed(unpack(at)) for at in range(len(messages))])
        sizes = [len(message.body) for message in messages]
        works = [
            StageWork(Stage(kind="encode", cut=number, codec=codec), pack),
            StageWork(Stage(kind="decode", cut=number, codec=codec), unpack),
        ]
        return works, _payload(number, codec, sizes, cosines(found, self._exact))

    def _prepare(self, at: int) -> object:
        return resize_and_crop(self._files[at], self._spec)

    def _compress(self, codec: str) -> StageWork:
        def run(at: int) -> object:
            return self._sent(codec, self._files[at])

        return StageWork(Stage(kind="compress", codec=codec), run)

    def _open(self, codec: str, sent: Sequence[_Message]) -> StageWork:
        def run(at: int) -> object:
            (content,) = sent[at].read().inputs["images"]
            return resize_and_crop(content, self._spec)

        return StageWork(Stage(kind="open", codec=codec), run)

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
