"""Encode and decode the protobuf messages of the Open Inference Protocol."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClassesForFiles
from numpy.typing import NDArray

from edgeclip.runtime.serving.models import ServingModel
from edgeclip.runtime.wire.messages import BYTES, InferRequest, InferResponse, Parameter, WireError
from edgeclip.runtime.wire.tensors import DTYPES, datatype_of, from_binary, to_binary

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
_DESCRIPTORS = "grpc_oip.binpb"  # generated from grpc_oip.proto; the command is there


def message_type(name: str) -> type[Message]:
    """Return the class of a message, such as "ModelInferRequest".

    Raises:
        KeyError: the service has no such message.
    """
    return _message_types()[f"{PACKAGE}.{name}"]


@cache
def _message_types() -> dict[str, type[Message]]:
    described = FileDescriptorSet.FromString(files(__package__).joinpath(_DESCRIPTORS).read_bytes())
    pool = DescriptorPool()
    for file in described.file:
        pool.Add(file)
    names = [file.name for file in described.file]
    found: dict[str, type[Message]] = GetMessageClassesForFiles(names, pool)
    return found


VERSION = "1"  # of every model
_PLATFORM = "edgeclip"
_MAX_TENSORS = 256
# The field of typed contents for each datatype, and the dtype of its elements. FP16 has none.
_CONTENTS: dict[str, tuple[str, np.dtype[Any]]] = {
    "BOOL": ("bool_contents", np.dtype(np.bool_)),
    **{f"INT{bits}": ("int_contents", np.dtype(np.int32)) for bits in (8, 16, 32)},
    "INT64": ("int64_contents", np.dtype(np.int64)),
    **{f"UINT{bits}": ("uint_contents", np.dtype(np.uint32)) for bits in (8, 16, 32)},
    "UINT64": ("uint64_contents", np.dtype(np.uint64)),
    "FP32": ("fp32_contents", np.dtype(np.float32)),
    "FP64": ("fp64_contents", np.dtype(np.float64)),
    BYTES: ("bytes_contents", np.dtype(object)),
}


def parse(name: str, data: bytes) -> Any:
    """Parse a message of grpc_oip.proto.

    Raises:
        WireError: the bytes are not such a message.
    """
    try:
        return message_type(name).FromString(data)
    except DecodeError:
        raise WireError(f"the message is no {name}") from None


def decode_request(message: Any) -> InferRequest:
    """Decode a ModelInferRequest.

    Raises:
        WireError: it violates the protocol.
    """
    if len(message.inputs) > _MAX_TENSORS:
        raise WireError(f"{len(message.inputs)} inputs are too many: send at most {_MAX_TENSORS}")
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise WireError(f"{len(message.inputs)} inputs have {len(raw)} raw_input_contents")
    inputs: dict[str, NDArray[Any]] = {}
    for number, tensor in enumerate(message.inputs):
        name = tensor.name
        if not name or name in inputs:
            raise WireError(f"input {name[:40]!r} comes twice" if name else "an input has no name")
        try:
            inputs[name] = _array(tensor, raw[number] if raw else None)
        except WireError as error:
            raise WireError(f"tensor {name[:40]!r}: {error}") from None
    outputs = tuple(output.name for output in message.outputs)
    if len(set(outputs)) != len(outputs):
        raise WireError("an output is asked for twice")
    return InferRequest(
        model=message.model_name,
        inputs=inputs,
        parameters=_parameters(message.parameters),
        id=message.id,
        outputs=outputs,
    )


def encode_response(response: InferResponse) -> Message:
    """Encode a ModelInferResponse with raw outputs.

    Raises:
        WireError: a dtype that the protocol does not have.
    """
    message: Any = message_type("ModelInferResponse")(
        model_name=response.model, model_version=VERSION, id=response.id
    )
    for key, value in response.parameters.items():
        _set_parameter(message.parameters[key], value)
    for name, array in response.outputs.items():
        message.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        part = to_binary(array)
        message.raw_output_contents.append(part if isinstance(part, bytes) else part.tobytes())
    found: Message = message
    return found


def describe_model(model: ServingModel) -> Message:
    """Return the ModelMetadataResponse of a model."""
    return message_type("ModelMetadataResponse")(
        name=model.name,
        versions=[VERSION],
        platform=_PLATFORM,
        inputs=[asdict(spec) for spec in model.inputs],
        outputs=[asdict(spec) for spec in model.outputs],
    )


def _array(tensor: Any, raw: bytes | None) -> NDArray[Any]:
    shape = tuple(tensor.shape)
    if any(size < 0 for size in shape):
        raise WireError(f"shape {list(shape[:8])} holds a number below 0")
    if raw is None:
        return from_binary(tensor.datatype, shape, memoryview(_typed(tensor)))
    if tensor.HasField("contents"):
        raise WireError("contents and raw_input_contents: send one of them")
    return from_binary(tensor.datatype, shape, memoryview(raw))


def _typed(tensor: Any) -> bytes:
    """Convert typed contents to raw contents."""
    datatype = tensor.datatype
    if datatype not in _CONTENTS:
        raise WireError(f"datatype {datatype[:20]!r} has no typed contents: send it raw")
    field, dtype = _CONTENTS[datatype]
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise WireError(f"{datatype} does not belong in {other.name}, but in {field}")
    values = getattr(tensor.contents, field)
    array = np.fromiter(values, dtype, len(values))
    if datatype != BYTES and dtype != DTYPES[datatype]:
        bounds = np.iinfo(DTYPES[datatype])
        if len(array) and (array.min() < bounds.min or array.max() > bounds.max):
            raise WireError(f"contents hold a number out of the range of {datatype}")
        array = array.astype(DTYPES[datatype])
    part = to_binary(array)
    return part if isinstance(part, bytes) else part.tobytes()


def _parameters(found: Mapping[str, Any]) -> dict[str, Parameter]:
    return {key: _parameter(key, value) for key, value in found.items()}


def _parameter(key: str, value: Any) -> Parameter:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise WireError(f"parameter {key[:40]!r} has no value")
    found: Parameter = getattr(value, kind)
    if isinstance(found, float) and not math.isfinite(found):
        raise WireError(f"parameter {key[:40]!r} must be finite")
    return found


def _set_parameter(target: Any, value: Parameter) -> None:
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        target.int64_param = value
    elif isinstance(value, float):
        target.double_param = value
    else:
        target.string_param = value
