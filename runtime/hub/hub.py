"""Access to the Hugging Face Hub: repositories, pulling a bundle, and errors as clear lines."""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, atomic_directory, check_target
from edgeclip.runtime.bundle.manifest import FileRecord, Manifest
from edgeclip.runtime.errors import BundleError, EdgeClipError, InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class HubError(EdgeClipError):
    """The Hub cannot be reached, refuses, or holds something else than was asked for."""


@contextmanager
def hub_errors(doing: str, *, endpoint: str, secret: str | None = None) -> Iterator[None]:
    """Turn every error of `huggingface_hub` inside the block into one line without a token.

    Args:
        doing: what the block does, such as "pull user/name", for the message.
        endpoint: address of the Hub, for the message.
        secret: a token that must not appear in any message.

    Raises:
        HubError: the Hub cannot be reached, or its answer was an error.
        InputError: a local file cannot be read or written.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are the errors of the HTTP client, which differs between releases.
    client: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    known: tuple[type[Exception], ...] = (*client, OSError, ValueError, RuntimeError)
    try:
        yield
    except EdgeClipError:
        raise
    except known as error:
        kind, message = _explain(error, doing, endpoint)
        # Not chained: the errors behind it may hold the token.
        raise kind(hide_tokens(message, secret)) from None


def hide_tokens(text: str, secret: str | None = None) -> str:
    """Return `text` with `secret`, and all that looks like a token of the Hub, put out of sight."""
    if secret:
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _explain(error: Exception, doing: str, endpoint: str) -> tuple[type[EdgeClipError], str]:
    """The kind and text of the error to raise; what lies behind an error says more than it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    chain = _chain(error)
    if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
        return HubError, f"cannot {doing}: HF_HUB_OFFLINE is set; unset it"
    for item in chain:
        if isinstance(item, HfHubHTTPError):
            return HubError, f"cannot {doing}: {_answer(item)}"
    network = tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    if isinstance(chain[0], LocalEntryNotFoundError) or any(
        isinstance(item, (*network, ConnectionError, TimeoutError)) for item in chain
    ):
        reason = first_line(chain[-1])
        return HubError, (
            f"cannot {doing}: {endpoint} does not answer ({reason}); check the connection and run "
            "it again, what was transferred whole is not sent twice"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return InputError, f"cannot {doing}: {where}{error.strerror}"
    if "Consistency check failed" in str(error):
        return HubError, f"cannot {doing}: it arrived cut short; run it again"
    return HubError, f"cannot {doing}: {' '.join(str(error).split()) or type(error).__name__}"


def _chain(error: Exception) -> list[Exception]:
    """The error and those that caused it, the outermost first."""
    chain = [error]
    while isinstance(cause := chain[-1].__cause__, Exception) and cause not in chain:
        chain.append(cause)
    return chain


def _answer(error: Exception) -> str:
    """What an answer of the Hub means, and how to mend it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; ask for it on the page of the repository, then {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model repository, or a private one; check the name, or {_LOG_IN}"
    if isinstance(error, errors.EntryNotFoundError):
        return "a file that the repository lists is not there; ask its owner to push it again"
    known = {
        401: f"the Hub asks for a token that it knows (401); {_LOG_IN}",
        403: f"this token may not do it (403); {_LOG_IN} with a token that may write",
        409: "the repository changed meanwhile (409); run it again",
        412: "the repository changed meanwhile (412); run it again",
        429: "too many requests (429); wait some minutes and run it again",
    }
    if status in known:
        return known[status]
    if status >= 500:
        return f"the Hub failed ({status}); run it again later"
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"the Hub answered {status}" + (f": {said}" if said else "")


# As huggingface_hub.utils.validate_repo_id has it, and always with a user.
_NAME = re.compile(r"(?!-|\.)[\w.-]+(?<!-|\.)/(?!-|\.)[\w.-]+(?<!-|\.)", re.ASCII)
_LONGEST_NAME = 96
_MAX_MANIFEST_BYTES = 16 * 2**20
_TIMEOUT = 30.0  # seconds for an answer about a repository; without it, a silent Hub hangs us
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as a repository lists it; None for what the Hub does not say."""

    path: str
    bytes: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class RemoteRepo:
    """A model repository at one commit."""

    repo: str
    commit: str
    private: bool
    files: tuple[RemoteFile, ...]

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all files."""
        return frozenset(file.path for file in self.files)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A bundle that was pulled, and the commit it was at."""

    bundle: Bundle
    commit: str


@contextmanager
def progress_on_terminals() -> Iterator[None]:
    """Let `huggingface_hub` draw its progress bars only where stderr is a terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    settled = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # by the user
    if settled or are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def open_hub(endpoint: str | None = None) -> tuple["HfApi", str | None]:
    """Return the client of the Hub, and the token it sends, if there is one.

    Args:
        endpoint: address of the Hub; by default that of `HF_ENDPOINT`, or huggingface.co.

    Raises:
        HubError: the token cannot be had.
    """
    from huggingface_hub import HfApi, constants, get_token

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    with hub_errors("find a token", endpoint=endpoint):
        token = get_token()
        # False, not None: the client would look for a token itself, and fail another way.
        return HfApi(endpoint=endpoint, token=token or False, library_name="edgeclip"), token


def check_repo_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        InputError: not of the form USER/NAME.
    """
    whole = len(repo) <= _LONGEST_NAME and _NAME.fullmatch(repo)
    if not whole or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise InputError(
            f"{repo!r} is no repository: give USER/NAME, of letters, digits and single - _ or ."
        )


def look_at(api: "HfApi", repo: str, revision: str | None) -> RemoteRepo:
    """Ask the Hub which files a model repository holds; call it inside `hub_errors`."""
    info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    files = (
        RemoteFile(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None)
        for item in info.siblings or ()
    )
    return RemoteRepo(repo, info.sha or revision or "main", bool(info.private), tuple(files))


def pull(
    repo: str,
    out: Path,
    *,
    revision: str | None = None,
    replace: bool = False,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Pulled:
    """Download a bundle; `out` holds all of it, verified, or does not come into being.

    All files are of one commit. Only those that the manifest declares are downloaded. Whole
    files stay in the cache of `huggingface_hub`, so a pull that broke goes on from there.

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
    api, token = open_hub(endpoint)
    with hub_errors(f"pull {repo}", endpoint=api.endpoint, secret=token):
        remote = look_at(api, repo, revision)
    source = _Source(api, remote, cache, token)
    manifest = source.manifest()
    _check_listing(manifest, remote)
    _check_room(manifest.files, out, source)
    with progress_on_terminals(), atomic_directory(out, replace=replace) as folder:
        for file in manifest.files:
            source.fetch(file, folder / file.path)
        (folder / MANIFEST_NAME).write_bytes(source.download(MANIFEST_NAME).read_bytes())
        try:
            Bundle.open(folder)
        except BundleError as error:
            raise BundleError(str(error).replace(str(folder.resolve()), repo)) from None
    return Pulled(Bundle.open(out, check_hashes=False), remote.commit)


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of one repository at one commit, through the cache of `huggingface_hub`."""

    api: "HfApi"
    remote: RemoteRepo
    cache: Path | None
    token: str | None

    def download(self, path: str, *, again: bool = False) -> Path:
        """Return where a file lies in the cache, after downloading it if it is not there."""
        what = f"pull {self.remote.repo}, file {path}"
        with hub_errors(what, endpoint=self.api.endpoint, secret=self.token):
            found: str = self.api.hf_hub_download(
                self.remote.repo,
                path,
                revision=self.remote.commit,
                cache_dir=self.cache,
                force_download=again,
            )
        return Path(found)

    def is_cached(self, path: str) -> bool:
        """Tell whether the cache already holds a file."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.remote.repo, path, cache_dir=self.cache, revision=self.remote.commit
        )
        return isinstance(found, str)

    def manifest(self) -> Manifest:
        """Download and read the manifest."""
        repo = self.remote.repo
        listed = next((file for file in self.remote.files if file.path == MANIFEST_NAME), None)
        if listed is None:
            raise BundleError(f"{repo} holds no {MANIFEST_NAME}: it is not an EdgeCLIP bundle")
        if (listed.bytes or 0) > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{repo}: {MANIFEST_NAME} has {listed.bytes} bytes, too many to read")
        try:
            text = self.download(MANIFEST_NAME).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BundleError(f"{repo}: {MANIFEST_NAME} is not UTF-8 text") from None
        return Manifest.from_json(text, source=f"{repo}: {MANIFEST_NAME}")

    def fetch(self, file: FileRecord, target: Path) -> None:
        """Bring one declared file to `target`; a copy gone bad in the cache is replaced once."""
        target.parent.mkdir(parents=True, exist_ok=True)
        cached = self.is_cached(file.path)
        if _copy(self.download(file.path), target) == file.sha256:
            return
        if cached and _copy(self.download(file.path, again=True), target) == file.sha256:
            return
        raise BundleError(
            f"{self.remote.repo}: {file.path} is not what its manifest declares (its SHA-256 "
            "differs): ask its owner to push the bundle again"
        )


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return the SHA-256 of what was copied, reading it once."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


def _check_listing(manifest: Manifest, remote: RemoteRepo) -> None:
    """Refuse a repository that plainly lacks what its manifest declares, before downloading."""
    listed = {file.path: file for file in remote.files}
    for file in manifest.files:
        found = listed.get(file.path)
        if found is None:
            wrong = "is missing there"
        elif found.bytes is not None and found.bytes != file.bytes:
            wrong = f"has {found.bytes} bytes there instead of {file.bytes}"
        elif found.sha256 is not None and found.sha256 != file.sha256:
            wrong = "is not what its manifest declares (its SHA-256 differs)"
        else:
            continue
        raise BundleError(
            f"{remote.repo}: {file.path} {wrong}: ask its owner to push the bundle again"
        )


def _check_room(files: Iterable[FileRecord], out: Path, source: _Source) -> None:
    """Refuse to begin what the disk has no room for: once in the cache, once at `out`."""
    from huggingface_hub import constants

    files = tuple(files)
    cache = _existing(source.cache or Path(constants.HF_HUB_CACHE))
    target = _existing(out.parent)
    at_out = sum(file.bytes for file in files)
    in_cache = sum(file.bytes for file in files if not source.is_cached(file.path))
    needs = {target: at_out, cache: in_cache}
    if cache.stat().st_dev == target.stat().st_dev:
        needs = {target: at_out + in_cache}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{source.remote.repo} needs {needed / 1e6:,.1f} MB in {folder}, where "
                f"{free / 1e6:,.1f} MB are free: make room, or choose another --out or HF_HOME"
            )


def _existing(folder: Path) -> Path:
    """The nearest folder that exists, at or above `folder`."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
