"""The models of a server that a device asks, and what their replies must hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.embeddings import check_embeddings, check_space
from edgeclip.runtime.encoder import Answer, Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.index import Hit
from edgeclip.runtime.planning.cut_head import CutHead
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.errors import BadReplyError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.pictures import Pictures
from edgeclip.runtime.wire.codec import CodecName, codec_name, encode
from edgeclip.runtime.wire.codec_image import FILE, check_image_codec
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
    from edgeclip.profiles.device import DeviceProfile
    from edgeclip.runtime.planning.cut_set import CutSet

FloatArray = NDArray[np.float32]
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
