"""Encode and decode the tensors of the Open Inference Protocol, and parse its JSON strictly."""

import base64
import binascii
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EdgeClipError

Shape = tuple[int, ...]

BYTES = "BYTES"
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
MAX_AXES = 32  # the limit of numpy 1
MAX_BYTES_ELEMENTS = 2**17  # elements of BYTES are read one by one: this many take about 40 ms
_LARGEST = 2**62  # bytes; beyond it numpy's own sizes overflow
# Python types of JSON numbers that are accepted, by the kind of dtype.
_KINDS: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}
_LENGTH = struct.Struct("<I")
_DATATYPES = {(dtype.kind, dtype.itemsize): name for name, dtype in DTYPES.items()}


class WireError(EdgeClipError):
    """A message that violates the Open Inference Protocol, or cannot be expressed in it."""


def datatype_of(array: NDArray[Any]) -> str:
    """Return the protocol's name of an array's dtype; an object array holds bytes.

    Raises:
        WireError: the protocol has no such datatype.
    """
    if array.dtype.kind == "O":
        return BYTES
    try:
        return _DATATYPES[array.dtype.kind, array.dtype.itemsize]
    except KeyError:
        known = ", ".join((*DTYPES, "and object arrays of bytes"))
        raise WireError(f"dtype {array.dtype} cannot be sent: use one of {known}") from None


def to_binary(array: NDArray[Any]) -> NDArray[Any] | bytes:
    """Return an array as a buffer for `bytes.join`; contiguous little-endian ones are not copied.

    Raises:
        WireError: an object array that holds something other than bytes.
    """
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    parts: list[bytes] = []
    for item in array.flat:
        if not isinstance(item, bytes):
            raise WireError(f"a BYTES tensor holds {type(item).__name__}: give bytes")
        if len(item) >= 2**32:
            raise WireError(f"an element of {len(item)} bytes cannot be sent: cut it below 4 GiB")
        parts += (_LENGTH.pack(len(item)), item)
    return b"".join(parts)


def from_binary(datatype: str, shape: Shape, data: memoryview) -> NDArray[Any]:
    """Decode a tensor; a read-only view of `data`, or a copy if `data` is not aligned.

    The elements of BYTES are copies; at most `MAX_BYTES_ELEMENTS` are accepted.

    Args:
        datatype: a key of `DTYPES`, or BYTES.
        shape: all axes.
        data: exactly the bytes of this tensor.

    Raises:
        WireError: the bytes do not fit datatype and shape.
    """
    count = _count(shape)
    if datatype == BYTES:
        return _bytes_array(_split_bytes(data, count), shape)
    dtype = _dtype(datatype)
    if count * dtype.itemsize != len(data):
        raise WireError(
            f"{datatype} {list(shape)} takes {count * dtype.itemsize} bytes, not {len(data)}"
        )
    if datatype == "BOOL" and count and np.frombuffer(data, np.uint8).max() > 1:
        raise WireError("BOOL takes the bytes 0 and 1 only")
    array = np.frombuffer(data, dtype) if count else np.empty(0, dtype)
    return _sealed((array if array.flags.aligned else array.copy()).reshape(shape))


def to_json(array: NDArray[Any]) -> list[Any]:
    """Return the elements as a flat list that JSON can hold.

    Raises:
        WireError: bytes that are not UTF-8, or NaN or infinity, which JSON does not have.
    """
    flat = array.ravel()
    if array.dtype.kind == "O":
        try:
            return [item.decode() for item in flat]
        except (UnicodeDecodeError, AttributeError):
            raise WireError("bytes that are not UTF-8 do not fit JSON: ask for binary") from None
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        raise WireError("NaN and infinity do not fit JSON: ask for binary")
    return flat.tolist()


def from_json(
    datatype: str, shape: Shape, data: object, *, in_base64: bool = False
) -> NDArray[Any]:
    """Decode a tensor from a list, flat or nested as its shape; read-only.

    Args:
        datatype: its data type in the protocol.
        shape: its shape.
        data: the list.
        in_base64: elements of BYTES are bytes in base64 (RFC 4648), such as pictures.

    Raises:
        WireError: elements of another kind, out of range, or another number of them.
    """
    if not isinstance(data, list):
        raise WireError("data must be a list")
    count, flat = _count(shape), _flatten(data, shape)
    if len(flat) != count:
        raise WireError(f"{list(shape)} takes {count} elements, not {len(flat)}")
    if datatype == BYTES:
        items = _encoded(flat)
        return _bytes_array(map(_from_base64, items) if in_base64 else items, shape)
    if in_base64:
        raise WireError(f"content_type base64 is for BYTES, not for {datatype[:20]}")
    return _sealed(_numbers(datatype, flat).reshape(shape))


def _dtype(datatype: str) -> np.dtype[Any]:
    try:
        return DTYPES[datatype]
    except KeyError:
        known = ", ".join((*DTYPES, BYTES))
        raise WireError(f"datatype {datatype[:20]!r} is unknown: use one of {known}") from None


def _count(shape: Shape) -> int:
    """Return the number of elements, after a check that numpy can hold the shape."""
    if len(shape) > MAX_AXES or math.prod(size or 1 for size in shape) * 8 > _LARGEST:
        raise WireError(f"a shape of {len(shape)} axes is too large")
    return math.prod(shape)


