"""Read and write files: bundle paths, hashes, caches, atomic writes, npz archives, JSON records."""

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError, EdgeClipError, InputError, first_line
from edgeclip.runtime.spec import PixelForm, Precision, Tower

if TYPE_CHECKING:
    import sqlite3

_log = logging.getLogger(__name__)

MANIFEST_NAME = "edgeclip.json"
TOKENIZER_NAME = "tokenizer.json"
GOLDEN_NAME = "golden.npz"


def tower_path(
    tower: Tower, precision: Precision, pixels: PixelForm | None = "float32-nchw"
) -> str:
    """Return the path of a tower in a bundle.

    The names are those of transformers.js and optimum. An image tower with uint8 input, which
    these cannot run, has another name.
    """
    stem = "text_model"
    if tower == "image":
        stem = "vision_device" if pixels == "uint8-nhwc" else "vision_model"
    return f"onnx/{stem}{'' if precision == 'fp32' else '_' + precision}.onnx"


def labels_path(name: str) -> str:
    """Return the path of a label set in a bundle."""
    return f"labels/{name}.npz"


def check_path(path: str) -> None:
    """Refuse any path that is not plain, relative and inside the bundle.

    Raises:
        ValueError: absolute, with `..`, a backslash, a drive, a control character or an
            empty part, or the manifest itself.
    """
    parts = path.split("/")
    plain = path.isprintable() and not {"\\", ":"} & set(path)
    if not plain or not all(parts) or {".", ".."} & set(parts):
        raise ValueError(f"unsafe path {path!r}: give a plain POSIX path inside the bundle")
    if path.casefold() == MANIFEST_NAME:
        raise ValueError(f"{MANIFEST_NAME} cannot list itself")


_BLOCK = 1 << 20  # bytes read at a time

# Temporary files beside their target: .edgeclip-tmp-PID-TOKEN.NAME is being written,
# .edgeclip-old-PID-TOKEN.NAME is being replaced. NAME comes last to keep its suffix (.npz).
_SIBLING = re.compile(r"\.edgeclip-(tmp|old)-(\d+)-[0-9a-f]{8}\.(.+)", re.DOTALL)
_live: set[str] = set()  # names of the temporary files in use by threads of this process


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it is renamed to `target` when the block ends normally.

    An existing file is replaced in one step. On an exception `target` stays as it was.
    A killed writer leaves `.edgeclip-tmp-*` beside it, which the next write removes.

    Raises:
        InputError: the folder of `target` cannot be made, `target` is a directory, or another
            library found the disk full.
    """
    _prepare(target)
    if target.is_dir():
        raise InputError(f"{target} is a directory: give the name of a file to write")
    with _sibling(target, "tmp") as temporary:
        try:
            with _full_disk_explained(target):
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
    """Yield a temporary directory to fill; it is renamed to `target` when the block ends normally.

    Everything in it is flushed to disk before the rename. On an exception `target` stays
    as it was. A killed writer leaves `.edgeclip-tmp-*` beside it, which the next write to
    the same target removes. A directory cannot be swapped in one portable step: a kill
    between the two renames of a replacement leaves the old one aside as
    `.edgeclip-old-*`, and the next write puts it back before it begins.

    Args:
        target: the directory to create. An empty one may exist.
        replace: allow `target` to exist, if it holds `marker`.
        marker: a file which shows that `target` may be deleted.

    Raises:
        InputError: `target` exists and may not be replaced, its parent cannot be made, or another
            library found the disk full.
    """
    _prepare(target)
    check_target(target, replace=replace, marker=marker)
    with _sibling(target, "tmp") as temporary:
        temporary.mkdir()
        try:
            with _full_disk_explained(target):
                yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            check_target(target, replace=replace, marker=marker)
            _swap(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# How torch, and libraries in Rust and C++, say that a disk is full.
_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (?:27|28|122)\b"
    r"|inline_container\.cc|iostream error"
)


@contextmanager
def _full_disk_explained(target: Path) -> Iterator[None]:
    """Turn other libraries' errors about a full disk into one line."""
    try:
        yield
    except (EdgeClipError, OSError):
        raise
    except Exception as error:
        if _FULL.search(str(error)) is None:
            raise
        raise InputError(
            f"cannot write {target}: its disk is full ({first_line(error)}); make room and run it "
            "again, what was finished is kept"
        ) from error


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
    """Raise the error that `atomic_directory` would raise; call it before long work.

    Raises:
        InputError: see `atomic_directory`.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a directory: choose another name")
    if not target.exists() or not any(target.iterdir()):
        return
    if not replace:
        raise InputError(f"{target} exists: choose another name, or give --replace")
    if not (target / marker).is_file():
        raise InputError(
            f"{target} holds no {marker}, so it is not replaced: delete it yourself if you want to"
        )


def require_space(target: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        target: the file or directory to write; it need not exist.
        needed: bytes that will be written.

    Raises:
        InputError: less is free.
    """
    place = target.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # a file system that does not tell
    if free < needed:
        raise InputError(
            f"{target} needs {_in_bytes(needed)}, and {_in_bytes(free)} are free on its disk: make "
            "room, or choose a target elsewhere"
        )


