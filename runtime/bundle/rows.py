"""Rows of numbers, each under the hash of what it was computed from, in a file that only grows.

An index is made of such rows in steps that a kill does not undo, and one that exists is updated.
"""

import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.errors import InputError, SpaceMismatchError

if sys.platform != "win32":
    import fcntl

KEY_BYTES = 32  # a SHA-256
_KIND = "edgeclip-rows-1"
_LONGEST_HEADER = 1 << 16
_DIGEST = 8  # bytes of the hash that tells an embedding from all others of an index


class RowFile:
    """Keys of 32 bytes with one row of numbers each; nothing that was appended is lost.

    The file begins with a line of JSON: its kind, shape and dtype of a row, and `settings`.
    Records of equal length follow: key, row, and the CRC-32 (little-endian) of both. A writer that
    was killed leaves at most one torn record, at the end, which the next writer cuts off. A record
    of another checksum counts as missing, and what it held is computed again.

    One process at a time may append, and others read; `close` flushes it to the disk.

    Args:
        path: the file; the first `append` makes it.
        shape, dtype: of one row.
        settings: plain JSON data that rows depend on.
        mend: what to do if the file is not of these settings, for the error message.

    Raises:
        InputError: the file is of other settings or shapes, is none of this kind, or cannot be
            read.
    """

    def __init__(
        self,
        path: Path,
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        settings: Mapping[str, Any],
        mend: str,
    ) -> None:
        self.path = path
        plain = np.dtype(dtype).newbyteorder("<")
        self._record = np.dtype([("key", "u1", KEY_BYTES), ("row", plain, shape), ("crc", "<u4")])
        header = {"kind": _KIND, "shape": list(shape), "dtype": plain.str, **settings}
        self._header = json.dumps(header, sort_keys=True).encode() + b"\n"
        self._mend = mend
        self._file: BinaryIO | None = None
        self._load()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self._record["row"].shape

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All keys, in the order of their first rows."""
        return tuple(self._places)

    def rows(self, keys: Sequence[bytes]) -> NDArray[Any]:
        """Return the row of each key: [len(keys), *shape].

        Raises:
            KeyError: a key without a row.
        """
        field = self._record["row"]
        found = np.empty((len(keys), *field.shape), field.base)
        for number, key in enumerate(keys):
            block, row = self._places[key]
            found[number] = self._blocks[block]["row"][row]
        return found

    def append(self, keys: Sequence[bytes], rows: NDArray[Any]) -> None:
        """Write the row of each key behind all others; a killed process loses none of them.

        Raises:
            InputError: the file cannot be written, such as on a full disk; what it held before is
                whole.
        """
        records = np.empty(len(keys), self._record)
        records["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        records["row"] = rows
        records["crc"] = _checksums(records)
        try:
            if self._file is None:
                self._file = self._open()
            _write(self._file, records.tobytes())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; what it holds is kept, so make room "
                "and run the command again"
            ) from error
        self._remember(records, np.ones(len(keys), bool))

    def close(self) -> None:
        """Flush the file to the disk, and close it."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                self._file = None

    def _load(self) -> None:
        """Read the file, and remember where its last whole record ends."""
        self._blocks: list[NDArray[Any]] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # the block of a key, and its row there
        self._end = self._size = 0
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        self._size = len(content)
        if self._header.startswith(content):  # its first writer has not begun, or was killed
            return
        if not content.startswith(self._header):
            head = content[:_LONGEST_HEADER].partition(b"\n")[0]
            what = "is of other settings" if _is_header(head) else "is damaged"
            raise InputError(f"{self.path} {what}: {self._mend}")
        whole = (len(content) - len(self._header)) // self._record.itemsize
        self._end = len(self._header) + whole * self._record.itemsize
        records = np.frombuffer(content, self._record, whole, len(self._header))
        self._remember(records, _checksums(records) == records["crc"])

    def _open(self) -> BinaryIO:
        """Open the file to append to it, with a lock that ends with this process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not renamed into place: that would take the file from a process that has just made it too.
        file = self.path.open("a+b", buffering=0)  # so that nothing waits in this process
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise InputError(
                    f"another process of edgeclip writes {self.path}: wait until it has ended"
                ) from None
            except OSError:
                pass  # a file system without locks
        if os.fstat(file.fileno()).st_size != self._size:  # another process was here meanwhile
            self._load()
        file.truncate(self._end)
        if self._end == 0:
            _write(file, self._header)
        return file

    def _remember(self, records: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        block = len(self._blocks)
        self._blocks.append(records)
        keys = records["key"].tobytes()
        for row in map(int, np.flatnonzero(valid)):
            self._places[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = (block, row)


def row_bytes(count: int, shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Return how many bytes `count` rows take in a `RowFile`."""
    return count * (KEY_BYTES + math.prod(shape) * np.dtype(dtype).itemsize + 4)


