"""The models of a server that a device calls: their inputs, and checks of their replies."""

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
from edgeclip.runtime.encoder import Answer, Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import ImageInput, list_of_images
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.planning.cut_set import CutHead
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.split.errors import BadReplyError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.resilience import Deadline
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

_OTHERWISE = "jpeg-90"  # where codec "file" has no file, or too large a one
# A larger file costs more to send than to cut to size, and the device needs long to decode it
# when the server has let it down.
_LARGEST_FILE = 1 << 18  # bytes
_MOST_PIXELS = 1 << 20
_FORMATS = ("JPEG", "PNG", "WEBP")  # what servers take


class Pictures:
    """Pictures as a caller gave them.

    Args:
        images: see `Encoder.encode_image`.
        spec: what the tower takes.
        pixels: uint8 [N, size, size, 3] where they are there already; `images` are rows of
            it then.
    """

    def __init__(
        self,
        images: ImageInput | Sequence[ImageInput],
        spec: ImageSpec,
        pixels: NDArray[np.uint8] | None = None,
    ) -> None:
        self._images, self._spec = list_of_images(images), spec
        if pixels is not None:
            self.pixels = pixels

    def __len__(self) -> int:
        return len(self._images)

    @functools.cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The pictures resized and cut; uint8 [N, size, size, 3].

        Raises:
            InputError: one that cannot be loaded.
        """
        if not self._images:
            return np.zeros((0, self._spec.size, self._spec.size, 3), np.uint8)
        return crop_batch(self._images, self._spec)

    @property
    def is_decoded(self) -> bool:
        """Whether `pixels` costs nothing."""
        return "pixels" in self.__dict__

    def some(self, rows: NDArray[np.intp]) -> "Pictures":
        """Those of the given numbers."""
        images = [self._images[row] for row in rows]
        return Pictures(images, self._spec, self.pixels[rows] if self.is_decoded else None)

    def compressed(self, codec: str) -> list[bytes]:
        """The bytes to send for each picture.

        Codec "file" sends small JPEG, PNG and WebP files as they are, with all they hold, such
        as where a photo was taken; other pictures are cut to size first.

        Raises:
            InputError: see `codec_image.encode_picture`.
        """
        return [self._compressed(codec, number) for number in range(len(self))]

    def _compressed(self, codec: str, number: int) -> bytes:
        if codec == FILE:
            content = _small_file(self._images[number])
            if content is not None:
                return content
            codec = _OTHERWISE
        # Where nothing but the crop remains after resizing, the pixels need not be made twice.
        is_whole = self._spec.resize == self._spec.size
        picture = self.pixels[number] if is_whole else self._images[number]
        return encode_picture(codec, picture, self._spec)


def is_pictures(query: Any) -> bool:
    """Whether a query is one picture or several, and not texts or embeddings.

    As for `Encoder.search`: a `str` is a text, and a float array of two dimensions holds
    embeddings.
    """
    if isinstance(query, np.ndarray):
        return not (query.ndim == 2 and query.dtype.kind == "f")
    items = list_of_images(query) if not isinstance(query, str) else [query]
    return bool(items) and not any(isinstance(item, str) for item in items)


def typical_file() -> bytes:
    """A JPEG file as large as one that is sent as it is may be, to measure its decoding with."""
    side = int(_MOST_PIXELS**0.5)
    colours = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(colours).resize((side, side)).save(written, "JPEG")
    return written.getvalue()


def _small_file(image: ImageInput) -> bytes | None:
    """The content of an image file that may be sent as it is; None for anything else."""
    try:
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            if path.stat().st_size > _LARGEST_FILE:
                return None
            image = path.read_bytes()
        if not isinstance(image, bytes) or len(image) > _LARGEST_FILE:
            return None
        with Image.open(io.BytesIO(image), formats=_FORMATS) as header:
            return image if header.width * header.height <= _MOST_PIXELS else None
    except Exception:  # damaged, or of another format: decoding it says what is wrong
        return None


Item = TypeVar("Item", Answer, Hit)

_EMBEDDINGS = "image_embeds"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FarModel:
    """A model of a server, asked on behalf of a bundle.

    Attributes:
        server: who serves it.
        name: what it is called there.
        bundle: name of the device's bundle.
        space: fingerprint of the embedding space that replies must be of.
        dim: length of an embedding.
    """

    server: Server
    name: str
    bundle: str
    space: str
    dim: int

    @classmethod
    def of(cls, encoder: Encoder, server: Server, name: str) -> "FarModel":
        """A model that is asked for what `encoder` could do."""
        return cls(
            server=server,
            name=name,
            bundle=encoder.bundle.manifest.name,
            space=encoder.space,
            dim=encoder.spec.dim,
        )

    def request(self, inputs: dict[str, NDArray[Any]], **parameters: Parameter) -> InferRequest:
        """A request for it."""
        return InferRequest(
            model=self.name,
            inputs=inputs,
            parameters={SPACE_ID: self.space, BUNDLE: self.bundle, **parameters},
        )

    def embed(self, request: InferRequest, count: int, deadline: Deadline) -> FloatArray:
        """Ask for `count` embeddings; float32 [count, dim].

        Raises:
            ServerError: see `Server.ask`.
        """

        def read(response: InferResponse) -> FloatArray:
            found = _output(response, _EMBEDDINGS, count)
            try:
                check_embeddings(found, self.dim, f"what {self.name} gave")
            except InputError as error:
                raise BadReplyError(str(error)) from None
            return found

        return self.server.ask(request, deadline, read)

    def search(self, embeddings: FloatArray, deadline: Deadline, *, top: int) -> "Found[Hit]":
        """Ask an index for the nearest entries of each embedding [N, dim].

        Raises:
            ServerError: see `Server.ask`.
        """
        request = self.request({"embeddings": embeddings}, **{TOP: top})
        read = _rows_reader("key", len(embeddings), Hit)
        return self.server.ask(request, deadline, read)

    def classify(self, embeddings: FloatArray, deadline: Deadline, *, top: int) -> "Found[Answer]":
        """Ask a label set for the best labels of each image embedding [N, dim].

        Raises:
            ServerError: see `Server.ask`.
        """
        request = self.request({_EMBEDDINGS: embeddings}, **{TOP: top})
        read = _rows_reader("label", len(embeddings), Answer)
        return self.server.ask(request, deadline, read)


Found = list[tuple[Item, ...]]


class FarTower(Protocol):
    """An image tower that runs on a server, all of it or its end."""

    @property
    def sends_files(self) -> bool:
        """Whether pictures may be sent without being decoded here."""
        ...

    def embed(self, pictures: Pictures, deadline: Deadline) -> FloatArray:
        """Embed pictures; float32 [N, dim].

        Raises:
            ServerError: see `Server.ask`.
            InputError: a picture that cannot be loaded.
        """
        ...


@dataclass(frozen=True, slots=True)
class PictureTower:
    """A whole tower, which is sent compressed pictures by a codec of `codec_image`."""

    model: FarModel
    codec: str

    @property
    def sends_files(self) -> bool:
        """See `FarTower`."""
        return self.codec == FILE

    def request(self, pictures: Pictures) -> InferRequest:
        """The request that asks for these pictures' embeddings."""
        images = np.array(pictures.compressed(self.codec), dtype=object)
        return self.model.request({"images": images})

    def embed(self, pictures: Pictures, deadline: Deadline) -> FloatArray:
        """See `FarTower`."""
        return self.model.embed(self.request(pictures), len(pictures), deadline)


