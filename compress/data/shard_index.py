"""The index of WebDataset shards: where the picture of each sample lies, and its captions.

A shard is a tar file whose neighbouring members form a sample if their names are equal up to the
first dot of the last part (`webdataset`, "The WebDataset Format"). Of a sample, the first member
with the suffix of a picture is the picture; its captions are the text of `.txt`, `.text` or
`.caption`, of several such members, or what `.json` holds under a name that `captions.jsonl` may
use too. Tar headers are those of POSIX.1-2001 (pax and ustar) and GNU, read by `tarfile` where they
are not the plainest.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.compress.data.emoji_scenes import Split, split_of
from edgeclip.compress.data.packed_texts import PackedTexts
from edgeclip.runtime.bundle.files import atomic_directory, cache_root
from edgeclip.runtime.console import escape_controls
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.captions import caption_texts, captions_of_entry
from edgeclip.runtime.inputs.images import IMAGE_SUFFIXES, MORE_SUFFIXES

_log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
BLOCK = 512
_VERSION = 1  # of the index; another one is another folder
_MARKER = "index.json"
_TEXTS = frozenset(("txt", "text", "caption", "captions"))
# webdataset's own rule: what comes before the first dot of the last part of the name, and after it.
_NAME = re.compile(rb"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
_MOST_TEXT = 1 << 20  # bytes of a member that may be a caption
_MOST_PAX = 64 * 1024  # bytes of a pax header that are looked at
_OCTAL = re.compile(rb"[0-7]+")
_SMALL = 4096  # bytes of an array that is read instead of mapped
_TOGETHER = 8  # shards from which on several processes make the index


class OpenFile:
    """A file that is open until nothing refers to it any more; reading it moves no position."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from a place on, or what there is of them."""
        found = os.pread(self._descriptor, size, offset)
        while found and len(found) < size:  # one call gives at most 2 GB
            more = os.pread(self._descriptor, size - len(found), offset + len(found))
            if not more:
                break
            found += more
        return found


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the picture of each of N samples lies; the arrays may be memory-mapped.

    Attributes:
        first: number of the first sample of each shard, and N at the end: int64.
        offset, size: of the picture's bytes in its shard: int64 [N], uint32 [N].
        split: place in `SPLITS`: uint8 [N].
        captions: the captions.
        digest: a hash of all headers and captions.
    """

    first: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    split: NDArray[np.uint8]
    captions: PackedTexts
    digest: str

    def shard_of(self, row: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.first, row, side="right")) - 1


def open_index(shards: Sequence[Path]) -> ShardIndex:
    """Return the index of some shards: from this user's cache, or made and kept there.

    An index is found by the paths, sizes and times of its shards, so that a changed shard has
    none.

    Raises:
        InputError: a shard cannot be read, is no tar file or is cut off.
    """
    try:
        states = [(str(path.absolute()), path.stat()) for path in shards]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    key = json.dumps([(name, status.st_size, status.st_mtime_ns) for name, status in states])
    name = hashlib.sha256(f"{_VERSION}:{key}".encode("utf-8", "surrogatepass")).hexdigest()
    folder = cache_root() / "shard-index" / name[:32]
    try:
        return _load_index(folder)
    except (OSError, ValueError, KeyError) as error:
        _log.debug("no index in %s: %s", folder, error)
    index = _make_index(shards, sum(status.st_size for _, status in states))
    try:
        _save_index(index, folder)
        return _load_index(folder)  # so that processes share its memory
    except (OSError, InputError) as error:  # a read-only or full disk
        _log.debug("the index is not kept: %s", error)
        return index


_ARRAYS = ("first", "offset", "size", "split")
_OF_TEXTS = ("first", "start", "text")


def _save_index(index: ShardIndex, folder: Path) -> None:
    if folder.exists():  # damaged
        (folder / _MARKER).touch()
    with atomic_directory(folder, replace=True, marker=_MARKER) as temporary:
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(index, name))
        for name in _OF_TEXTS:
            np.save(temporary / f"caption-{name}.npy", getattr(index.captions, name))
        (temporary / _MARKER).write_text(json.dumps({"digest": index.digest}), encoding="utf-8")


def _load_index(folder: Path) -> ShardIndex:
    digest = str(json.loads((folder / _MARKER).read_text(encoding="utf-8"))["digest"])

    def read(name: str) -> NDArray[np.int64]:
        path = folder / f"{name}.npy"
        is_small = path.stat().st_size < _SMALL  # an array of nothing cannot be mapped
        found: NDArray[np.int64] = np.load(
            path, mmap_mode=None if is_small else "r", allow_pickle=False
        )
        return found

    arrays = {name: read(name) for name in _ARRAYS}
    captions = PackedTexts(*(read(f"caption-{name}") for name in _OF_TEXTS))  # type: ignore[arg-type]
    return ShardIndex(**arrays, captions=captions, digest=digest)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Scanned:
    """The index of one shard, and how many of its samples hold no picture."""

    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    split: NDArray[np.uint8]
    captions: PackedTexts
    digest: bytes
    without_picture: int


def _make_index(shards: Sequence[Path], size: int) -> ShardIndex:
    parts: list[_Scanned] = []
    with tqdm(total=size, desc="index", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for path, part in zip(shards, _scan_all(shards), strict=True):
            parts.append(part)
            bar.update(path.stat().st_size)
    bare = sum(part.without_picture for part in parts)
    if bare:
        _log.warning("left out %d samples of the shards without a picture", bare)
    counts = [len(part.offset) for part in parts]
    return ShardIndex(
        first=np.cumsum([0, *counts], dtype=np.int64),
        offset=np.concatenate([part.offset for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        split=np.concatenate([part.split for part in parts]),
        captions=PackedTexts.joined([part.captions for part in parts]),
        digest=hashlib.sha256(b"".join(part.digest for part in parts)).hexdigest(),
    )


def _scan_all(shards: Sequence[Path]) -> Iterator[_Scanned]:
    workers = min(len(shards) // _TOGETHER, os.cpu_count() or 1)
    if workers < 2:
        yield from map(_scan, shards)
        return
    # Forked as those of a DataLoader are, so that a program needs no guard around its main part.
    context = get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_scan, shards)


@dataclass(frozen=True, slots=True)
class _Member:
    """A regular file in a shard."""

    name: bytes
    offset: int
    size: int
    head: bytes


@dataclass(slots=True)
class _Sample:
    """The members with one key, as far as they are used."""

    key: bytes
    picture: _Member | None = None
    texts: tuple[str, ...] = ()
    described: tuple[str, ...] = ()  # by .json, which counts where there is no text


def _scan(path: Path) -> _Scanned:
    """Read the headers and texts of a shard.

    Raises:
        InputError: it is no tar file, or is cut off.
    """
    opened, digest = OpenFile(path), hashlib.sha256()
    offset, size, split = array("q"), array("I"), array("B")
    captions: list[tuple[str, ...]] = []
    bare = 0
    for sample in _samples(opened, path, digest.update):
        if sample.picture is None:
            bare += 1
            continue
        offset.append(sample.picture.offset)
        size.append(sample.picture.size)
        key = sample.key.decode("utf-8", "surrogateescape")
        split.append(SPLITS.index(split_of(key)))
        captions.append(sample.texts or sample.described)
    packed = PackedTexts.of(captions)
    digest.update(packed.text.tobytes())
    return _Scanned(
        np.array(offset, np.int64),
        np.array(size, np.uint32),
        np.array(split, np.uint8),
        packed,
        digest.digest(),
        bare,
    )


def _samples(opened: OpenFile, path: Path, seen: Callable[[bytes], None]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in _members(opened, path):
        seen(member.head)
        match = _NAME.fullmatch(member.name)
        if match is None or match[1].rpartition(b"/")[2].startswith(b"__"):
            continue  # no sample's, such as webdataset's own notes
        key, suffix = match[1], match[2].rpartition(b".")[2].decode("ascii", "replace").lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        if f".{suffix}" in IMAGE_SUFFIXES | MORE_SUFFIXES:
            sample.picture = sample.picture or member
        elif member.size > _MOST_TEXT:
            continue
        elif suffix in _TEXTS:
            text = opened.read(member.offset, member.size).decode("utf-8-sig", "replace")
            sample.texts += caption_texts(" ".join(text.split()))
        elif suffix == "json":
            sample.described += _described(opened.read(member.offset, member.size))
    if sample is not None:
        yield sample


def _described(data: bytes) -> tuple[str, ...]:
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError):
        return ()
    return captions_of_entry(entry) if isinstance(entry, dict) else ()


def _members(opened: OpenFile, path: Path) -> Iterator[_Member]:
    """Yield the regular files of a tar file."""
    end, at = path.stat().st_size, 0
    if end == 0:
        raise InputError(f"{path} is empty: delete it, and fetch or write it again")
    with contextlib.closing(_SlowHeaders(path)) as others:
        while True:
            head = opened.read(at, BLOCK)
            if not head.strip(b"\0"):  # the end, or no more bytes
                return
            after = at + BLOCK
            found = _plain_member(head, after)
            if found is None:
                after = _after_plain_pax(opened, head, at)
                if at < after <= end:
                    at = after
                    continue
                found, after = others.read(head, at)
            if found is not None:
                after = max(after, found.offset + -(-found.size // BLOCK) * BLOCK)
                if found.offset + found.size > end:
                    shown = escape_controls(found.name.decode("utf-8", "replace"))
                    raise InputError(
                        f"{path} is cut off in {shown}: delete it, and fetch or write it again"
                    )
                if found.size < 2**32:
                    yield found
            elif after > end + BLOCK:
                raise InputError(
                    f"{path} is cut off behind byte {at}: delete it, and fetch or write it again"
                )
            at = after


def _plain_member(head: bytes, offset: int) -> _Member | None:
    """Read a header without extensions, much faster than `tarfile`; None if it has some."""
    digits = head[124:136].rstrip(b" \0")
    is_plain = head[257:262] == b"ustar" and head[156:157] in (b"0", b"\0") and not head[345]
    if not is_plain or _OCTAL.fullmatch(digits) is None or not _is_whole(head):
        return None
    return _Member(head[:100].split(b"\0", 1)[0], offset, int(digits, 8), head)


def _is_whole(head: bytes) -> bool:
    """Tell whether the checksum of a header is right; it is taken with blanks in its own place."""
    digits = head[148:156].strip(b" \0")
    if len(head) < BLOCK or _OCTAL.fullmatch(digits) is None:
        return False
    return sum(head[:148]) + 8 * ord(" ") + sum(head[156:]) == int(digits, 8)


def _after_plain_pax(opened: OpenFile, head: bytes, at: int) -> int:
    """Return where a pax header ends that changes nothing here, such as a time; else `at`.

    `webdataset` writes one before every member.
    """
    digits = head[124:136].rstrip(b" \0")
    is_pax = head[257:262] == b"ustar" and head[156:157] == b"x"
    if not is_pax or _OCTAL.fullmatch(digits) is None or not _is_whole(head):
        return at
    size = int(digits, 8)
    records = opened.read(at + BLOCK, size) if size <= _MOST_PAX else b"size="
    if any(key in records for key in (b"path=", b"size=", b"GNU.sparse", b"charset=")):
        return at
    return at + BLOCK + -(-size // BLOCK) * BLOCK


class _SlowHeaders:
    """Reads any header of a tar file by `tarfile`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: tarfile.TarFile | None = None

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def read(self, head: bytes, at: int) -> tuple[_Member | None, int]:
        """Return the member whose header begins at a byte, if it is a file, and where it ends.

        Raises:
            InputError: it is no header.
        """
        try:
            if self._archive is None:
                self._archive = tarfile.open(self._path, "r:")  # noqa: SIM115, `close` closes it
            archive: Any = self._archive  # whose place in the file `tarfile` declares nowhere
            archive.fileobj.seek(at)
            archive.offset = at
            info = tarfile.TarInfo.fromtarfile(archive)
        except Exception as error:  # of many kinds, for headers that were made to
            raise InputError(
                f"{self._path} is no tar file, or damaged at byte {at} ({error}): delete it, and "
                "fetch or write it again"
            ) from error
        if info.size < 0 or archive.offset <= at:
            raise InputError(
                f"{self._path} is damaged at byte {at}: delete it, and fetch or write it again"
            )
        name = info.name.encode("utf-8", "surrogateescape")
        is_whole = info.isreg() and not info.issparse()
        found = _Member(name, info.offset_data, info.size, head + name) if is_whole else None
        return found, int(archive.offset)