def _write(file: BinaryIO, content: bytes) -> None:
    left = memoryview(content)
    while left:  # an unbuffered file may take a part
        left = left[file.write(left) :]


def _checksums(records: NDArray[Any]) -> NDArray[np.uint32]:
    size = records.dtype.itemsize
    content = memoryview(records.tobytes())
    found = [
        zlib.crc32(content[end - size : end - 4]) for end in range(size, len(content) + 1, size)
    ]
    return np.array(found, np.uint32)


def _is_header(line: bytes) -> bool:
    try:
        header = json.loads(line)
    except ValueError:
        return False
    return isinstance(header, dict) and header.get("kind") == _KIND


@dataclass(frozen=True, slots=True)
class IndexChange:
    """The keys of an index that an update added, changed, removed and left as they were."""

    index: Index
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    kept: int


class IndexUpdate:
    """An index while it is made or updated; `close` it in any case.

    Beside the index `NAME.npz` lie two files of rows by the content's hash (`RowFile`):
    `NAME.npz.part` with the embeddings of an unfinished run, and `NAME.npz.contents` with the
    first 8 bytes of the SHA-256 of the embedding that each content has in the index. The index
    itself stays one plain file; without its `.contents` everything is embedded again.

    Args:
        out: the index.
        space: fingerprint of the embedding space.
        model: names what embeds: bundle, tower and precision.
        dim: length of an embedding.
        replace: forget the index that exists, and an unfinished run of another model.

    Raises:
        SpaceMismatchError: the index belongs to another embedding space.
        InputError: the index, or an unfinished run, was made by another model, or is damaged.
    """

    def __init__(self, out: Path, *, space: str, model: str, dim: int, replace: bool) -> None:
        self._out = out
        self._space = space
        settings = {"space": space, "model": model}
        part = out.with_name(out.name + ".part")
        self._contents_path = out.with_name(out.name + ".contents")
        self._old = None if replace or not out.exists() else _load_index(out, space)
        part_settings: dict[str, Any] = {
            "shape": (dim,),
            "dtype": np.float32,
            "settings": settings,
            "mend": "it is an unfinished run, so finish that with its bundle and --precision, or "
            "begin anew with --replace",
        }
        try:
            self._part = RowFile(part, **part_settings)
        except InputError:
            if not replace:
                raise
            part.unlink()
            self._part = RowFile(part, **part_settings)
        self._digest_settings: dict[str, Any] = {
            "shape": (_DIGEST,),
            "dtype": np.uint8,
            "settings": settings,
            "mend": f"{out} was embedded by another bundle, tower or --precision, so use that, "
            "or begin anew with --replace",
        }
        self._known: dict[bytes, int] = {}  # content -> row of the old index
        if self._old is not None:
            rows = {_digest(row): number for number, row in enumerate(self._old.embeddings)}
            digests = RowFile(self._contents_path, **self._digest_settings)
            for content in digests.keys:
                row = rows.get(digests.rows([content])[0].tobytes())
                if row is not None:
                    self._known[content] = row

    def __contains__(self, content: bytes) -> bool:
        """Whether the embedding of a content (SHA-256) is known."""
        return content in self._part or content in self._known

    def __len__(self) -> int:
        """Return how many embeddings the unfinished run holds."""
        return len(self._part)

    def add(self, contents: Sequence[bytes], embeddings: FloatArray) -> None:
        """Keep the embeddings of some contents, float32 [N, dim]; a kill loses none of them.

        Raises:
            InputError: the file cannot be written.
        """
        self._part.append(contents, embeddings)

    def finish(
        self, keys: Sequence[str], contents: Sequence[bytes], *, is_named: Callable[[str], bool]
    ) -> IndexChange:
        """Write the index: `keys` in their order, after those of before that are not named now.

        Args:
            keys: all keys of this run; one may occur again.
            contents: the content of each, whose embedding is known.
            is_named: whether a key of before would be in `keys` if it still existed; such keys are
                removed.

        Raises:
            InputError: the index cannot be written.
        """
        rows = self._rows(contents)
        new = frozenset(keys)
        old_keys = () if self._old is None else self._old.keys
        before = {key: number for number, key in enumerate(old_keys)}
        gone = [key for key in before if key not in new]
        others = [n for n, key in enumerate(old_keys) if key not in new and not is_named(key)]
        embeddings = rows
        if self._old is not None and others:
            embeddings = np.concatenate([self._old.embeddings[others], rows])
        index = Index((*(old_keys[n] for n in others), *keys), embeddings, self._space)
        if self._old is None:  # or a kill would leave contents that are not of this index's model
            self._contents_path.unlink(missing_ok=True)
        index.save(self._out)
        self._write_contents(contents, rows, index)
        self._part.close()
        self._part.path.unlink(missing_ok=True)
        changed = tuple(
            key
            for key, row in zip(keys, rows, strict=True)
            if self._old is not None
            and key in before
            and not np.array_equal(self._old.embeddings[before[key]], row)
        )
        return IndexChange(
            index=index,
            added=tuple(key for key in keys if key not in before),
            changed=changed,
            removed=tuple(key for key in gone if is_named(key)),
            kept=len(others) + sum(key in before for key in keys) - len(changed),
        )

    def _rows(self, contents: Sequence[bytes]) -> FloatArray:
        rows = np.empty((len(contents), self._dim()), np.float32)
        for number, content in enumerate(contents):
            if content in self._part:
                rows[number] = self._part.rows([content])[0]
            else:
                assert self._old is not None
                rows[number] = self._old.embeddings[self._known[content]]
        return rows

    def _dim(self) -> int:
        return int(self._part.row_shape[0])

    def _write_contents(self, contents: Sequence[bytes], rows: FloatArray, index: Index) -> None:
        """Write which content each row of the index has, as far as that is known."""
        found = {content: _digest(row) for content, row in zip(contents, rows, strict=True)}
        if self._old is not None:
            still = {_digest(row) for row in index.embeddings}
            for content, row in self._known.items():
                digest = _digest(self._old.embeddings[row])
                if digest in still:
                    found.setdefault(content, digest)
        digests = np.frombuffer(b"".join(found.values()), np.uint8).reshape(-1, _DIGEST)
        with (
            atomic_file(self._contents_path) as temporary,
            closing(RowFile(temporary, **self._digest_settings)) as file,
        ):
            file.append(tuple(found), digests)

    def close(self) -> None:
        """Flush the unfinished run to the disk, and close its file."""
        self._part.close()


def index_bytes(count: int, dim: int) -> int:
    """Return how many bytes an index and the files beside it take while it is made."""
    row = row_bytes(count, (dim,), np.float32)
    return 2 * row + row_bytes(count, (_DIGEST,), np.uint8)


def _load_index(out: Path, space: str) -> Index:
    index = Index.load(out)
    if index.space != space:
        raise SpaceMismatchError(
            f"the index {out} was made in the embedding space {index.space[:12]}, not in "
            f"{space[:12]}: choose another --out, or begin anew with --replace"
        )
    return index


def _digest(row: FloatArray) -> bytes:
    return hashlib.sha256(row.tobytes()).digest()[:_DIGEST]