def _in_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,} bytes"


@contextmanager
def _sibling(target: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary name beside `target`, protected from `_prepare` in this process."""
    name = f".edgeclip-{kind}-{os.getpid()}-{secrets.token_hex(4)}.{target.name}"
    _live.add(name)
    try:
        yield target.with_name(name)
    finally:
        _live.discard(name)


def _prepare(target: Path) -> None:
    """Create the parent of `target`, and remove what killed writers left there."""
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
    """Return whether another process has that id; its temporary files must stay."""
    if process == os.getpid():
        return False  # the id was used before a restart, as in a container
    if os.name != "posix":
        return True  # os.kill would end the process there
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
    """Return the folder of this user's caches: $EDGECLIP_CACHE, by default ~/.cache/edgeclip.

    $XDG_CACHE_HOME replaces ~/.cache if it is absolute (XDG Base Directory Specification).
    """
    return _user_folder("EDGECLIP_CACHE", "XDG_CACHE_HOME", ".cache")


def state_root() -> Path:
    """Return the folder of what this user's runs remember of earlier ones.

    It is $EDGECLIP_STATE, by default ~/.local/state/edgeclip; $XDG_STATE_HOME replaces
    ~/.local/state if it is absolute (XDG Base Directory Specification). Unlike a cache it cannot
    be made again: promises rest on what it holds.
    """
    return _user_folder("EDGECLIP_STATE", "XDG_STATE_HOME", ".local/state")


def _user_folder(own_name: str, shared_name: str, below_home: str) -> Path:
    own = os.environ.get(own_name)
    if own:
        return Path(own).expanduser()
    shared = Path(os.environ.get(shared_name, ""))
    base = shared if shared.is_absolute() else home_folder() / below_home
    return base / "edgeclip"


@contextmanager
def lock_file(target: Path) -> Iterator[bool]:
    """Wait for, and hold, the lock of a file that is read, changed and written again.

    The lock is `NAME.lock` beside it, and ends with the process that holds it. Yields whether there
    is one: on Windows, and on file systems without locks, nobody waits.

    Raises:
        InputError: the folder cannot be made or written.
    """
    if os.name != "posix":
        yield False
        return
    import fcntl

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(target.name + ".lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    is_locked = False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_locked = True
        yield is_locked
    finally:
        os.close(descriptor)


def home_folder() -> Path:
    """Return the user's home directory.

    A user without $HOME and without an entry in the list of users gets a folder among the
    temporary files that no other user can read or write.

    Raises:
        ConfigError: that folder belongs to somebody else.
        OSError: it cannot be made.
    """
    try:
        return Path.home()
    except RuntimeError:
        return _temporary_home()


def _temporary_home() -> Path:
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"edgeclip-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # a link here could lead anywhere
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise ConfigError(
            f"this user has no home directory, and {folder} is open to others: set HOME to a "
            "folder of the user's own"
        )
    return folder


def ensure_home() -> None:
    """Set $HOME where it is missing: other packages would fail, or write to a folder named "~".

    Raises:
        ConfigError, OSError: see `home_folder`.
    """
    if os.name == "posix" and "HOME" not in os.environ:
        os.environ["HOME"] = str(home_folder())


# A file that changes again within the tick of its clock keeps its times: FAT counts in 2 s.
_SETTLED_NS = 2_500_000_000
_TABLE = (
    "CREATE TABLE IF NOT EXISTS files "
    "(path BLOB PRIMARY KEY, state TEXT NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID"
)


class ContentHashes:
    """SHA-256 of files' bytes; those found before are kept in this user's cache.

    A hash is taken from there while size, inode and both times (of content and of inode) are the
    same, which no change of the bytes leaves so; on Windows, where the second is that of the file's
    making, only a program that sets the first one back does. Without a usable cache every file is
    read.
    """

    _kept: "sqlite3.Connection | None" = None
    _error: type[Exception]

    def __init__(self) -> None:
        try:
            import sqlite3  # which the Python of a small device may lack

            self._error = sqlite3.Error
            folder = cache_root()
            folder.mkdir(parents=True, exist_ok=True)
            self._kept = sqlite3.connect(
                folder / "content-hashes.sqlite",
                isolation_level=None,
                check_same_thread=False,
            )
            self._kept.execute("PRAGMA journal_mode=WAL")  # a commit need not wait for the disk
            self._kept.execute("PRAGMA synchronous=NORMAL")
            self._kept.execute(_TABLE)
        except Exception as error:  # no home, a read-only or full disk, a damaged file
            self._give_up(error)

    def of(self, path: Path) -> bytes:
        """Return the SHA-256 of a file's bytes.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            before = _state(path)
            name = os.fsencode(os.path.abspath(path))
            found = self._find(name, before)
            if found is None:
                found = bytes.fromhex(sha256_file(path))
                if _state(path) == before and _is_settled(path):
                    self._keep(name, before, found)
        except PermissionError as error:
            raise InputError(f"{path} may not be read: check its permissions") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} cannot be read: {reason}") from error
        return found

    def _find(self, name: bytes, state: str) -> bytes | None:
        if self._kept is None:
            return None
        try:
            query = "SELECT sha256 FROM files WHERE path = ? AND state = ?"
            row = self._kept.execute(query, (name, state)).fetchone()
        except self._error as error:
            self._give_up(error)
            return None
        return None if row is None else bytes(row[0])

    def _keep(self, name: bytes, state: str, found: bytes) -> None:
        if self._kept is None:
            return
        try:
            self._kept.execute("REPLACE INTO files VALUES (?, ?, ?)", (name, state, found))
        except self._error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _log.debug("content hashes are not kept: %s", error)
        self._kept = None