def _split_bytes(data: memoryview, count: int) -> Iterable[bytes]:
    if 4 * count > len(data):  # before anything of that size is made
        raise WireError(f"{len(data)} bytes are too few for {count} elements of BYTES")
    if count > MAX_BYTES_ELEMENTS:
        raise WireError(
            f"{count} elements of BYTES are too many: send at most {MAX_BYTES_ELEMENTS}"
        )
    found, start = [], 0
    for _ in range(count):
        first = start + 4
        if first > len(data):
            raise WireError("BYTES end within the length of an element")
        (length,) = _LENGTH.unpack_from(data, start)
        start = first + length
        if start > len(data):
            raise WireError("BYTES end within an element")
        found.append(bytes(data[first:start]))
    if start != len(data):
        raise WireError(f"BYTES have {len(data) - start} bytes more than their elements")
    return found


def _flatten(data: list[Any], shape: Shape) -> list[Any]:
    for size in shape[1:]:
        if not data or not isinstance(data[0], list):
            break
        if any(not isinstance(item, list) or len(item) != size for item in data):
            raise WireError(f"nested data do not have the shape {list(shape)}")
        data = list(chain.from_iterable(data))
    return data


def _encoded(texts: Sequence[Any]) -> list[bytes]:
    if any(not isinstance(text, str) for text in texts):
        raise WireError("BYTES in JSON are texts")
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError:
        raise WireError("a text holds half of a surrogate pair") from None


def _from_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise WireError(f"an element is no base64: {error}") from None


def _numbers(datatype: str, flat: list[Any]) -> NDArray[Any]:
    dtype = _dtype(datatype)
    if not set(map(type, flat)) <= _KINDS[dtype.kind]:
        raise WireError(f"data hold something that is no {datatype}")
    if dtype.kind in "iu" and flat:
        bounds = np.iinfo(dtype)
        if min(flat) < bounds.min or max(flat) > bounds.max:
            raise WireError(f"data hold a number out of the range of {datatype}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
    except OverflowError:  # a whole number beyond every float
        array = np.array([np.inf], dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise WireError(f"data hold a number out of the range of {datatype}")
    return array


def _bytes_array(items: Iterable[bytes], shape: Shape) -> NDArray[Any]:
    array = np.empty(_count(shape), object)
    array[:] = list(items)
    return _sealed(array.reshape(shape))


def _sealed(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


Parameter = str | int | float | bool

_INT64 = 2**63
_MAX_QUOTED = 40  # characters of a wrong value that a message quotes


def parse_object(text: memoryview) -> dict[str, Any]:
    """Parse one JSON object: strict UTF-8, no key twice, no NaN.

    Raises:
        WireError: anything else, also nesting too deep for the parser.
    """
    try:
        # str() first: json.loads would guess UTF-16 and UTF-32.
        found = json.loads(str(text, "utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise WireError("the JSON is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, and a number of too many digits
        raise WireError(f"the JSON cannot be read: {str(error)[:120]}") from None
    if not isinstance(found, dict):
        raise WireError("the JSON must be an object")
    return found


def get_text(source: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """Return a string; `default` if the key is missing.

    Raises:
        WireError: another type, or missing without a default.
    """
    found = source.get(key, default)
    if not isinstance(found, str):
        raise WireError(f"{key} must be a text{_instead(source, key)}")
    return found


def get_objects(source: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return a list of objects; an empty one if the key is missing.

    Raises:
        WireError: something else.
    """
    found = source.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise WireError(f"{key} must be a list of objects")
    return found


def get_shape(source: Mapping[str, Any]) -> Shape:
    """Return the `shape` of a tensor.

    Raises:
        WireError: not a list of whole numbers from 0.
    """
    found = source.get("shape")
    # type() and not isinstance(): True is an int.
    if not isinstance(found, list) or any(type(size) is not int or size < 0 for size in found):
        raise WireError(f"shape must be a list of whole numbers{_instead(source, 'shape')}")
    return tuple(found)


def get_parameters(source: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return `parameters`: strings, finite numbers (integers within int64) and booleans.

    Raises:
        WireError: something else.
    """
    found = source.get("parameters", {})
    if not isinstance(found, dict):
        raise WireError("parameters must be an object")
    for key, value in found.items():
        if not _is_parameter(value):
            raise WireError(
                f"parameter {_quote(key)} must be a text, number or boolean, not {_quote(value)}"
            )
    return found


def take_size(parameters: dict[str, Parameter]) -> int | None:
    """Remove `binary_data_size` from a tensor's parameters and return it; None if missing.

    Raises:
        WireError: not a whole number from 0.
    """
    found = parameters.pop("binary_data_size", None)
    if found is None:
        return None
    if type(found) is not int or found < 0:
        raise WireError(f"binary_data_size must be a whole number from 0, not {_quote(found)}")
    return found


def get_flag(parameters: Mapping[str, Parameter], key: str, default: bool) -> bool:
    """Return a boolean parameter.

    Raises:
        WireError: something other than true or false.
    """
    found = parameters.get(key, default)
    if not isinstance(found, bool):
        raise WireError(f"{key} must be true or false, not {_quote(found)}")
    return found


def get_number(parameters: Mapping[str, Parameter], key: str) -> float | None:
    """Return a parameter as a float; None if it is missing.

    Raises:
        WireError: not a number.
    """
    found = parameters.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise WireError(f"{key} must be a number, not {_quote(found)}")
    return float(found)


def _is_parameter(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -_INT64 <= value < _INT64
    return isinstance(value, str)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _instead(source: Mapping[str, Any], key: str) -> str:
    return f", not {_quote(source[key])}" if key in source else ", and is missing"


def _quote(value: object) -> str:
    if isinstance(value, int | float | str | bool) or value is None:
        shown = value[: _MAX_QUOTED + 1] if isinstance(value, str) else str(value)
        return repr(shown if len(shown) <= _MAX_QUOTED else f"{shown[:_MAX_QUOTED]}...")
    return type(value).__name__
