"""Golden inputs of a bundle and the embeddings they must give: `golden.npz`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.embeddings import text_tuple
from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.manifest import Manifest
from edgeclip.runtime.npz import read_npz, write_npz
from edgeclip.runtime.spec import Precision, Tower

FloatArray = NDArray[np.float32]
_KIND = "edgeclip-golden-2"


@dataclass(frozen=True, slots=True)
class Expected:
    """What one tower in one precision gave for the golden inputs, float32 [N, dim]."""

    tower: Tower
    precision: Precision
    embeddings: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A few inputs and their embeddings, made when the bundle was written.

    Attributes:
        pixels: uint8 [N, size, size, 3], RGB, resized and cut.
        texts: M texts; the bundle's tokenizer must turn them into `input_ids`. There are none
            where the bundle has no text tower.
        input_ids: int64 [M, length].
        expected: one entry for each tower and precision of the bundle.
    """

    pixels: NDArray[np.uint8]
    texts: tuple[str, ...]
    input_ids: NDArray[np.int64]
    expected: tuple[Expected, ...]

    def inputs(self, tower: Tower) -> NDArray[Any]:
        """What a tower is given: `pixels` or `input_ids`."""
        return self.pixels if tower == "image" else self.input_ids

    def save(self, path: Path) -> None:
        """Write `golden.npz`, whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {
            "pixels": self.pixels,
            "input_ids": self.input_ids,
        }
        for item in self.expected:
            arrays[f"{item.tower}_{item.precision}"] = item.embeddings
        write_npz(path, _KIND, {"texts": self.texts}, arrays)

    @classmethod
    def load(cls, path: Path, manifest: Manifest) -> "Golden":
        """Read `golden.npz` and check that it fits the manifest.

        Raises:
            BundleError: damaged, or made for another input contract or other precisions.
        """
        wanted = [(item.tower, file.precision) for item in manifest.towers for file in item.files]
        names = {f"{tower}_{precision}" for tower, precision in wanted}
        keys = frozenset({"pixels", "input_ids", *names})
        try:
            meta, arrays = read_npz(path, _KIND, frozenset({"texts"}), keys)
            texts = text_tuple(meta["texts"])
        except InputError as error:
            raise BundleError(str(error)) from error
        golden = cls(
            pixels=arrays["pixels"],
            texts=texts,
            input_ids=arrays["input_ids"],
            expected=tuple(Expected(t, p, arrays[f"{t}_{p}"]) for t, p in wanted),
        )
        mistake = _mistake(golden, manifest)
        if mistake:
            raise BundleError(f"{path}: {mistake}: export the bundle anew")
        return golden


def _mistake(golden: Golden, manifest: Manifest) -> str | None:
    spec, pixels, ids = manifest.spec, golden.pixels, golden.input_ids
    size, length = spec.image.size, spec.text.context_length
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3) or not len(pixels):
        return f"pixels must be uint8 [N, {size}, {size}, 3]"
    if ids.dtype != np.int64 or ids.ndim != 2 or not 0 < ids.shape[1] <= length:
        return f"input_ids must be int64 [M, at most {length}]"
    if len(ids) != len(golden.texts) or (manifest.has("text") and not len(ids)):
        return "there must be as many texts as rows of input_ids, and at least one"
    for item in golden.expected:
        count = len(pixels if item.tower == "image" else ids)
        if item.embeddings.dtype != np.float32 or item.embeddings.shape != (count, spec.dim):
            return f"{item.tower}_{item.precision} must be float32 [{count}, {spec.dim}]"
        if not np.isfinite(item.embeddings).all():
            return f"{item.tower}_{item.precision} holds values that are not finite"
    return None