def _state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def _is_settled(path: Path) -> bool:
    status = path.stat()
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS


_META = "meta"


def write_npz(
    path: Path, kind: str, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write named arrays and JSON metadata to an npz file, atomically.

    Args:
        path: the file to write; its folder is created if missing.
        kind: type and version of the file, such as "edgeclip-index-1"; `read_npz` checks it.
        meta: plain JSON data.
        arrays: numeric arrays by name; "meta" is reserved.

    Raises:
        InputError: the file cannot be written.
    """
    if _META in arrays or any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("arrays must be numeric, and none may be called 'meta'")
    text = json.dumps({"kind": kind, **meta}, ensure_ascii=False, allow_nan=False)
    # Names of files may hold bytes that are no UTF-8, as halves of surrogate pairs; the escape
    # of these is what JSON writes too.
    encoded = text.encode("utf-8", "backslashreplace")
    described = {_META: np.frombuffer(encoded, dtype=np.uint8), **arrays}
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **cast("Mapping[str, Any]", described))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def read_npz(
    path: Path,
    kind: str,
    meta_keys: frozenset[str],
    array_keys: frozenset[str],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a file of `write_npz`; return its metadata without the kind, and its arrays.

    `defaults` are for metadata that older files lack.

    Raises:
        InputError: missing or damaged file, another kind, or other keys than the given.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path")
    try:
        arrays = _read_arrays(path)
        meta = json.loads(arrays.pop(_META).tobytes())
    except Exception as error:  # zip and numpy raise many kinds on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is damaged or not EdgeCLIP's ({reason}): create it again"
        ) from error
    found = meta.pop("kind", None) if isinstance(meta, dict) else None
    if found != kind:
        raise InputError(
            f"{path} is of kind {found!r}, and {kind!r} is needed: give the file that belongs here"
        )
    meta = {**(defaults or {}), **meta}
    for wanted, got in ((meta_keys, frozenset(meta)), (array_keys, frozenset(arrays))):
        if wanted != got:
            raise InputError(
                f"{path} is not a whole {kind}: missing keys {sorted(wanted - got)}, "
                f"unknown keys {sorted(got - wanted)}"
            )
    return meta, arrays


def npz_kind(path: Path) -> str | None:
    """Return the kind of a file of `write_npz`; None if it is none that can be read.

    It reads the metadata alone, and checks nothing: `read_npz` does.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{_META}.npy") as stream:
            meta = json.loads(np.lib.format.read_array(stream, allow_pickle=False).tobytes())
    except Exception:  # zip and numpy raise many kinds on damaged data
        return None
    kind = meta.get("kind") if isinstance(meta, dict) else None
    return kind if isinstance(kind, str) else None


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # No entry may be compressed, so that a small file cannot unpack to a huge one.
            if entry.compress_type != zipfile.ZIP_STORED or not entry.filename.endswith(".npy"):
                raise ValueError(f"unexpected entry {entry.filename!r}")
            name = entry.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"entry {name!r} occurs twice")
            with archive.open(entry) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                # Reading to the very end makes zipfile check the checksum.
                if stream.read(1):
                    raise ValueError(f"entry {name!r} is longer than its array")
    return arrays


