"""Models of a bundle (towers, patch features, label sets) and of a cut set (tails)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray, Outputs, Tensors
from edgeclip.runtime.bundle.index import LabelSet, check_space, check_unit_rows
from edgeclip.runtime.bundle.reduction import Form
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.planning.cut_set import (
    CutHead,
    CutSet,
    open_cut_graph,
    run_cut_graph,
    tail_file_name,
    tail_model_name,
)
from edgeclip.runtime.serving.models import ServingModel, TensorSpec, take_top
from edgeclip.runtime.spec import OUTPUT_NAMES, PATCH_OUTPUT
from edgeclip.runtime.wire.codec import FLOAT_CODECS, PIXEL_CODECS, codec_name, decode
from edgeclip.runtime.wire.messages import CODEC, CUT, DIM, ROW_TYPE, SPACE_ID, Parameter
from edgeclip.runtime.wire.tensors import BYTES, get_flag, get_number

TRUNCATE = "truncate"  # parameter of the text tower, bool: cut texts that are too long
_IMAGES = TensorSpec(name="images", datatype=BYTES, shape=(-1,))
_TOP = 5


def bundle_models(encoder: Encoder, name: str) -> Iterator[ServingModel]:
    """Yield all models of a bundle, after loading its towers.

    Args:
        encoder: encoder of the bundle.
        name: prefix of their names.

    Raises:
        BundleError: see `Bundle.tower_bytes` and `Bundle.labels`.
        EngineError: a tower cannot be loaded or run.
    """
    size = encoder.spec.image.size
    encoder.encode_pixels(np.zeros((1, size, size, 3), np.uint8))
    has_text = encoder.bundle.manifest.has("text")
    if has_text:
        encoder.encode_text("a")
    yield ImageModel(encoder, f"{name}-image")
    yield PixelModel(encoder, f"{name}-pixels")
    if has_text:
        yield TextModel(encoder, f"{name}-text")
    if encoder.bundle.manifest.patch_features:
        yield PatchModel(encoder, f"{name}-patches")
    for label_set in encoder.bundle.label_names:
        yield LabelModel(encoder, f"{name}-labels-{label_set}", encoder.bundle.labels(label_set))


class _BundleModel:
    """Base of the models of a bundle.

    The towers take the parameters `dim` and `embeddings` for a form of embeddings that the bundle
    gives. Outputs are declared as they are without.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, encoder: Encoder, name: str) -> None:
        self.name = name
        self.space: str | None = encoder.space
        self._encoder = encoder

    def _embeddings(self, name: str) -> TensorSpec:
        return TensorSpec(name=name, datatype="FP32", shape=(-1, self._encoder.spec.dim))

    def _formed(self, embeddings: FloatArray, parameters: Mapping[str, Parameter]) -> NDArray[Any]:
        """Reduce embeddings to the form that the parameters `dim` and `embeddings` ask for.

        Rows are FP32 [N, dim], INT8 [N, dim], or UINT8 [N, dim / 8 rounded up] for binary.

        Raises:
            InputError: no such form, or none that the bundle gives.
        """
        length = get_number(parameters, DIM)
        dtype = parameters.get(ROW_TYPE, "float32")
        if length is None and dtype == "float32":
            return embeddings
        length = self._encoder.spec.dim if length is None else length
        if length != int(length):
            raise InputError(f"{DIM} is {length:g}: ask for a whole number of dimensions")
        try:
            form = Form(int(length), dtype)  # type: ignore[arg-type]  # it checks
            if form == Form(self._encoder.spec.dim, "float32"):
                return embeddings
            return self._encoder.reducer(form.length, form.dtype).rows(embeddings)
        except (BundleError, ValueError) as error:
            raise InputError(str(error)) from None


class ImageModel(_BundleModel):
    """Image files: `images` BYTES [N], JPEG, PNG or WebP as they are -> `image_embeds`."""

    inputs = (_IMAGES,)

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__(encoder, name)
        self.outputs = (self._embeddings(OUTPUT_NAMES["image"]),)

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Embed image files."""
        found = self._encoder.encode_image(inputs["images"].tolist())
        return {OUTPUT_NAMES["image"]: self._formed(found, parameters)}


class PixelModel(_BundleModel):
    """Resized pictures: `pixels` UINT8 [N, size, size, 3], RGB -> `image_embeds`."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__(encoder, name)
        size = encoder.spec.image.size
        self.inputs = (TensorSpec(name="pixels", datatype="UINT8", shape=(-1, size, size, 3)),)
        self.outputs = (self._embeddings(OUTPUT_NAMES["image"]),)

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Embed pixels."""
        found = self._encoder.encode_pixels(inputs["pixels"])
        return {OUTPUT_NAMES["image"]: self._formed(found, parameters)}


class TextModel(_BundleModel):
    """Texts: `texts` BYTES [N], UTF-8 -> `text_embeds`; parameter `truncate`."""

    inputs = (TensorSpec(name="texts", datatype=BYTES, shape=(-1,)),)

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__(encoder, name)
        self.outputs = (self._embeddings(OUTPUT_NAMES["text"]),)

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Embed texts."""
        try:
            texts = [text.decode() for text in inputs["texts"]]
        except UnicodeDecodeError as error:
            raise InputError(f"a text is not UTF-8: {error}") from None
        truncate = get_flag(parameters, TRUNCATE, False)
        found = self._encoder.encode_text(texts, truncate=truncate)
        return {OUTPUT_NAMES["text"]: self._formed(found, parameters)}


