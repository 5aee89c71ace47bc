"""Pull a bundle from the Hugging Face Hub: all of it, verified, or nothing."""

import glob
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import (
    MANIFEST_NAME,
    atomic_directory,
    check_target,
    sha256_file,
)
from edgeclip.runtime.bundle.manifest import FileRecord, Manifest
from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.hub.hub_client import (
    check_repo_name,
    hub_errors,
    open_hub,
    progress_on_terminals,
    repository,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class PulledBundle:
    """A bundle that was pulled, and the commit that it is a copy of."""

    bundle: Bundle
    commit: str


def pull(
    repo: str,
    out: Path,
    *,
    revision: str | None = None,
    replace: bool = False,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> PulledBundle:
    """Download a bundle; `out` holds all of it, verified, or does not come into being.

    All files are of one commit. Only those that the manifest declares are downloaded. Files that
    arrived stay in the cache of `huggingface_hub`, so a pull that broke goes on from there.

    Args:
        repo: USER/NAME of a model repository.
        out: the directory to make.
        revision: branch, tag or commit; by default the main branch.
        replace: allow `out` to exist, if it is a bundle.
        endpoint: address of the Hub; by default that of `HF_ENDPOINT`, or huggingface.co.
        cache: folder for downloaded files; by default that of `huggingface_hub`.

    Raises:
        InputError: a wrong name, `out` may not be written, or the disk has too little room.
        HubError: the Hub cannot be reached, refuses, or has no such repository or revision.
        BundleError: the repository holds no bundle, or not the one that its manifest declares.
    """
    check_repo_name(repo)
    check_target(out, replace=replace, marker=MANIFEST_NAME)
    api = open_hub(endpoint)
    with hub_errors(f"pull {repo}", api), progress_on_terminals():
        info = repository(api, repo, revision)
        manifest = _manifest(api, info, cache)
        _check_listing(manifest, info)
        _check_room(manifest.files, info, out, cache)
        snapshot = _download(api, info, manifest.files, cache)
    with atomic_directory(out, replace=replace) as folder:
        for path in (MANIFEST_NAME, *(file.path for file in manifest.files)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / path, folder / path)
        try:
            Bundle.open(folder)  # checks hashes, paths and gates
        except BundleError as error:
            raise BundleError(str(error).replace(str(folder.resolve()), repo)) from None
    return PulledBundle(Bundle.open(out, check_hashes=False), str(info.sha))


def _manifest(api: "HfApi", info: "ModelInfo", cache: Path | None) -> Manifest:
    """Download and read the manifest."""
    listed = next((file for file in info.siblings or () if file.rfilename == MANIFEST_NAME), None)
    if listed is None:
        raise BundleError(f"{info.id} holds no {MANIFEST_NAME}: it is not an EdgeCLIP bundle")
    if (listed.size or 0) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{info.id}: {MANIFEST_NAME} has {listed.size} bytes, too many to read")
    path = Path(api.hf_hub_download(info.id, MANIFEST_NAME, revision=info.sha, cache_dir=cache))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{info.id}: {MANIFEST_NAME} is not UTF-8 text") from None
    return Manifest.from_json(text, source=f"{info.id}: {MANIFEST_NAME}")


def _check_listing(manifest: Manifest, info: "ModelInfo") -> None:
    """Refuse a repository that plainly lacks what its manifest declares, before downloading."""
    listed = {file.rfilename: file for file in info.siblings or ()}
    for file in manifest.files:
        found = listed.get(file.path)
        if found is None:
            wrong = "is missing there"
        elif found.size is not None and found.size != file.bytes:
            wrong = f"has {found.size} bytes there instead of {file.bytes}"
        elif found.lfs is not None and found.lfs.sha256 != file.sha256:
            wrong = "is not what its manifest declares (its SHA-256 differs)"
        else:
            continue
        raise BundleError(f"{info.id}: {file.path} {wrong}: ask its owner to push the bundle again")


def _check_room(
    files: Sequence[FileRecord], info: "ModelInfo", out: Path, cache: Path | None
) -> None:
    """Refuse to begin what the disk has no room for: once in the cache, once at `out`."""
    from huggingface_hub import constants, try_to_load_from_cache

    in_cache = sum(
        file.bytes
        for file in files
        if not isinstance(
            try_to_load_from_cache(info.id, file.path, cache_dir=cache, revision=info.sha), str
        )
    )
    at_out = sum(file.bytes for file in files)
    cache_disk, out_disk = map(
        _nearest_existing, (cache or Path(constants.HF_HUB_CACHE), out.parent)
    )
    needs = {out_disk: at_out, cache_disk: in_cache}
    if cache_disk.stat().st_dev == out_disk.stat().st_dev:
        needs = {out_disk: at_out + in_cache}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{info.id} needs {needed / 1e6:,.1f} MB in {folder}, where "
                f"{free / 1e6:,.1f} MB are free: make room, or choose another --out or HF_HOME"
            )


def _nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _download(
    api: "HfApi", info: "ModelInfo", files: Sequence[FileRecord], cache: Path | None
) -> Path:
    """Return a folder with the declared files of the commit, each with its declared SHA-256.

    A file whose hash is wrong, such as a copy gone bad in the cache, is downloaded once more.
    """

    def fetch(files: Sequence[FileRecord], *, again: bool) -> Path:
        snapshot: str = api.snapshot_download(
            info.id,
            revision=info.sha,
            cache_dir=cache,
            allow_patterns=[glob.escape(file.path) for file in files],
            force_download=again,
        )
        return Path(snapshot)

    def altered(files: Sequence[FileRecord]) -> list[FileRecord]:
        return [file for file in files if sha256_file(snapshot / file.path) != file.sha256]

    snapshot = fetch(files, again=False)
    if wrong := altered(files):
        fetch(wrong, again=True)
        if wrong := altered(wrong):
            raise BundleError(
                f"{info.id}: {wrong[0].path} is not what its manifest declares (its SHA-256 "
                "differs): ask its owner to push the bundle again"
            )
    return snapshot
