"""Call the models of a server: prepare their inputs and check their replies."""

import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import Hit, check_embeddings, check_space
from edgeclip.runtime.encoder import Encoder, LabelScore
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import ImageInput, as_image_list
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.planning.cut_set import CutHead
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.split.errors import BadReplyError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.codec import (
    FILE,
    CodecName,
    check_image_codec,
    codec_name,
    encode,
    encode_picture,
)
from edgeclip.runtime.wire.messages import (
    BUNDLE,
    CODEC,
    CUT,
    SPACE_ID,
    TOP,
    InferRequest,
    InferResponse,
    Parameter,
)

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile
    from edgeclip.runtime.planning.cut_set import CutSet

_DEFAULT_CODEC = "jpeg-90"  # for codec "file" if there is no file, or too large a one
# A larger file costs more to send than to resize, and the device would need long to decode it
# when it has to fall back.
_MAX_FILE_BYTES = 1 << 18
_MAX_PIXELS = 1 << 20
_FORMATS = ("JPEG", "PNG", "WEBP")  # what servers accept


class ImageBatch:
    """Pictures as the caller gave them, decoded only when that is needed.

    Args:
        images: see `Encoder.encode_image`.
        spec: size and normalisation of the tower's input.
        pixels: uint8 [N, size, size, 3] if they are known already; `images` are its rows then.
    """

    def __init__(
        self,
        images: ImageInput | Sequence[ImageInput],
        spec: ImageSpec,
        pixels: NDArray[np.uint8] | None = None,
    ) -> None:
        self._images, self._spec = as_image_list(images), spec
        if pixels is not None:
            self.pixels = pixels

    def __len__(self) -> int:
        return len(self._images)

    @functools.cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The pictures resized and cropped; uint8 [N, size, size, 3].

        Raises:
            InputError: one that cannot be loaded.
        """
        if not self._images:
            return np.zeros((0, self._spec.size, self._spec.size, 3), np.uint8)
        return crop_batch(self._images, self._spec)

    @property
    def is_decoded(self) -> bool:
        """Whether `pixels` is known already."""
        return "pixels" in self.__dict__

    def select(self, rows: NDArray[np.intp]) -> "ImageBatch":
        """Return the pictures of these numbers."""
        images = [self._images[row] for row in rows]
        return ImageBatch(images, self._spec, self.pixels[rows] if self.is_decoded else None)

    def compressed(self, codec: str) -> list[bytes]:
        """Return the bytes to send for each picture.

        Codec "file" sends small JPEG, PNG and WebP files as they are, with all their metadata,
        such as where a photo was taken; other pictures are resized and compressed first.

        Raises:
            InputError: see `codec.encode_picture`.
        """
        return [self._compressed(codec, number) for number in range(len(self))]

    def _compressed(self, codec: str, number: int) -> bytes:
        if codec == FILE:
            content = _small_file(self._images[number])
            if content is not None:
                return content
            codec = _DEFAULT_CODEC
        # If resizing crops nothing, the pixels that are known already serve.
        is_whole = self._spec.resize == self._spec.size
        picture = self.pixels[number] if is_whole else self._images[number]
        return encode_picture(codec, picture, self._spec)


def is_image_query(query: Any) -> bool:
    """Return whether a query consists of pictures, and not of texts or embeddings.

    As for `Encoder.search`: a `str` is a text, and a float array of two dimensions holds
    embeddings.
    """
    if isinstance(query, np.ndarray):
        return not (query.ndim == 2 and query.dtype.kind == "f")
    items = as_image_list(query) if not isinstance(query, str) else [query]
    return bool(items) and not any(isinstance(item, str) for item in items)


def is_label_model(name: str) -> bool:
    """Return whether a server's model of this name scores labels, rather than searching an index.

    `edgeclip serve` names label models BUNDLE-labels-SET.
    """
    return "-labels-" in name


def typical_image_file() -> bytes:
    """Make the largest JPEG file that is sent as it is, to measure its decoding."""
    side = int(_MAX_PIXELS**0.5)
    colours = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(colours).resize((side, side)).save(written, "JPEG")
    return written.getvalue()


def _small_file(image: ImageInput) -> bytes | None:
    """Return the content of an image file that may be sent as it is; None for anything else."""
    try:
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            if path.stat().st_size > _MAX_FILE_BYTES:
                return None
            image = path.read_bytes()
        if not isinstance(image, bytes) or len(image) > _MAX_FILE_BYTES:
            return None
        with Image.open(io.BytesIO(image), formats=_FORMATS) as header:
            return image if header.width * header.height <= _MAX_PIXELS else None
    except Exception:  # damaged, or of another format: decoding it will report that
        return None


Item = TypeVar("Item", LabelScore, Hit)

_EMBEDDINGS = "image_embeds"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemoteModel:
    """A model on a server, called on behalf of a bundle.

    Attributes:
        server: the server.
        name: name of the model on the server.
        bundle: name of the device's bundle.
        space: fingerprint of the embedding space that replies must have.
        dim: length of an embedding.
    """

    server: Server
    name: str
    bundle: str
    space: str
    dim: int

    @classmethod
    def of(cls, encoder: Encoder, server: Server, name: str) -> "RemoteModel":
        """Describe a model that does the work of `encoder`."""
        return cls(
            server=server,
            name=name,
            bundle=encoder.bundle.manifest.name,
            space=encoder.space,
            dim=encoder.spec.dim,
        )

    def request(self, inputs: dict[str, NDArray[Any]], **parameters: Parameter) -> InferRequest:
        """Make a request to the model."""
        return InferRequest(
            model=self.name,
            inputs=inputs,
            parameters={SPACE_ID: self.space, BUNDLE: self.bundle, **parameters},
        )

    def embed(self, request: InferRequest, count: int, deadline: Deadline) -> FloatArray:
        """Request `count` embeddings; float32 [count, dim].

        Raises:
            ServerError: see `Server.ask`.
        """

        def read(response: InferResponse) -> FloatArray:
            found = _output(response, _EMBEDDINGS, count)
            try:
                check_embeddings(found, self.dim, f"the reply of {self.name}")
            except InputError as error:
                raise BadReplyError(str(error)) from None
            return found

        return self.server.ask(request, deadline, read)

    def search(self, embeddings: FloatArray, deadline: Deadline, *, top: int) -> "Found[Hit]":
        """Request the nearest entries of an index for each embedding [N, dim].

        Raises:
            ServerError: see `Server.ask`.
        """
        request = self.request({"embeddings": embeddings}, **{TOP: top})
        read = _rows_reader("key", len(embeddings), Hit)
        return self.server.ask(request, deadline, read)

    def classify(
        self, embeddings: FloatArray, deadline: Deadline, *, top: int
    ) -> "Found[LabelScore]":
        """Request the best labels of a label set for each image embedding [N, dim].

        Raises:
            ServerError: see `Server.ask`.
        """
        request = self.request({_EMBEDDINGS: embeddings}, **{TOP: top})
        read = _rows_reader("label", len(embeddings), LabelScore)
        return self.server.ask(request, deadline, read)


Found = list[tuple[Item, ...]]


class RemoteTower(Protocol):
    """An image tower on a server: the whole tower, or its part after a cut."""

    @property
    def sends_files(self) -> bool:
        """Whether pictures may be sent without being decoded on the device."""
        ...

    def embed(self, images: ImageBatch, deadline: Deadline) -> FloatArray:
        """Embed pictures; float32 [N, dim].

        Raises:
            ServerError: see `Server.ask`.
            InputError: a picture that cannot be loaded.
        """
        ...


@dataclass(frozen=True, slots=True)
class RemoteImageTower:
    """A whole tower; compressed pictures are sent, see `codec.encode_picture`."""

    model: RemoteModel
    codec: str

    @property
    def sends_files(self) -> bool:
        """Whether pictures may be sent without being decoded on the device."""
        return self.codec == FILE

    def request(self, images: ImageBatch) -> InferRequest:
        """Make the request for the embeddings of these pictures."""
        content = np.array(images.compressed(self.codec), dtype=object)
        return self.model.request({"images": content})

    def embed(self, images: ImageBatch, deadline: Deadline) -> FloatArray:
        """Send the pictures and return their embeddings; see `RemoteTower.embed`."""
        return self.model.embed(self.request(images), len(images), deadline)


@dataclass(frozen=True, slots=True)
class RemoteTail:
    """The part of a tower after a cut; the value at the cut is sent, see `codec.encode`."""

    model: RemoteModel
    head: CutHead
    codec: CodecName

    @property
    def sends_files(self) -> bool:
        """Never: the head of the tower runs on the device."""
        return False

    def embed(self, images: ImageBatch, deadline: Deadline) -> FloatArray:
        """Run the head, send its output and return embeddings; see `RemoteTower.embed`."""
        point = self.head.point
        tensors = encode(self.codec, self.head.run(images.pixels), axis=point.axis)
        request = self.model.request(tensors, **{CODEC: self.codec, CUT: str(point.number)})
        return self.model.embed(request, len(images), deadline)


def open_remote_tower(
    model: RemoteModel, plan: SplitPlan, cuts: "CutSet | None", device: "DeviceProfile"
) -> RemoteTower:
    """Open the tower that a plan of kind "image" or "cut" names; for a cut, load its head.

    Raises:
        InputError: an unknown codec, or no cut set for a cut.
        SpaceMismatchError: the cut set is of another embedding space.
        CutSetError, EngineError, MissingExtraError: the head cannot be loaded.
    """
    codec = str(plan.codec)
    if plan.kind == "image":
        check_image_codec(codec)
        return RemoteImageTower(model, codec)
    if cuts is None or plan.cut is None:
        raise InputError(f"the plan {plan.name!r} needs the cut set of the bundle")
    check_space(model.space, cuts.manifest.space, f"the cut set {cuts.path}")
    return RemoteTail(model, CutHead(cuts, plan.cut, device), codec_name(codec))


def _output(response: InferResponse, name: str, count: int) -> NDArray[Any]:
    found = response.outputs.get(name)
    if found is None or found.shape[:1] != (count,):
        what = "no" if found is None else f"{list(found.shape)} as its"
        raise BadReplyError(
            f"model {response.model} returned {what} output {name} for {count} inputs"
        )
    return found


def _rows_reader(
    text: str, count: int, make: Callable[[str, float], Item]
) -> Callable[[InferResponse], Found[Item]]:
    """Return a reader of the outputs `text`, BYTES [count, k], and `score`, FP32 [count, k]."""

    def read(response: InferResponse) -> Found[Item]:
        texts, scores = (_output(response, name, count) for name in (text, "score"))
        if texts.shape != scores.shape or texts.ndim != 2 or texts.dtype != object:
            raise BadReplyError(
                f"model {response.model} returned texts and scores of different shapes"
            )
        try:
            return [
                tuple(
                    make(each.decode("utf-8", "surrogateescape"), float(score))
                    for each, score in zip(*row, strict=True)
                )
                for row in zip(texts, scores, strict=True)
            ]
        except (UnicodeDecodeError, ValueError) as error:
            raise BadReplyError(f"model {response.model}: {error}") from None

    return read
