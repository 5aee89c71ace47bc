"""The two halves of a cut tower: the head on the device, the tail as a model of the server."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.embeddings import check_space, check_unit_rows
from edgeclip.runtime.engine import Engine, open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.planning.cut_set import CUT_TENSOR, CutSet, head_name, tail_name
from edgeclip.runtime.serving.models import Arrays, TensorSpec
from edgeclip.runtime.spec import OUTPUT_NAMES
from edgeclip.runtime.tower_feed import Outputs, in_batches, tower_feed
from edgeclip.runtime.wire.codec import FLOAT_CODECS, PIXEL_CODECS, codec_name, decode
from edgeclip.runtime.wire.messages import CODEC, CUT, SPACE_ID, Parameter

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile

FloatArray = NDArray[np.float32]


class CutHead:
    """The part of a tower before a cut.

    Attributes:
        point: the cut.

    Raises:
        CutSetError: the set has no such cut, or was altered.
        InputError: the device does not allow the precision, or would compute it wrongly.
        EngineError: the engine cannot load the graph; TensorRT's cannot load any.
        MissingExtraError: the engine's package is not installed.
    """

    def __init__(self, cuts: CutSet, number: int, device: "DeviceProfile") -> None:
        self.point = cuts.point(number)
        self._cuts = cuts
        self._most = device.batch_max
        self._engine = _open(cuts, head_name(number), device) if number else None

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Compute the value at the cut; float32 [N, *point.shape], or the pixels at cut 0.

        Args:
            pixels: uint8 [N, size, size, 3], as `crop_batch` makes them.

        Raises:
            InputError: another shape or dtype.
            EngineError: the engine failed, or gave something else.
        """
        _check_pixels(pixels, self._cuts.manifest.image.size)
        if self._engine is None:
            return pixels
        found = _run(self._cuts, self._engine, pixels, self._most)[CUT_TENSOR]
        if found.dtype != np.float32 or found.shape[1:] != self.point.shape:
            raise EngineError(
                f"head {self.point.number} of {self._cuts.path} gave {found.dtype} "
                f"{list(found.shape)}: cut the bundle again"
            )
        return found


class CutTail:
    """The part of a tower behind a cut, as a model of the server (see `models.Model`).

    It takes what `codec.encode` gives; the parameter `codec` says how it was encoded, `cut`
    and `space_id` must be its own where they are given.

    Args:
        bundle: what the bundle is called on the server; by its own name if not given.

    Attributes:
        name: that of the bundle, then `-tail-` and the number of the cut.
        inputs: empty: they depend on the codec, and `run` checks them.
        outputs: `image_embeds`, float32 [N, dim].
        space: fingerprint of the embedding space.
        point: the cut.

    Raises:
        CutSetError, InputError, EngineError, MissingExtraError: see `CutHead`.
    """

    inputs: tuple[TensorSpec, ...] = ()

    def __init__(
        self, cuts: CutSet, number: int, device: "DeviceProfile", bundle: str | None = None
    ) -> None:
        self.point = cuts.point(number)
        self.name = tail_model(bundle or cuts.manifest.bundle, number)
        self.space: str | None = cuts.manifest.space
        self._output = OUTPUT_NAMES[cuts.tower]
        dim = cuts.manifest.dim
        self.outputs = (TensorSpec(name=self._output, datatype="FP32", shape=(-1, dim)),)
        self._cuts = cuts
        self._most = device.batch_max
        self._engine = _open(cuts, tail_name(number), device)

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> Outputs:
        """Answer a request.

        Raises:
            SpaceMismatchError: `space_id` is that of another embedding space.
            InputError: another cut, an unknown codec, or tensors that do not decode.
            EngineError: the engine failed.
        """
        self._check(parameters)
        codecs = PIXEL_CODECS if self.point.number == 0 else FLOAT_CODECS
        codec = codec_name(parameters.get(CODEC, codecs[0]))
        if codec not in codecs:
            raise InputError(f"{self.name} takes the codecs {', '.join(codecs)}, not {codec}")
        values = decode(codec, inputs, shape=self.point.shape, axis=self.point.axis)
        return {self._output: self.embed(values)}

    def embed(self, values: NDArray[Any]) -> FloatArray:
        """Embed values at the cut; float32 [N, dim], L2-normalised.

        Args:
            values: float32 [N, *point.shape], or uint8 pixels for cut 0.

        Raises:
            InputError: values so far from those of any picture that they have no embedding.
            EngineError: the engine failed.
        """
        found = _run(self._cuts, self._engine, values, self._most, at_cut=self.point.number > 0)
        embeddings: FloatArray = found[self._output]
        try:
            check_unit_rows(embeddings, "what comes of the cut tensor")
        except InputError as error:
            raise InputError(f"these values are no picture's: {error}") from None
        return embeddings

    def _check(self, parameters: Mapping[str, Parameter]) -> None:
        space = parameters.get(SPACE_ID)
        if space is not None:
            check_space(str(self.space), str(space), "the request")
        cut = parameters.get(CUT)
        if cut is not None and str(cut) != str(self.point.number):
            raise InputError(f"{self.name} continues from cut {self.point.number}, not {cut!r}")


def tail_models(
    cuts: CutSet, device: "DeviceProfile", bundle: str | None = None
) -> Iterator[CutTail]:
    """All tails of a cut set, each loaded and run once.

    Raises:
        CutSetError, InputError, EngineError, MissingExtraError: see `CutHead`.
    """
    size = cuts.manifest.image.size
    pixels = np.zeros((1, size, size, 3), np.uint8)
    for point in cuts.manifest.points:
        tail = CutTail(cuts, point.number, device, bundle)
        tail.embed(CutHead(cuts, point.number, device).run(pixels))
        yield tail


def tail_model(bundle: str, number: int) -> str:
    """The name of a tail among the server's models."""
    return f"{bundle}-tail-{number}"


def _open(cuts: CutSet, name: str, device: "DeviceProfile") -> Engine:
    precision = cuts.manifest.precision
    if precision not in device.precisions or (cuts.manifest.needs_vnni and not device.vnni):
        why = "does not allow" if precision not in device.precisions else "computes wrongly"
        raise InputError(
            f"{cuts.path} is cut in {precision}, which device {device.name!r} {why}: cut the "
            "bundle again with another --precision"
        )
    content = cuts.graph_bytes(name)
    return open_engine(cuts.path / name, device=device, content=content, data_folder=cuts.path)


def _run(
    cuts: CutSet, engine: Engine, values: NDArray[Any], most: int, *, at_cut: bool = False
) -> Outputs:
    manifest = cuts.manifest

    def run(part: NDArray[Any]) -> Outputs:
        if at_cut:
            return engine.run({CUT_TENSOR: part})
        return engine.run(tower_feed(part, manifest.tower, manifest.pixels, manifest.image))

    return in_batches(run, values, static=manifest.batch, most=most)


def _check_pixels(pixels: NDArray[Any], size: int) -> None:
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
        raise InputError(
            f"pixels must be uint8 [N, {size}, {size}, 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    if not len(pixels):
        raise InputError("no pixels were given: a batch needs at least one picture")
