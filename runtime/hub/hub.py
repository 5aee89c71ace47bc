"""Pull a bundle from the Hugging Face Hub; turn what fails there into one line without a token."""

import glob
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from edgeclip.runtime.errors import BundleError, EdgeClipError, InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_TIMEOUT_S = 30.0  # for an answer about a repository; without it, a silent Hub hangs us
_MAX_MANIFEST_BYTES = 16 * 2**20
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class HubError(EdgeClipError):
    """The Hub cannot be reached, refuses, or holds something else than was asked for."""


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


def check_repo_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        InputError: not of the form USER/NAME.
    """
    if not is_repo_name(repo):
        raise InputError(
            f"{repo!r} is no repository: give USER/NAME, of letters, digits and single - _ or ."
        )


def is_repo_name(text: str) -> bool:
    """Tell whether a text is of the form USER/NAME, by the rules of the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def open_hub(endpoint: str | None = None) -> "HfApi":
    """Return a client of the Hub; its `token` is False where the user has none.

    Args:
        endpoint: address of the Hub; by default that of `HF_ENDPOINT`, or huggingface.co.

    Raises:
        HubError: the token cannot be read.
    """
    from huggingface_hub import HfApi, constants, get_token

    api = HfApi((endpoint or constants.ENDPOINT).rstrip("/"), token=False, library_name="edgeclip")
    with hub_errors("find a token", api):
        # Not None: the client would look for a token itself at each call, and fail another way.
        api.token = get_token() or False
    return api


def repository(api: "HfApi", repo: str, revision: str | None) -> "ModelInfo":
    """Ask the Hub for a repository's commit, and for its files with sizes and hashes."""
    return api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)


def progress_on_terminals() -> AbstractContextManager[object]:
    """Let `huggingface_hub` draw its progress bars only where stderr is a terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    by_user = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    return nullcontext() if by_user or sys.stderr.isatty() else disable_progress_bars()


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


@contextmanager
def hub_errors(doing: str, api: "HfApi") -> Iterator[None]:
    """Turn every error of `huggingface_hub` inside the block into one line that shows no token.

    Args:
        doing: what the block does, such as "pull user/name", for the message.
        api: the client, for its address and its token, which no message may show.

    Raises:
        HubError: the Hub cannot be reached, or its answer was an error.
        InputError: a local file cannot be read or written.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the errors of the HTTP client, which differs between releases.
    known: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
    try:
        yield
    except EdgeClipError:
        raise
    except known as error:
        kind, reason = _explain(error, api.endpoint)
        message = hide_tokens(f"cannot {doing}: {reason}", api.token)
        raise kind(message) from None  # not chained: the errors behind it may hold the token


def hide_tokens(text: str, secret: str | bool | None = None) -> str:
    """Replace `secret`, and all that looks like a token of the Hub, by asterisks."""
    if isinstance(secret, str):
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _explain(error: Exception, endpoint: str) -> tuple[type[EdgeClipError], str]:
    """Return the kind of error to raise and its reason, taken from the error or its causes."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception) and cause not in causes:
        causes.append(cause)
    for item in causes:
        if isinstance(item, OfflineModeIsEnabled):
            return HubError, "HF_HUB_OFFLINE is set; unset it"
        if isinstance(item, HfHubHTTPError):
            return HubError, _explain_answer(item)
    client_errors = tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    unreachable = (*client_errors, ConnectionError, TimeoutError)
    if isinstance(error, LocalEntryNotFoundError) or any(
        isinstance(item, unreachable) for item in causes
    ):
        return HubError, (
            f"{endpoint} does not answer ({first_line(causes[-1])}); check the connection and run "
            "it again, what was transferred whole is not sent twice"
        )
    if isinstance(error, OSError) and error.strerror:
        return InputError, (f"{error.filename}: " if error.filename else "") + error.strerror
    # The name may be the end of an address: "(…)4741417/onnx/vision_model.onnx".
    if cut := re.match(r"Consistency check failed[^(]*\((?:\(…\)\w*/)?(.*)\)", str(error)):
        return HubError, f"{cut[1]} arrived cut short; run it again"
    return HubError, " ".join(str(error).split()) or type(error).__name__


def _explain_answer(error: Exception) -> str:
    """Say what an error status of the Hub means, and what to do about it."""
    from huggingface_hub import errors

    kinds: dict[type[Exception], str] = {  # a class stands before those it is derived from
        errors.GatedRepoError: "access is restricted; ask for it on the page of the repository, "
        f"then {_LOG_IN}",
        errors.RevisionNotFoundError: "the repository has no such revision; give a branch, a tag "
        "or a commit",
        errors.RepositoryNotFoundError: "no such model repository, or a private one; check the "
        f"name, or {_LOG_IN}",
        errors.EntryNotFoundError: "a file that the repository lists is not there; ask its owner "
        "to push it again",
    }
    statuses = {
        401: f"the Hub asks for a token that it knows (401); {_LOG_IN}",
        403: f"this token may not do it (403); {_LOG_IN} with a token that may write",
        409: "the repository changed meanwhile (409); run it again",
        412: "the repository changed meanwhile (412); run it again",
        429: "too many requests (429); wait some minutes and run it again",
    }
    for kind, reason in kinds.items():
        if isinstance(error, kind):
            return reason
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in statuses:
        return statuses[status]
    if status >= 500:
        return f"the Hub failed ({status}); run it again later"
    message = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"the Hub answered {status}" + (f": {message}" if message else "")
