"""Open a bundle: check its manifest, paths and hashes before any of its files is used."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    read_npz,
    sha256_file,
    write_npz,
)
from edgeclip.runtime.bundle.index import LabelSet, text_tuple
from edgeclip.runtime.bundle.manifest import Manifest
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Basis, Form, Reducer
from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.spec import Precision, Tower

_log = logging.getLogger(__name__)
_GOLDEN_KIND = "edgeclip-golden-2"
# An ONNX graph can refer to data files beside it, so these folders may hold declared files only.
# Other files (README.md, .gitattributes) are never opened and may stay.
_CLOSED_FOLDERS = ("onnx", "engines", "labels")
# What file managers leave in a folder that was looked at.
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
_MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle, whose declared files were all present, complete and unmodified.

    Attributes:
        path: the directory, with symbolic links to it resolved, so that an update which
            moves a link does not mix two bundles.
        manifest: the content of `edgeclip.json`.
        check_hashes: whether a file's SHA-256 is checked again when it is loaded.
    """

    path: Path
    manifest: Manifest
    check_hashes: bool = True

    @classmethod
    def open(cls, path: str | Path, *, check_hashes: bool = True) -> "Bundle":
        """Check a bundle and open it; only its manifest is loaded.

        Refused are a missing or unreadable manifest, another schema version, unsafe paths,
        symbolic links inside (but those of a cache of the Hugging Face Hub, whose files all
        lie in its folder `blobs`), files that are missing, of another size or (with
        `check_hashes`) of another SHA-256, undeclared files under `onnx/`, `engines/` and
        `labels/`, and gates recorded as failed.

        Raises:
            BundleError: the first of these, and how to fix it.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleError(f"{root} is not a directory: give the path of a bundle")
        root = root.resolve()
        manifest = Manifest.from_json(_read_manifest(root), source=str(root / MANIFEST_NAME))
        failed = [
            f"{what}: {gate.name}"
            for what, gate in manifest.all_gates()
            if gate.outcome == "failed"
        ]
        if failed:
            raise BundleError(
                f"{root} records gates as failed ({', '.join(failed)}): export a bundle that passes"
            )
        start = time.perf_counter()
        _check_tree(root, declared={file.path for file in manifest.files})
        for file in manifest.files:
            _check_file(root, file.path, file.bytes, file.sha256 if check_hashes else None)
        seconds = time.perf_counter() - start
        _log.debug("%s: %d files checked in %.2f s", root, len(manifest.files), seconds)
        return cls(root, manifest, check_hashes)

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest, which holds those of all other files: the bundle's identity."""
        return sha256_file(self.path / MANIFEST_NAME)

    def tower_path(self, tower: Tower, precision: Precision | None = None) -> Path:
        """Return the path of a tower's ONNX file, by default in its chosen precision.

        Raises:
            BundleError: the bundle does not hold that precision.
        """
        return self.path / self.manifest.tower(tower).file(precision).path

    def tower_bytes(self, tower: Tower, precision: Precision | None = None) -> bytes:
        """Read a tower's ONNX file and verify its hash; hash the weights' file too, if it has one.

        Raises:
            BundleError: the bundle does not hold that precision, or the file cannot be read or
                (with `check_hashes`) was altered since the bundle was opened.
        """
        file = self.manifest.tower(tower).file(precision)
        if file.data_path is not None:
            self.check_file(file.data_path)
        return self.file_bytes(file.path)

    def check_file(self, name: str) -> None:
        """Verify the hash of a declared file again, without loading it into memory.

        Raises:
            BundleError: with `check_hashes`, it was altered since the bundle was opened.
        """
        if self.check_hashes and sha256_file(self.path / name) != self._sha256(name):
            raise BundleError(_altered(self.path, name))

    def _sha256(self, name: str) -> str:
        return next(file.sha256 for file in self.manifest.files if file.path == name)

    def file_bytes(self, name: str) -> bytes:
        """Read a declared file and verify the hash of the bytes that are returned.

        Raises:
            BundleError: it cannot be read or (with `check_hashes`) was altered since the
                bundle was opened.
        """
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {self.path / name}: {error.strerror}") from None
        if self.check_hashes and hashlib.sha256(content).hexdigest() != self._sha256(name):
            raise BundleError(_altered(self.path, name))
        return content

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json of the package `tokenizers`."""
        return self.path / TOKENIZER_NAME

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the label sets in the bundle."""
        names = (file.path for file in self.manifest.files)
        return tuple(
            name.removeprefix("labels/").removesuffix(".npz")
            for name in names
            if name.startswith("labels/") and name.endswith(".npz")
        )

    def labels(self, name: str) -> LabelSet:
        """Load a label set by its name.

        Raises:
            BundleError: the bundle has no such label set.
            SpaceMismatchError: it was made in another embedding space.
        """
        if name not in self.label_names:
            has = ", ".join(self.label_names) or "none"
            raise BundleError(f"{self.path} has no label set {name!r}; it has {has}")
        labels = LabelSet.load(self.path / "labels" / f"{name}.npz")
        labels.check_space(self.manifest.space)
        return labels

    def reducer(self, form: Form) -> Reducer:
        """Load what reduces embeddings to a form that the bundle gives.

        Raises:
            BundleError: it gives no such form, or its basis does not fit it.
        """
        forms = [item.form for item in self.manifest.reduced]
        if form not in forms:
            has = ", ".join(map(str, forms)) or "no others than full float32 ones"
            raise BundleError(f"{self.path} gives no embeddings of {form}; it gives {has}")
        self.check_file(BASIS_NAME)
        try:
            basis = Basis.load(self.path / BASIS_NAME)
            reducer = basis.reducer(form)
        except InputError as error:
            raise BundleError(str(error)) from error
        if basis.space != self.manifest.space or reducer.dim != self.manifest.spec.dim:
            raise BundleError(f"{self.path}: {BASIS_NAME} is of another embedding space")
        return reducer

    def golden(self) -> "Golden":
        """Load the inputs and expected embeddings that `edgeclip verify` compares with.

        Raises:
            BundleError: they do not fit this bundle's input contract.
        """
        return Golden.load(self.path / GOLDEN_NAME, self.manifest)


