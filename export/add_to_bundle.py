"""Add a file to a bundle that exists, which is whole and sound at every moment of it."""

import hashlib
from dataclasses import replace

from edgeclip.export.errors import ExportError
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.bundle_paths import MANIFEST_NAME, check_path
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.manifest import FileRecord, Manifest

# A file that is not declared yet may lie anywhere but here, see `Bundle.open`.
_CLOSED_FOLDERS = ("onnx", "engines", "labels")


def add_to_bundle(bundle: Bundle, path: str, content: bytes) -> Bundle:
    """Write a file into a bundle, or replace it, and open the bundle again.

    The manifest drops the file, the file is replaced, the manifest takes it up: each is one
    rename, and after each the bundle can be opened. A run that was killed in between leaves it
    without the file. Weights are not copied.

    Args:
        bundle: an opened bundle.
        path: of the file inside it, not among towers, engines and labels.
        content: its bytes.

    Raises:
        ExportError: the path is not one for an added file, or the bundle was changed since it
            was opened.
        InputError: the file cannot be written.
        BundleError: the bundle that came of it is not sound.
    """
    try:
        check_path(path)
        others = replace(bundle.manifest, files=_without(bundle.manifest, path))
    except ValueError as error:
        raise ExportError(f"{path} cannot be added to a bundle: {error}") from None
    if path.split("/")[0] in _CLOSED_FOLDERS:
        raise ExportError(f"{path} lies among towers, engines or labels: export them instead")
    _refuse_changed(bundle)
    if others != bundle.manifest:
        _write_manifest(bundle, others)
    with atomic_file(bundle.path / path) as temporary:
        temporary.write_bytes(content)
    record = FileRecord(path, len(content), hashlib.sha256(content).hexdigest())
    files = tuple(sorted((*others.files, record), key=lambda file: file.path))
    _write_manifest(bundle, replace(others, files=files))
    return Bundle.open(bundle.path)


def _without(manifest: Manifest, path: str) -> tuple[FileRecord, ...]:
    return tuple(file for file in manifest.files if file.path != path)


def _refuse_changed(bundle: Bundle) -> None:
    now = Bundle.open(bundle.path, check_hashes=False).manifest
    if now != bundle.manifest:
        raise ExportError(f"{bundle.path} was changed meanwhile: try again")


def _write_manifest(bundle: Bundle, manifest: Manifest) -> None:
    with atomic_file(bundle.path / MANIFEST_NAME) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
