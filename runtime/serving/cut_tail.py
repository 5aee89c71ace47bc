"""Tails of cut towers as models of the server."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.embeddings import check_space, check_unit_rows
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_head import CutHead, open_half, run_half, tail_model
from edgeclip.runtime.planning.cut_set import CutSet, tail_name
from edgeclip.runtime.serving.models import Arrays, TensorSpec
from edgeclip.runtime.spec import OUTPUT_NAMES
from edgeclip.runtime.tower_feed import Outputs
from edgeclip.runtime.wire.codec import FLOAT_CODECS, PIXEL_CODECS, codec_name, decode
from edgeclip.runtime.wire.messages import CODEC, CUT, SPACE_ID, Parameter


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
        self._engine = open_half(cuts, tail_name(number), device)

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

    def embed(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Embed values at the cut; float32 [N, dim], L2-normalised.

        Args:
            values: float32 [N, *point.shape], or uint8 pixels for cut 0.

        Raises:
            InputError: values so far from those of any picture that they have no embedding.
            EngineError: the engine failed.
        """
        found = run_half(self._cuts, self._engine, values, self._most, at_cut=self.point.number > 0)
        embeddings: NDArray[np.float32] = found[self._output]
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