def _read_manifest(root: Path) -> str:
    path = root / MANIFEST_NAME
    if path.is_symlink() and not _is_cached_blob(root, path):
        raise BundleError(f"{path} is a symbolic link: copy the bundle with its links followed")
    if not path.is_file():
        raise BundleError(f"{root} holds no {MANIFEST_NAME}: it is no bundle, or copied in part")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is too large to be a manifest: write the bundle again")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path} ({error}): copy the bundle again") from None


def _check_tree(root: Path, *, declared: set[str]) -> None:
    """Refuse symbolic links anywhere, and undeclared files in the folders that are loaded from."""
    for entry in _walk(root):
        path = Path(entry.path).relative_to(root).as_posix()
        if entry.is_symlink() and not _is_cached_blob(root, Path(entry.path)):
            raise BundleError(
                f"{root}: {path} is a symbolic link: copy the bundle with its links followed"
            )
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder or path.split("/")[0] not in _CLOSED_FOLDERS or path in declared:
            continue
        if entry.name not in _LITTER and not entry.name.startswith("._"):
            raise BundleError(f"{root}: {path} is not declared in {MANIFEST_NAME}: remove it")


def _is_cached_blob(root: Path, link: Path) -> bool:
    """Tell whether a link is that of a snapshot in a hub cache to a file of the same repository.

    `models--NAME/snapshots/REVISION/FILE` is a link to `models--NAME/blobs/HASH`
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
    """
    repository = root.parent.parent
    if root.parent.name != "snapshots":
        return False
    target = link.resolve()
    return target.parent == repository / "blobs" and target.is_file()


def _walk(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BundleError(f"cannot read {folder}: {error.strerror}") from None
    for entry in found:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)


def _check_file(root: Path, path: str, size: int, sha256: str | None) -> None:
    file = root / path
    if not file.is_file():
        raise BundleError(f"{root}: {path} is missing: copy the bundle again")
    try:
        found = file.stat().st_size
        if found != size:
            raise BundleError(
                f"{root}: {path} has {found} bytes instead of {size}: copy the bundle again"
            )
        if sha256 is not None and sha256_file(file) != sha256:
            raise BundleError(_altered(root, path))
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from None


def _altered(root: Path, path: str) -> str:
    return f"{root}: {path} was altered (its SHA-256 differs): copy the bundle again"


@dataclass(frozen=True, slots=True)
class Expected:
    """Embeddings of the golden inputs by one tower in one precision, float32 [N, dim]."""

    tower: Tower
    precision: Precision
    embeddings: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A few inputs and their embeddings, recorded when the bundle was written.

    Attributes:
        pixels: uint8 [N, size, size, 3], RGB, resized and cropped.
        texts: M texts, which the bundle's tokenizer must turn into `input_ids`; none if the
            bundle has no text tower.
        input_ids: int64 [M, length].
        expected: one entry for each tower and precision of the bundle.
    """

    pixels: NDArray[np.uint8]
    texts: tuple[str, ...]
    input_ids: NDArray[np.int64]
    expected: tuple[Expected, ...]

    def inputs(self, tower: Tower) -> NDArray[Any]:
        """Return the input of a tower: `pixels` or `input_ids`."""
        return self.pixels if tower == "image" else self.input_ids

    def save(self, path: Path) -> None:
        """Write `golden.npz`, atomically."""
        arrays: dict[str, NDArray[Any]] = {
            "pixels": self.pixels,
            "input_ids": self.input_ids,
        }
        for item in self.expected:
            arrays[f"{item.tower}_{item.precision}"] = item.embeddings
        write_npz(path, _GOLDEN_KIND, {"texts": self.texts}, arrays)

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
            meta, arrays = read_npz(path, _GOLDEN_KIND, frozenset({"texts"}), keys)
            texts = text_tuple(meta["texts"])
        except InputError as error:
            raise BundleError(str(error)) from error
        golden = cls(
            pixels=arrays["pixels"],
            texts=texts,
            input_ids=arrays["input_ids"],
            expected=tuple(Expected(t, p, arrays[f"{t}_{p}"]) for t, p in wanted),
        )
        mistake = _golden_mistake(golden, manifest)
        if mistake:
            raise BundleError(f"{path}: {mistake}: export the bundle again")
        return golden


def _golden_mistake(golden: Golden, manifest: Manifest) -> str | None:
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
