"""Rows of numbers, each under the hash of what it was computed from, in a file that only grows."""

import hashlib
import json
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip.runtime.errors import InputError

if sys.platform != "win32":
    import fcntl

KEY_BYTES = 32  # a SHA-256
_KIND = "edgeclip-rows-1"
# Odd, so that a word of a key that differs alone differs in the product (Knuth, multiplicative
# hashing).
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64
)
_LONGEST_HEADER = 1 << 16
_READ_BYTES = 1 << 23  # read at a time when a file is opened
_SAMPLE = 64  # keys that tell one file from another
_NUMBERS = np.uint64((1 << 34) - 1)  # the bits of an entry that hold the number of a record
_FRESH = 1 << 15  # appended keys that are kept in a dict before they are sorted in


class RowFile:
    """Keys of 32 bytes with one row of numbers each; nothing that was appended is lost.

    The file begins with a line of JSON: its kind, shape and dtype of a row, and `settings`.
    Records of equal length follow: key, row, and the CRC-32 (little-endian) of both. A writer that
    was killed leaves at most one torn record, at the end, which the next writer cuts off. A record
    of another checksum counts as missing, and what it held is computed again.

    Rows are read from the file when they are asked for. Once a key was looked up, 8 bytes a record
    lie in a temporary file beside it, or in memory where there are few.
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
        self._reader: int | None = None
        self._load()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self._record["row"].shape

    def __contains__(self, key: bytes) -> bool:
        return self.number(key) is not None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All keys, in the order of their last rows."""
        self._index()
        numbers = np.sort(self._sorted & _NUMBERS).tolist() + sorted(self._fresh.values())
        keys = [(number, self._key(number)) for number in numbers]
        return tuple(key for number, key in keys if self.number(key) == number)

    def number(self, key: bytes) -> int | None:
        """Return the number of the record that holds a key's row; None if there is none."""
        self._index()
        fresh = self._fresh.get(key)
        if fresh is not None:
            return fresh
        least = _entries(np.frombuffer(key, np.uint8), np.uint64(0))
        first, last = np.searchsorted(self._sorted, (least, least | _NUMBERS)).tolist()
        # The latest is behind its equals.
        for number in (self._sorted[first : last + 1] & _NUMBERS)[::-1].tolist():
            if self._key(number) == key:
                return int(number)
        return None

    def rows(self, keys: Sequence[bytes]) -> NDArray[Any]:
        """Return the row of each key: [len(keys), *shape].

        Raises:
            KeyError: a key without a row.
            InputError: the file was cut short or altered since it was opened.
        """
        numbers = [self.number(key) for key in keys]
        for key, number in zip(keys, numbers, strict=True):
            if number is None:
                raise KeyError(key)
        return self.at(np.array(numbers, np.int64))

    def at(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return the rows of records by their number, see `number`: [len(numbers), *shape].

        Raises:
            InputError: the file was cut short or altered since it was opened.
        """
        size = self._record.itemsize
        records = np.empty(len(numbers), self._record)
        each = records.view(np.uint8).reshape(len(numbers), size)
        for own, number in zip(each, numbers.tolist(), strict=True):
            content = self._read(self._start + number * size, size)
            own[: len(content)] = np.frombuffer(content, np.uint8)
        if np.array_equal(_checksums(records), records["crc"]):
            rows: NDArray[Any] = records["row"]
            return rows
        raise InputError(f"{self.path} was altered while it was read: run the command again")

    @property
    def fingerprint(self) -> str:
        """What tells later whether records are still those of now, see `goes_on`."""
        return f"{self._record_count} {self._digest(self._record_count)}"

    def goes_on(self, fingerprint: str) -> bool:
        """Tell whether the file still begins with the records that it had at a `fingerprint`."""
        count, _, digest = fingerprint.partition(" ")
        return int(count) <= self._record_count and digest == self._digest(int(count))

    @property
    def _record_count(self) -> int:
        return max(0, self._end - self._start) // self._record.itemsize

    def _digest(self, count: int) -> str:
        """Hash some keys of the first `count` records, and which of these are damaged."""
        sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.int64)
        damaged = [number for number in self._damaged if number < count]
        held = b"".join(map(self._key, sample.tolist())) + repr(damaged).encode()
        return hashlib.sha256(held).hexdigest()

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
            self._index()
            first = self._record_count
            _write(self._file, records.tobytes())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; what it holds is kept, so make room "
                "and run the command again"
            ) from error
        self._end += records.nbytes
        self._fresh |= {key: number for number, key in enumerate(keys, first)}
        if len(self._fresh) > _FRESH:
            self._sort_in()

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
        self._sorted = np.empty(0, np.uint64)  # an entry of each record, see `_entries`
        self._fresh: dict[bytes, int] = {}  # of keys that are not in there yet
        self._is_indexed = False
        self._damaged: list[int] = []  # numbers of records
        self._start, self._end, self._size = len(self._header), 0, 0
        self._close_reader()
        try:
            with self.path.open("rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                head = file.read(_LONGEST_HEADER)
                if self._header.startswith(head):  # its first writer has not begun, or was killed
                    self._end = len(head) if head == self._header else 0
                    return
                if not head.startswith(self._header):
                    line = head.partition(b"\n")[0]
                    what = "is of other settings" if _is_header(line) else "is damaged"
                    raise InputError(f"{self.path} {what}: {self._mend}")
                file.seek(self._start)
                self._check(self._records(file))
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error

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
            self._end = self._start
        return file

    def _records(self, file: BinaryIO) -> Iterator[NDArray[Any]]:
        """Yield the whole records of a file, some at a time."""
        size = self._record.itemsize
        chunk = max(1, _READ_BYTES // size) * size
        while content := file.read(chunk):
            yield np.frombuffer(content, self._record, len(content) // size)

    def _check(self, blocks: Iterator[NDArray[Any]]) -> None:
        """Remember which records have a wrong checksum, and where the last one ends."""
        count = 0
        for records in blocks:
            wrong = np.flatnonzero(_checksums(records) != records["crc"])
            self._damaged += (count + wrong).tolist()
            count += len(records)
        self._end = self._start + count * self._record.itemsize

    def _index(self) -> None:
        """Remember which record holds the row of each key, when the first is looked up."""
        if self._is_indexed:
            return
        self._is_indexed = True
        count, size = self._record_count, self._record.itemsize
        entries, place = self._scratch(count - len(self._damaged)), 0
        chunk = max(1, _READ_BYTES // size)
        for first in range(0, count, chunk):
            content = self._read(self._start + first * size, min(chunk, count - first) * size)
            records = np.frombuffer(content, self._record)
            numbers = np.arange(first, first + len(records))
            valid = ~np.isin(numbers, self._damaged)
            found = _entries(records["key"][valid], numbers[valid])
            entries[place : place + len(found)] = found
            place += len(found)
        entries.sort()
        self._sorted = entries

    def _sort_in(self) -> None:
        keys = np.frombuffer(b"".join(self._fresh), "u1").reshape(-1, KEY_BYTES)
        fresh = _entries(keys, np.array(list(self._fresh.values())))
        entries = self._scratch(len(self._sorted) + len(fresh))
        entries[: len(self._sorted)], entries[len(self._sorted) :] = self._sorted, np.sort(fresh)
        entries.sort(kind="stable")  # merges what is sorted already
        self._sorted, self._fresh = entries, {}

    def _scratch(self, count: int) -> NDArray[np.uint64]:
        """Return room for entries: beside the file where there are many, else in memory."""
        if count > _FRESH and hasattr(os, "posix_fallocate"):
            try:
                with tempfile.TemporaryFile(dir=self.path.parent) as file:
                    # Else a disk that is full would end the process when a page is written.
                    os.posix_fallocate(file.fileno(), 0, 8 * count)
                    return np.memmap(file, np.uint64, "r+", shape=(count,))
            except OSError:
                pass  # a full disk, or one that is only read
        return np.empty(count, np.uint64)

    def _key(self, number: int) -> bytes:
        return self._read(self._start + number * self._record.itemsize, KEY_BYTES)

    def _read(self, place: int, size: int) -> bytes:
        """Read at a place in the file; a forked process may do so at the same time."""
        if self._reader is None:
            self._reader = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if sys.platform != "win32":
            return os.pread(self._reader, size, place)
        os.lseek(self._reader, place, os.SEEK_SET)
        return os.read(self._reader, size)

    def _close_reader(self) -> None:
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None, "_file": None}  # another process opens its own

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._close_reader()


def row_bytes(count: int, shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Return how many bytes `count` rows take in a `RowFile`."""
    return count * (KEY_BYTES + math.prod(shape) * np.dtype(dtype).itemsize + 4)


def _entries(keys: NDArray[np.uint8], numbers: Any) -> NDArray[np.uint64]:
    """Join 30 bits of a hash of each key, uint8 [..., 32], and the number of its record.

    A key need not be a hash in all its bytes, such as one that ends with a number.
    """
    words = np.ascontiguousarray(keys).view("<u8").astype(np.uint64)
    with np.errstate(over="ignore"):  # only of a single key numpy would say so
        mixed = (words * _FACTORS).sum(axis=-1, dtype=np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _FACTORS[0]
    joined: NDArray[np.uint64] = (mixed & ~_NUMBERS) | np.asarray(numbers, np.uint64)
    return joined


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