@dataclass(frozen=True, slots=True)
class TailTower:
    """The end of a tower, which is sent the value at a cut by a codec of `codec`."""

    model: FarModel
    head: CutHead
    codec: CodecName

    @property
    def sends_files(self) -> bool:
        """See `FarTower`."""
        return False

    def embed(self, pictures: Pictures, deadline: Deadline) -> FloatArray:
        """See `FarTower`; the head runs here first."""
        point = self.head.point
        tensors = encode(self.codec, self.head.run(pictures.pixels), axis=point.axis)
        request = self.model.request(tensors, **{CODEC: self.codec, CUT: str(point.number)})
        return self.model.embed(request, len(pictures), deadline)


def open_far_tower(
    model: FarModel, plan: SplitPlan, cuts: "CutSet | None", device: "DeviceProfile"
) -> FarTower:
    """What a plan of kind "image" or "cut" asks; for the latter, the head is loaded.

    Raises:
        InputError: an unknown codec, or no cut set for a cut.
        SpaceMismatchError: the cut set is of another embedding space.
        CutSetError, EngineError, MissingExtraError: the head cannot be loaded.
    """
    codec = str(plan.codec)
    if plan.kind == "image":
        check_image_codec(codec)
        return PictureTower(model, codec)
    if cuts is None or plan.cut is None:
        raise InputError(f"the plan {plan.name!r} needs the cut set of the bundle")
    check_space(model.space, cuts.manifest.space, f"the cut set {cuts.path}")
    return TailTower(model, CutHead(cuts, plan.cut, device), codec_name(codec))


def _output(response: InferResponse, name: str, count: int) -> NDArray[Any]:
    found = response.outputs.get(name)
    if found is None or found.shape[:1] != (count,):
        what = "no" if found is None else f"{list(found.shape)} as its"
        raise BadReplyError(f"model {response.model} gave {what} output {name} for {count} inputs")
    return found


def _rows_reader(
    text: str, count: int, make: Callable[[str, float], Item]
) -> Callable[[InferResponse], Found[Item]]:
    """What reads outputs `text`, BYTES [count, k], and `score`, FP32 [count, k]."""

    def read(response: InferResponse) -> Found[Item]:
        texts, scores = (_output(response, name, count) for name in (text, "score"))
        if texts.shape != scores.shape or texts.ndim != 2 or texts.dtype != object:
            raise BadReplyError(f"model {response.model} gave texts and scores that do not fit")
        try:
            return [
                tuple(make(each.decode(), float(score)) for each, score in zip(*row, strict=True))
                for row in zip(texts, scores, strict=True)
            ]
        except (UnicodeDecodeError, ValueError) as error:
            raise BadReplyError(f"model {response.model}: {error}") from None

    return read
