"""Encode and decode messages of the Open Inference Protocol v2 with binary tensor data.

A message is JSON that describes its tensors, followed by their bytes in the same order; the
header `Inference-Header-Content-Length` says where the JSON ends. Tensors may also stand in the
JSON. Neither side trusts the other: any malformed message is a `WireError`, and memory is
bounded by a small multiple of the body.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
and https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/
extension_binary_data.html
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.wire.tensors import (
    BYTES,
    Parameter,
    WireError,
    datatype_of,
    from_binary,
    from_json,
    get_flag,
    get_number,
    get_objects,
    get_parameters,
    get_shape,
    get_text,
    parse_object,
    take_size,
    to_binary,
    to_json,
)

__all__ = [
    "BASIS",
    "BUNDLE",
    "BYTES",
    "CODEC",
    "CUT",
    "DEADLINE_MS",
    "DIM",
    "IDEMPOTENCY_KEY",
    "JSON_LENGTH_HEADER",
    "ROW_TYPE",
    "SCALE",
    "SERVER_TIMING_HEADER",
    "SPACE_ID",
    "TOP",
    "InferRequest",
    "InferResponse",
    "Parameter",
    "WireError",
    "decode_error",
    "decode_request",
    "decode_response",
    "encode_error",
    "encode_request",
    "encode_response",
    "get_number",
    "json_length",
    "server_timing",
    "server_timing_ms",
]

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
SERVER_TIMING_HEADER = "server-timing"  # how long the server worked on a request
_SERVER_TIMING = re.compile(r"infer;dur=(\d{1,9}(?:\.\d{1,6})?)")

# Parameters of requests.
SPACE_ID = "space_id"  # str: fingerprint of the embedding space, 64 hexadecimal digits
CUT = "cut"  # str: number of the cut point
CODEC = "codec"  # str: codec of the tensor at the cut
SCALE = "scale"  # of the codec, where it is one number
DEADLINE_MS = "deadline_ms"  # float: milliseconds left when the request is sent
IDEMPOTENCY_KEY = "idempotency_key"  # str: requests with the same key take effect once
BUNDLE = "bundle"  # str: the bundle that the device runs
DIM = "dim"  # int: length that embeddings are cut to
ROW_TYPE = "embeddings"  # str: float32, int8 or binary
BASIS = "basis"  # str: `Reducer.digest` of what reduced the embeddings of a request
TOP = "top"  # int: number of labels or hits

# Parameter of a tensor: how its elements stand in the JSON (MLServer's content types,
# https://mlserver.readthedocs.io/en/latest/user-guide/content-type.html).
_CONTENT_TYPE = "content_type"
_BINARY_OUTPUT = "binary_data_output"
_MOST_TENSORS = 256
_ALIGNMENT = 64  # bytes: an aligned first tensor is read without a copy

Body = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InferRequest:
    """An inference request.

    Attributes:
        model: name of the model; in HTTP it is a part of the path.
        inputs: numeric arrays, or object arrays of bytes, by name.
        parameters: parameters of the whole request.
        id: returned with the response.
        outputs: names of the wanted outputs; () for all.
        binary: which outputs to return as bytes and not in the JSON: all, none, or these.
    """

    model: str
    inputs: Tensors
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    id: str = ""
    outputs: tuple[str, ...] = ()
    binary: bool | frozenset[str] = True

    @property
    def rows(self) -> int:
        """The length of the first input's first axis: pictures, texts or embeddings."""
        shapes = [array.shape for array in self.inputs.values()]
        return shapes[0][0] if shapes and shapes[0] else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InferResponse:
    """An inference response; the attributes are those of `InferRequest`."""

    model: str
    outputs: Tensors
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    id: str = ""


def encode_request(request: InferRequest) -> tuple[dict[str, str], bytes]:
    """Return the HTTP headers and the body of a request; all inputs are binary.

    Raises:
        WireError: a dtype or parameter that the protocol does not have.
    """
    binary = request.binary
    parameters = {**request.parameters, _BINARY_OUTPUT: binary is True}
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    head["parameters"] = parameters
    names = request.outputs or (() if isinstance(binary, bool) else tuple(sorted(binary)))
    if names:
        wanted = names if binary is True else _names(binary)
        head["outputs"] = [
            {"name": name, "parameters": {"binary_data": name in wanted}} for name in names
        ]
    return _encode(head, "inputs", request.inputs, frozenset(request.inputs))


def decode_request(model: str, body: Body, json_length: int | None) -> InferRequest:
    """Decode the body of a request.

    Args:
        model: name of the model, from the path.
        body: the whole body.
        json_length: value of `Inference-Header-Content-Length`; None for a body of JSON alone.

    Raises:
        WireError: the body violates the protocol.
    """
    head, rest = _split(body, json_length)
    inputs = _tensors(head, "inputs", rest)
    parameters = get_parameters(head)
    all_binary = get_flag(parameters, _BINARY_OUTPUT, False)
    parameters.pop(_BINARY_OUTPUT, None)
    wanted = {
        _name(item): get_flag(get_parameters(item), "binary_data", all_binary)
        for item in get_objects(head, "outputs")
    }
    if len(wanted) != len(get_objects(head, "outputs")):
        raise WireError("an output is asked for twice")
    return InferRequest(
        model=model,
        inputs=inputs,
        parameters=parameters,
        id=get_text(head, "id", ""),
        outputs=tuple(wanted),
        binary=frozenset(name for name, is_binary in wanted.items() if is_binary)
        if wanted
        else all_binary,
    )