class PatchModel(_BundleModel):
    """Image files: `images` BYTES [N] -> `patch_features` FP32 [N, rows, columns, width]."""

    inputs = (_IMAGES,)
    outputs = (TensorSpec(name=PATCH_OUTPUT, datatype="FP32", shape=(-1, -1, -1, -1)),)

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Compute the features of each patch."""
        return {PATCH_OUTPUT: self._encoder.encode_patches(inputs["images"].tolist())}


class LabelModel(_BundleModel):
    """Labels for `image_embeds` FP32 [N, dim]: `label` BYTES and `score` FP32, both [N, top].

    The best come first. Parameter `top`, by default 5, at most all labels.
    """

    outputs = (
        TensorSpec(name="label", datatype=BYTES, shape=(-1, -1)),
        TensorSpec(name="score", datatype="FP32", shape=(-1, -1)),
    )

    def __init__(self, encoder: Encoder, name: str, labels: LabelSet) -> None:
        super().__init__(encoder, name)
        self.inputs = (self._embeddings(OUTPUT_NAMES["image"]),)
        self._labels = labels

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Return the best labels of image embeddings."""
        top = take_top(parameters, _TOP, len(self._labels.names))
        embeddings = inputs[OUTPUT_NAMES["image"]]
        rows = self._encoder.classify_embeddings(embeddings, self._labels, top=top)
        labels = [[answer.label.encode() for answer in row] for row in rows]
        scores = [[answer.score for answer in row] for row in rows]
        return {"label": np.array(labels, object), "score": np.array(scores, np.float32)}


class CutTail:
    """The part of a tower after a cut, as a model of the server.

    Its inputs are the result of `codec.encode`. The parameter `codec` names the codec; `cut` and
    `space_id`, if given, must be those of the tail.

    Args:
        cuts: the cut set.
        number: number of the cut point.
        device: the server's device profile.
        bundle: name of the bundle on the server; by default its own name.

    Attributes:
        name: the bundle's name, then `-tail-` and the number of the cut.
        inputs: empty, since they depend on the codec; `run` checks them.
        outputs: `image_embeds`, float32 [N, dim].
        space: fingerprint of the embedding space.
        point: the cut point.

    Raises:
        CutSetError, InputError, EngineError, MissingExtraError: see `CutHead`.
    """

    inputs: tuple[TensorSpec, ...] = ()

    def __init__(
        self, cuts: CutSet, number: int, device: DeviceProfile, bundle: str | None = None
    ) -> None:
        self.point = cuts.point(number)
        self.name = tail_model_name(bundle or cuts.manifest.bundle, number)
        self.space: str | None = cuts.manifest.space
        self._output = OUTPUT_NAMES[cuts.tower]
        dim = cuts.manifest.dim
        self.outputs = (TensorSpec(name=self._output, datatype="FP32", shape=(-1, dim)),)
        self._cuts = cuts
        self._most = device.batch_max
        self._engine = open_cut_graph(cuts, tail_file_name(number), device)

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> Outputs:
        """Decode the values at the cut and embed them.

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
            InputError: values so unlike those of any picture that the output is not normalised.
            EngineError: the engine failed.
        """
        found = run_cut_graph(
            self._cuts, self._engine, values, self._most, at_cut=self.point.number > 0
        )
        embeddings: NDArray[np.float32] = found[self._output]
        try:
            check_unit_rows(embeddings, "the embedding of the cut tensor")
        except InputError as error:
            raise InputError(f"these values are not those of a picture: {error}") from None
        return embeddings

    def _check(self, parameters: Mapping[str, Parameter]) -> None:
        space = parameters.get(SPACE_ID)
        if space is not None:
            check_space(str(self.space), str(space), "the request")
        cut = parameters.get(CUT)
        if cut is not None and str(cut) != str(self.point.number):
            raise InputError(f"{self.name} continues from cut {self.point.number}, not {cut!r}")


def tail_models(
    cuts: CutSet, device: DeviceProfile, bundle: str | None = None
) -> Iterator[CutTail]:
    """Yield all tails of a cut set, each loaded and run once.

    Raises:
        CutSetError, InputError, EngineError, MissingExtraError: see `CutHead`.
    """
    size = cuts.manifest.image.size
    pixels = np.zeros((1, size, size, 3), np.uint8)
    for point in cuts.manifest.points:
        tail = CutTail(cuts, point.number, device, bundle)
        tail.embed(CutHead(cuts, point.number, device).run(pixels))
        yield tail
