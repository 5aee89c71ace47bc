"""Files that exist whole or not at all: hashes, and writing beside the target then renaming."""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeclip.runtime.errors import InputError

# .edgeclip-tmp-PID-TOKEN.NAME is being written, .edgeclip-old-PID-TOKEN.NAME being replaced.
# The name comes last so that the suffix (.npz) survives.
_SIBLING = re.compile(r"\.edgeclip-(tmp|old)-(\d+)-[0-9a-f]{8}\.(.+)", re.DOTALL)
_live: set[str] = set()  # names of the siblings in use by the threads of this process


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a temporary path to write; it becomes `target` when the block ends well.

    An existing file is replaced in one step. On an exception `target` stays as it was.
    A killed writer leaves `.edgeclip-tmp-*` beside it, which the next write removes.

    Raises:
        InputError: the folder of `target` cannot be made, or `target` is a directory.
    """
    _prepare(target)
    if target.is_dir():
        raise InputError(f"{target} is a directory: give the name of a file to write")
    with _sibling(target, "tmp") as temporary:
        try:
            yield temporary
            _fsync(temporary)
            temporary.replace(target)
            _fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(
    target: Path, *, replace: bool = False, marker: str = "edgeclip.json"
) -> Iterator[Path]:
    """Give a temporary directory to fill; it becomes `target` when the block ends well.

    Everything in it is flushed to disk before the rename. On an exception `target` stays
    as it was. A killed writer leaves `.edgeclip-tmp-*` beside it, which the next write to
    the same target removes. A directory cannot be swapped in one portable step: a kill
    between the two renames of a replacement leaves the old one aside as
    `.edgeclip-old-*`, and the next write puts it back before it begins.

    Args:
        target: the directory to make. An empty one may exist.
        replace: allow `target` to exist, if it holds `marker`.
        marker: a file that shows that `target` is of the kind that may be deleted.

    Raises:
        InputError: `target` exists and may not be replaced, or its parent cannot be made.
    """
    _prepare(target)
    check_target(target, replace=replace, marker=marker)
    with _sibling(target, "tmp") as temporary:
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            check_target(target, replace=replace, marker=marker)
            _swap(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, setting an existing directory aside first."""
    with _sibling(target, "old") as old:
        if target.exists():
            target.replace(old)
        try:
            temporary.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path, *, replace: bool, marker: str) -> None:
    """Refuse a directory that `atomic_directory` would refuse; worth asking before long work.

    Raises:
        InputError: see `atomic_directory`.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a directory: choose another name")
    if not target.exists() or not any(target.iterdir()):
        return
    if not replace:
        raise InputError(f"{target} exists: choose another name, or ask to replace it")
    if not (target / marker).is_file():
        raise InputError(
            f"{target} holds no {marker}, so it is not replaced: delete it yourself if you mean to"
        )


@contextmanager
def _sibling(target: Path, kind: str) -> Iterator[Path]:
    """Give a name beside `target` that no thread of this process clears away meanwhile."""
    name = f".edgeclip-{kind}-{os.getpid()}-{secrets.token_hex(4)}.{target.name}"
    _live.add(name)
    try:
        yield target.with_name(name)
    finally:
        _live.discard(name)


def _prepare(target: Path) -> None:
    """Make the parent of `target`, and clear away what killed writers left there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        siblings = list(target.parent.iterdir())
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    for path in siblings:
        match = _SIBLING.fullmatch(path.name)
        if match is None or match[3] != target.name:
            continue
        if path.name in _live or _is_running(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            path.replace(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Tell whether another process of that id lives; its files are not ours to clear."""
    if process == os.getpid():
        return False  # an id used again after a restart, as in a container
    if os.name != "posix":
        return True  # os.kill would end it there: leave its files alone
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _fsync(path: Path) -> None:
    """Flush a file to disk, or a directory on file systems that can."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def cache_root() -> Path:
    """Where this user's caches are kept: $EDGECLIP_CACHE, by default ~/.cache/edgeclip.

    $XDG_CACHE_HOME replaces ~/.cache (XDG Base Directory Specification: if it is absolute).
    """
    own = os.environ.get("EDGECLIP_CACHE")
    if own:
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = shared if shared.is_absolute() else Path.home() / ".cache"
    return base / "edgeclip"