def encode_response(
    response: InferResponse, binary: bool | Collection[str] = True
) -> tuple[dict[str, str], bytes]:
    """Return the HTTP headers and the body of a response.

    Args:
        response: the response.
        binary: which outputs are bytes and not in the JSON: all, none, or these.

    Raises:
        WireError: a dtype, parameter or (in JSON) value that the protocol does not have.
    """
    head: dict[str, Any] = {"model_name": response.model, "model_version": "1"}
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    names = frozenset(response.outputs) if binary is True else _names(binary)
    return _encode(head, "outputs", response.outputs, names)


def decode_response(body: Body, json_length: int | None) -> InferResponse:
    """Decode the body of a response; arguments as for `decode_request`.

    Raises:
        WireError: the body violates the protocol.
    """
    head, rest = _split(body, json_length)
    return InferResponse(
        model=get_text(head, "model_name"),
        outputs=_tensors(head, "outputs", rest),
        parameters=get_parameters(head),
        id=get_text(head, "id", ""),
    )


def encode_error(message: str) -> tuple[dict[str, str], bytes]:
    """Return the HTTP headers and the body of an error response."""
    return {"Content-Type": "application/json"}, json.dumps({"error": message}).encode()


def decode_error(body: Body) -> str:
    """Return the message of an error response; "" if its body is not of the protocol."""
    try:
        return get_text(parse_object(memoryview(body)), "error", "")
    except WireError:
        return ""


def json_length(header: str | bytes | None) -> int | None:
    """Parse the header `Inference-Header-Content-Length`; None if it is missing.

    Raises:
        WireError: not a whole number from 0.
    """
    if header is None:
        return None
    text = header.decode("latin-1") if isinstance(header, bytes) else header
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise WireError(f"{JSON_LENGTH_HEADER} must be a whole number, not {text[:40]!r}")
    return int(text)


def server_timing(ms: float) -> str:
    """Return the value of the header `Server-Timing` for the time that a request took.

    Source: W3C Server Timing, https://www.w3.org/TR/server-timing/
    """
    return f"infer;dur={ms:.3f}"


def server_timing_ms(header: str | None) -> float | None:
    """Read the milliseconds of a `Server-Timing` header; None if it is missing or another one."""
    match = _SERVER_TIMING.fullmatch(header or "")
    return float(match[1]) if match else None


def _encode(
    head: dict[str, Any], key: str, tensors: Tensors, binary: Collection[str]
) -> tuple[dict[str, str], bytes]:
    parts: list[Any] = []
    described: list[dict[str, Any]] = []
    for name, array in tensors.items():
        item: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array),
            "shape": array.shape,
        }
        if name in binary:
            part = to_binary(array)
            size = len(part) if isinstance(part, bytes) else part.nbytes
            item["parameters"] = {"binary_data_size": size}
            parts.append(part)
        else:
            item["data"] = to_json(array)
        described.append(item)
    try:
        text = json.dumps({**head, key: described}, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WireError(f"a parameter cannot be sent: {error}") from None
    start = text.encode()
    if not parts:
        return {"Content-Type": "application/json"}, start
    start += b" " * (-len(start) % _ALIGNMENT)
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(start))}
    return headers, b"".join((start, *parts))


def _split(body: Body, length: int | None) -> tuple[dict[str, Any], memoryview]:
    """Split a body into its parsed JSON and the bytes after it."""
    view = memoryview(body).toreadonly()
    end = len(view) if length is None else length
    if not 0 <= end <= len(view):
        raise WireError(f"the JSON part has {end} bytes, but the whole body {len(view)}")
    return parse_object(view[:end]), view[end:]


def _tensors(head: Mapping[str, Any], key: str, rest: memoryview) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    start = 0
    described = get_objects(head, key)
    if len(described) > _MOST_TENSORS:
        raise WireError(f"{len(described)} {key} are too many: send at most {_MOST_TENSORS}")
    for item in described:
        name, shape, datatype = _name(item), get_shape(item), get_text(item, "datatype")
        if name in found:
            raise WireError(f"tensor {name[:40]!r} comes twice in {key}")
        parameters = get_parameters(item)
        size = take_size(parameters)
        if (size is None) == ("data" not in item):
            raise WireError(f"tensor {name[:40]!r} needs either data or binary_data_size")
        try:
            if size is None:
                in_base64 = parameters.get(_CONTENT_TYPE) == "base64"
                found[name] = from_json(datatype, shape, item["data"], in_base64=in_base64)
                continue
            if size > len(rest) - start:
                raise WireError(f"{size} bytes were declared, {len(rest) - start} are left")
            found[name] = from_binary(datatype, shape, rest[start : start + size])
        except WireError as error:
            raise WireError(f"tensor {name[:40]!r}: {error}") from None
        start += size
    if start != len(rest):
        raise WireError(f"{len(rest) - start} bytes follow the last tensor")
    return found


def _name(item: Mapping[str, Any]) -> str:
    name = get_text(item, "name")
    if not name:
        raise WireError("a tensor has no name")
    return name


def _names(binary: bool | Collection[str]) -> Collection[str]:
    return () if isinstance(binary, bool) else binary
