"""Encoder: compute embeddings, labels and search hits of images and texts with one bundle."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray, Outputs
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import TOKENIZER_NAME
from edgeclip.runtime.bundle.index import (
    Hit,
    LabelSet,
    bake_labels,
    check_embeddings,
    embedder_of,
)
from edgeclip.runtime.bundle.reduced_index import AnyIndex
from edgeclip.runtime.bundle.reduction import Form, Reducer, RowType
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import ImageInput, as_image_list
from edgeclip.runtime.inputs.preprocess import crop_ahead
from edgeclip.runtime.spec import (
    LABEL_OUTPUTS,
    OUTPUT_NAMES,
    PATCH_OUTPUT,
    EncoderSpec,
    Precision,
    Tower,
    as_text_list,
)
from edgeclip.runtime.towers.tower_runner import TowerRunner, choose_precision, open_with_fallback

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile
    from edgeclip.runtime.inputs.tokenizer import TextTokenizer
    from edgeclip.runtime.towers.tuning import Tuning

_log = logging.getLogger(__name__)
DEFAULT_TEMPLATES = ("a photo of a {}",)


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and its softmax probability over all labels of the set, 0 to 1."""

    label: str
    score: float


class Encoder:
    """Embed, classify and search images and texts with one bundle on one device.

    A tower is loaded on its first use, so a device that only embeds images never holds the
    text tower in memory (a bundle may have none). An embedding does not depend on the other
    items of its batch.

    Args:
        bundle: an opened bundle.
        device: which engine and precisions may be used, and with how many threads.
        precision: precision of both towers. By default the one the bundle chose for each tower,
            else the first that the device allows; if the engine computes it wrongly on this
            machine, a more exact one (see `open_with_fallback`).
        tuning: what `edgeclip tune` found; a tower that it names runs as it says.

    Attributes:
        precisions: precision of each tower; once a tower is loaded, the precision that runs.
        devices: engine and threads of each tower; once a tower is loaded, those that run.

    Raises:
        BundleError: the bundle holds no precision that the device allows.
        InputError: the device does not allow `precision`.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: "DeviceProfile",
        precision: Precision | None = None,
        tuning: "Tuning | None" = None,
    ) -> None:
        self.bundle = bundle
        self.device = device
        self._is_wanted = precision is not None
        self.precisions: dict[Tower, Precision] = {}
        self.devices: dict[Tower, DeviceProfile] = {}
        for item in bundle.manifest.towers:
            where, wanted = device, precision
            if tuning is not None and (tuned := tuning.of(item.tower)) is not None:
                where, wanted = tuned.device, tuned.precision
                _log.info("tuned %s", tuned)
            self.devices[item.tower] = where
            self.precisions[item.tower] = choose_precision(item, where, wanted)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: "DeviceProfile | str | Path | None" = None,
        precision: Precision | None = None,
        check_hashes: bool = True,
    ) -> "Encoder":
        """Open a bundle and return its encoder.

        Args:
            path: the bundle's directory.
            device: a `DeviceProfile`, the name of a built-in one, or a YAML file. None for what
                `edgeclip tune` found for this bundle, or "this-machine" where it was not run.
            precision: precision of both towers; None for the bundle's and the device's choice.
            check_hashes: False skips the SHA-256 of the files. Use it only if the bundle was
                verified before and cannot have changed since.

        Raises:
            BundleError: the directory is not a complete, unmodified bundle.
            ConfigError: there is no such device.
        """
        from edgeclip.runtime.device.device_profile import (
            THIS_MACHINE,
            DeviceProfile,
            load_device,
        )
        from edgeclip.runtime.towers.tuning import find_tuning

        bundle, tuning = Bundle.open(path, check_hashes=check_hashes), None
        if device is None:
            device = THIS_MACHINE
            tuning = find_tuning(bundle) if precision is None else None
        profile = device if isinstance(device, DeviceProfile) else load_device(device)
        return cls(bundle, profile, precision, tuning)

    @property
    def spec(self) -> EncoderSpec:
        """Input contract and embedding size."""
        return self.bundle.manifest.spec

    @property
    def space(self) -> str:
        """Fingerprint of the embedding space: 64 hexadecimal digits."""
        return self.bundle.manifest.space

    @functools.cached_property
    def _image_tower(self) -> TowerRunner:
        return self._open_tower("image")

    @functools.cached_property
    def _text_tower(self) -> TowerRunner:
        return self._open_tower("text")

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: all but towers and tokenizer, which load on their next use.

        The bundle has to lie at the same path where it is unpickled.
        """
        loaded = {
            name
            for name, value in vars(type(self)).items()
            if isinstance(value, functools.cached_property)
        }
        return {name: value for name, value in vars(self).items() if name not in loaded}

    def _open_tower(self, tower: Tower) -> TowerRunner:
        load = TowerRunner if self._is_wanted else open_with_fallback
        runner = load(self.bundle, tower, self.precisions[tower], self.devices[tower])
        self.precisions[tower], self.devices[tower] = runner.precision, runner.device
        return runner

    def model_of(self, tower: Tower) -> str:
        """Name what embeds: tower, precision, SHA-256 of its files and how input is prepared.

        Loads the tower.

        Raises:
            BundleError, EngineError: the tower cannot be loaded.
        """
        if tower == "text":
            self._check_text_tower()
        runner = self._image_tower if tower == "image" else self._text_tower
        file = self.bundle.manifest.tower(tower).file(runner.precision)
        paths = {file.path, file.data_path, *((TOKENIZER_NAME,) if tower == "text" else ())}
        hashes = [item.sha256 for item in self.bundle.manifest.files if item.path in paths]
        prepared = self.spec.image if tower == "image" else self.spec.text
        rounded = ["bfloat16"] if runner.device.bfloat16 else []
        return " ".join([tower, runner.precision, *rounded, *sorted(hashes), str(prepared)])

    def embedder(self, tower: Tower) -> str:
        """Name what embeds in 64 hexadecimal digits, see `embedder_of`. Loads the tower.

        Raises:
            BundleError, EngineError: the tower cannot be loaded.
            InputError: the bundle was exported without a text tower.
        """
        return embedder_of(self.model_of(tower))

    @functools.cached_property
    def _tokenizer(self) -> "TextTokenizer":
        from edgeclip.runtime.inputs.tokenizer import TextTokenizer

        return TextTokenizer.from_file(self.bundle.tokenizer_path, self.spec.text)

    def reducer(self, length: int | None = None, dtype: RowType = "float32") -> Reducer:
        """Return what reduces embeddings of this space to a form that the bundle gives.

        Args:
            length: how many dimensions; None for all.
            dtype: of a row.

        Raises:
            InputError: no such form can be.
            BundleError: the bundle gives no such form.
        """
        try:
            form = Form(self.spec.dim if length is None else length, dtype)
        except ValueError as error:
            raise InputError(str(error)) from error
        return self._reducers(form)

    @functools.cached_property
    def _reducers(self) -> Callable[[Form], Reducer]:
        return functools.cache(self.bundle.reducer)

    def encode_image(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        batch_size: int = 32,
        dim: int | None = None,
    ) -> FloatArray:
        """Embed one image or several; float32 [N, dim], L2-normalised.

        Args:
            images: paths, bytes of image files, PIL images or arrays (see `load_image`); an
                array of four dimensions is a batch.
            batch_size: how many images are run at a time. As many more are decoded meanwhile, by
                as many threads as the device allows.
            dim: reduce embeddings to a length that the bundle gives; None for full ones.

        Raises:
            InputError: an image that cannot be read.
            BundleError: the bundle does not give `dim`.
            EngineError: the engine failed, or its output is not an embedding.
        """
        name = OUTPUT_NAMES["image"]
        parts = [part[name] for part in self._image_outputs(images, batch_size)]
        return self._cut(self._joined(parts), dim)

    def encode_patches(
        self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32
    ) -> FloatArray:
        """Return the last hidden state of each patch; float32 [N, rows, columns, width].

        They are neither projected into the embedding space nor normalised. Rows and columns
        cover the centre crop of the image (see `crop_batch`).

        Args:
            images: see `encode_image`; at least one.
            batch_size: see `encode_image`.

        Raises:
            InputError: the bundle was exported without patch features, no image, or one that
                cannot be read.
            EngineError: see `encode_image`.
        """
        if not self.bundle.manifest.patch_features:
            raise InputError(
                f"{self.bundle.path} gives no patch features: export it with --patch-features"
            )
        parts = [part[PATCH_OUTPUT] for part in self._image_outputs(images, batch_size)]
        if not parts:
            raise InputError("no images were given: give at least one")
        return np.concatenate(parts)

    def encode_pixels(self, pixels: NDArray[np.uint8], *, batch_size: int = 32) -> FloatArray:
        """Embed images that are already resized and cropped; float32 [N, dim].

        Args:
            pixels: uint8 [N, size, size, 3], RGB, as `crop_batch` returns them.
            batch_size: how many are run at a time.

        Raises:
            InputError: another shape or dtype.
            EngineError: see `encode_image`.
        """
        size = self.spec.image.size
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
            raise InputError(
                f"pixels must be uint8 [N, {size}, {size}, 3], got "
                f"{pixels.dtype} {list(pixels.shape)}"
            )
        return self._joined(
            [self._image_tower.run(part) for _, part in _chunks(pixels, batch_size)]
        )

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        truncate: bool = False,
        batch_size: int = 64,
        dim: int | None = None,
    ) -> FloatArray:
        """Embed one text or several; float32 [N, dim], L2-normalised.

        Args:
            texts: any length up to the text tower's `context_length` in tokens.
            truncate: cut longer ones instead of refusing them.
            batch_size: how many texts are run at a time.
            dim: see `encode_image`.

        Raises:
            InputError: a text that is too long, unless `truncate`, or no text at all (`bytes`,
                None, a number), or the bundle was exported without a text tower.
            EngineError: see `encode_image`.
        """
        self._check_text_tower()
        parts = [
            self._text_tower.run(self._tokenizer.encode(chunk, truncate=truncate, first=start))
            for start, chunk in _chunks(as_text_list(texts), batch_size)
        ]
        return self._cut(self._joined(parts), dim)

    def _cut(self, embeddings: FloatArray, dim: int | None) -> FloatArray:
        if dim in (None, self.spec.dim):
            return embeddings
        reducer = self.reducer(dim)
        return reducer.reduce(embeddings) if len(embeddings) else np.zeros((0, dim), np.float32)

    def _check_text_tower(self) -> None:
        if not self.bundle.manifest.has("text"):
            sets = ", ".join(self.bundle.label_names) or "none"
            raise InputError(
                f"{self.bundle.path} has no text tower, so it cannot embed texts: classify by its "
                f"label sets ({sets}), or export it without --no-text"
            )

    def bake_labels(
        self, names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> LabelSet:
        """Embed label names with this bundle's text tower; see `labels.bake_labels`.

        Raises:
            InputError: no names, a name twice, a template without its one `{}`, or the bundle
                was exported without a text tower.
        """
        return bake_labels(
            names, templates, self.encode_text, self.space, lambda: self.embedder("text")
        )

    def classify(
        self,
        images: ImageInput | Sequence[ImageInput],
        labels: LabelSet | Sequence[str],
        *,
        top: int = 5,
    ) -> list[tuple[LabelScore, ...]]:
        """Return the `top` labels of each image, the most likely first.

        Args:
            images: see `encode_image`.
            labels: a label set of this embedding space, or label names to embed now.
            top: how many labels per image, at most all.

        Raises:
            SpaceMismatchError: the label set was made in another embedding space.
            InputError: no labels, `top` below 1, or an image that cannot be read.
        """
        label_set = labels if isinstance(labels, LabelSet) else self.bake_labels(labels)
        label_set.check_space(self.space)
        return self.classify_embeddings(self.encode_image(images), label_set, top=top)

    def classify_embeddings(
        self, embeddings: FloatArray, labels: LabelSet, *, top: int = 5
    ) -> list[tuple[LabelScore, ...]]:
        """Classify image embeddings that are already computed, float32 [N, dim].

        Raises:
            SpaceMismatchError: see `classify`.
            InputError: `top` below 1, or embeddings of another shape, dtype or length.
        """
        labels.check_space(self.space)
        check_embeddings(embeddings, self.spec.dim, "image embeddings")
        if top < 1:
            raise InputError(f"top is {top}: ask for at least 1 label")
        logits = self.spec.logit_scale * (embeddings @ labels.embeddings.T)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return [
            tuple(LabelScore(labels.names[i], float(row[i])) for i in best)
            for row, best in zip(scores, order, strict=True)
        ]

    def classify_by_head(
        self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32
    ) -> list[LabelScore]:
        """Return the best label of each image, computed by the label head in the image tower.

        Raises:
            InputError: the bundle was exported without a label head, or an image that cannot
                be read.
            EngineError: see `encode_image`.
        """
        head = self.bundle.manifest.label_head
        if head is None:
            raise InputError(
                f"{self.bundle.path} has no label head: export it with --label-head, or classify "
                "with a label set"
            )
        names, (index, score) = self.bundle.labels(head).names, LABEL_OUTPUTS
        return [
            LabelScore(names[int(best)], float(share))
            for part in self._image_outputs(images, batch_size)
            for best, share in zip(part[index], part[score], strict=True)
        ]

    def search(
        self,
        query: ImageInput | Sequence[str] | Sequence[ImageInput],
        index: AnyIndex,
        *,
        top: int = 10,
    ) -> list[tuple[Hit, ...]]:
        """Return the `top` index entries with the highest cosine to each query.

        Args:
            query: one or several. A `str` is a text, so the path of an image must be a
                `Path`. A float array of two dimensions holds embeddings of this space,
                float32 [N, dim] and L2-normalised: a grey image must be uint8 or PIL.
            index: made in this embedding space.
            top: how many hits, at most all entries.

        Raises:
            SpaceMismatchError: the index was made in another embedding space.
            InputError: `top` below 1, texts among images, or a query that cannot be read
                or is a float array of something other than embeddings.
        """
        index.check_space(self.space)
        return list(index.search(self.embed_query(query), top, space=self.space))

    def embed_query(self, query: ImageInput | Sequence[str] | Sequence[ImageInput]) -> FloatArray:
        """Embed what `search` takes as a query; float32 [N, dim], L2-normalised.

        Raises:
            InputError: see `search`.
        """
        if isinstance(query, np.ndarray) and query.ndim == 2 and query.dtype.kind == "f":
            what = "a query of floats (a grey image is given as uint8)"
            check_embeddings(query, self.spec.dim, what)
            return query
        items = [query] if isinstance(query, str) else as_image_list(query)
        texts = [item for item in items if isinstance(item, str)]
        if not items:
            raise InputError("no query was given: give at least one text or image")
        if texts and len(texts) < len(items):
            raise InputError("search for texts or for images, not for both in one call")
        return self.encode_text(texts) if texts else self.encode_image(items)

    def _image_outputs(
        self, images: ImageInput | Sequence[ImageInput], batch_size: int
    ) -> Iterator[Outputs]:
        given = as_image_list(images)
        crops = crop_ahead(given, self.spec.image, threads=self.device.threads, ahead=batch_size)
        for start, chunk in _chunks(given, batch_size):
            pixels = []
            for number, crop in enumerate(itertools.islice(crops, len(chunk)), start=start):
                if isinstance(crop, InputError):
                    raise InputError(f"image {number}: {crop}") from crop
                pixels.append(crop)
            yield self._image_tower.outputs(np.stack(pixels))

    def _joined(self, parts: list[FloatArray]) -> FloatArray:
        return np.concatenate(parts) if parts else np.zeros((0, self.spec.dim), np.float32)


def _chunks(items: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Split a list or array into chunks of at most `size`; yield (index of the first, chunk)."""
    if size < 1:
        raise InputError(f"batch_size is {size}: take at least 1")
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
