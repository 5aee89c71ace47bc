"""The towers and label sets of a bundle as models of the server."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.labels import LabelSet
from edgeclip.runtime.serving.models import Arrays, Model, TensorSpec, take_top
from edgeclip.runtime.spec import OUTPUT_NAMES, PATCH_OUTPUT
from edgeclip.runtime.wire.strict_json import Parameter, get_flag
from edgeclip.runtime.wire.tensors import BYTES

TRUNCATE = "truncate"  # parameter of the text tower, bool: cut texts that are too long
_IMAGES = TensorSpec(name="images", datatype=BYTES, shape=(-1,))
_TOP = 5


def bundle_models(encoder: Encoder, name: str) -> Iterator[Model]:
    """All models of a bundle, its towers loaded.

    Args:
        encoder: of the bundle.
        name: what their names begin with.

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
    """What the models of a bundle have in common."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, encoder: Encoder, name: str) -> None:
        self.name = name
        self.space: str | None = encoder.space
        self._encoder = encoder

    def _embeddings(self, name: str) -> TensorSpec:
        return TensorSpec(name=name, datatype="FP32", shape=(-1, self._encoder.spec.dim))


class ImageModel(_BundleModel):
    """Image files: `images` BYTES [N], JPEG, PNG or WebP as they are -> `image_embeds`."""

    inputs = (_IMAGES,)

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__(encoder, name)
        self.outputs = (self._embeddings(OUTPUT_NAMES["image"]),)

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Embed them; see `Encoder.encode_image`."""
        return {OUTPUT_NAMES["image"]: self._encoder.encode_image(inputs["images"].tolist())}


class PixelModel(_BundleModel):
    """Pictures cut to size: `pixels` UINT8 [N, size, size, 3], RGB -> `image_embeds`."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__(encoder, name)
        size = encoder.spec.image.size
        self.inputs = (TensorSpec(name="pixels", datatype="UINT8", shape=(-1, size, size, 3)),)
        self.outputs = (self._embeddings(OUTPUT_NAMES["image"]),)

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Embed them; see `Encoder.encode_pixels`."""
        return {OUTPUT_NAMES["image"]: self._encoder.encode_pixels(inputs["pixels"])}


class TextModel(_BundleModel):
    """Texts: `texts` BYTES [N], UTF-8 -> `text_embeds`; parameter `truncate`."""

    inputs = (TensorSpec(name="texts", datatype=BYTES, shape=(-1,)),)

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__(encoder, name)
        self.outputs = (self._embeddings(OUTPUT_NAMES["text"]),)

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Embed them; see `Encoder.encode_text`."""
        try:
            texts = [text.decode() for text in inputs["texts"]]
        except UnicodeDecodeError as error:
            raise InputError(f"a text is not UTF-8: {error}") from None
        truncate = get_flag(parameters, TRUNCATE, False)
        return {OUTPUT_NAMES["text"]: self._encoder.encode_text(texts, truncate=truncate)}


class PatchModel(_BundleModel):
    """Image files: `images` BYTES [N] -> `patch_features` FP32 [N, rows, columns, width]."""

    inputs = (_IMAGES,)
    outputs = (TensorSpec(name=PATCH_OUTPUT, datatype="FP32", shape=(-1, -1, -1, -1)),)

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Look at them; see `Encoder.encode_patches`."""
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

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Classify them; see `Encoder.classify_embeddings`."""
        top = take_top(parameters, _TOP, len(self._labels.names))
        embeddings = inputs[OUTPUT_NAMES["image"]]
        rows = self._encoder.classify_embeddings(embeddings, self._labels, top=top)
        labels = [[answer.label.encode() for answer in row] for row in rows]
        scores = [[answer.score for answer in row] for row in rows]
        return {"label": np.array(labels, object), "score": np.array(scores, np.float32)}
