"""Rows of numbers, each under the hash of what it was computed from, in a file that only grows."""

import json
import math
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip.runtime.errors import InputError

if sys.platform != "win32":
    import fcntl

KEY_BYTES = 32  # a SHA-256
_KIND = "edgeclip-rows-1"
_LONGEST_HEADER = 1 << 16


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
