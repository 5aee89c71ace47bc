"""Which files an ONNX graph keeps its weights in, read without the package onnx.

Only field numbers of onnx.proto are known here, and of the protocol buffers' encoding how to step
over what is not looked for (protobuf.dev/programming-guides/encoding).
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeclip.runtime.errors import InputError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# For each message the fields to step into: ModelProto and so on down to the entry
# ("location", NAME) of a TensorProto's external_data.
_FIELDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_KEY, _VALUE = 1, 2
_MOST_BYTES = 10  # of a varint


def data_files(model: Path) -> tuple[Path, ...]:
    """The files beside an ONNX file that hold its weights, sorted; mostly none.

    Raises:
        InputError: the file cannot be read, or is no ONNX graph.
    """
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map_:
            names = set(_locations(map_, 0, len(map_), "model"))
    except (IndexError, UnicodeDecodeError):
        raise InputError(f"{model} is no ONNX graph, or not all of it") from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"cannot read {model}: {error}") from None
    return tuple(sorted(model.parent / name for name in names))


def _locations(data: mmap.mmap, start: int, end: int, message: str) -> Iterator[str]:
    for field, first, last in _fields(data, start, end):
        inner = _FIELDS[message].get(field)
        if inner == "entry":
            yield from _location(data, first, last)
        elif inner is not None:
            yield from _locations(data, first, last, inner)


def _location(data: mmap.mmap, start: int, end: int) -> Iterator[str]:
    entry = {field: data[first:last] for field, first, last in _fields(data, start, end)}
    if entry.get(_KEY) == b"location":
        yield entry[_VALUE].decode()


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a message that holds bytes."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > end:
                raise IndexError
            yield tag >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise IndexError
    if at > end:
        raise IndexError


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place in range(_MOST_BYTES):
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError
