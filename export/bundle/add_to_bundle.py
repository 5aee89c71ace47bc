"""List a bundle's files with their hashes; add a file to a bundle that exists."""

import hashlib
from dataclasses import replace
from pathlib import Path

from edgeclip.export.errors import ExportError
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, atomic_file, check_path, sha256_file
from edgeclip.runtime.bundle.manifest import FileRecord, Manifest


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Return path, size and hash of every file in a folder and its subfolders, sorted."""
    return tuple(
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


# `Bundle.open` refuses undeclared files in these folders, so a file is never added there.
_CLOSED_FOLDERS = ("onnx", "engines", "labels")


def add_to_bundle(bundle: Bundle, path: str, content: bytes) -> Bundle:
    """Write a file into a bundle, or replace it, and open the bundle again.

    Three atomic steps: the manifest drops the file, the file is replaced, the manifest lists it
    again. The bundle can be opened after each, and a killed run leaves it without the file. Weights
    are not copied.

    Args:
        bundle: an opened bundle.
        path: path of the file inside the bundle, not among towers, engines and labels.
        content: the bytes of the file.

    Raises:
        ExportError: the path is not one for an added file, or the bundle was changed since it
            was opened.
        InputError: the file cannot be written.
        BundleError: the resulting bundle is not valid.
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