class JsonRecord:
    """Base class of frozen dataclasses that are saved as JSON with a schema version.

    Reading goes through `schema.parse`, so types, bounds and unknown keys are checked by pydantic.

    Attributes:
        SCHEMA_VERSION: increased with every change of the fields; the file's first key.
        WHAT: name of the file in error messages.
        HINT: what to do if the file is damaged or of another version.
    """

    __slots__ = ()
    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str]
    HINT: ClassVar[str]

    def to_json(self) -> str:
        """Return this record as indented JSON, which `from_json` reads back.

        Infinite ends of intervals become null.
        """
        # Every subclass is a dataclass; this base has no fields.
        fields: dict[str, Any] = dataclasses.asdict(  # type: ignore[call-overload]
            self, dict_factory=json_fields
        )
        data = {"schema_version": self.SCHEMA_VERSION, **fields}
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """Read the text that `to_json` returned; `source` names it in error messages.

        Raises:
            ConfigError: not JSON, another schema version, or wrong fields.
        """
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON ({error}): {cls.HINT}") from None
        version = data.pop("schema_version", None) if isinstance(data, dict) else None
        if type(version) is not int or version != cls.SCHEMA_VERSION:
            raise ConfigError(
                f"{source}: schema {version!r} of {cls.WHAT} is not {cls.SCHEMA_VERSION}: "
                f"{cls.HINT}, or use the version of edgeclip that wrote it"
            )
        return parse(cls, data, source=source)

    def save(self, path: Path) -> None:
        """Write this record to a JSON file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record from a JSON file.

        Raises:
            ConfigError: missing, unreadable or invalid file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text: {error}") from None
        return cls.from_json(text, source=str(path))


def json_fields(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a dataclass's fields; an infinite end of an interval becomes None."""
    return {
        name: None if name in ("low", "high") and value in (-math.inf, math.inf) else value
        for name, value in fields
    }
