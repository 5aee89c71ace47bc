"""Messages there and back, and whatever else somebody may send."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from edgeclip.runtime.serving import grpc_codec
from edgeclip.runtime.serving.grpc_codec import (
    decode_request,
    describe_model,
    encode_response,
    message_type,
    parse,
)
from edgeclip.runtime.serving.models import FunctionModel
from edgeclip.runtime.wire.messages import InferResponse, WireError
from edgeclip.runtime.wire.tensors import DTYPES
from tests.echo_function import echo
from tests.runtime.serving.grpc_parts import infer_message, outputs_of

FOLDER = Path(grpc_codec.__file__).parent
NAMES = st.text(min_size=1, max_size=8)
NUMBERS = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_side=0, max_side=4))
)
BYTES = st.lists(st.binary(max_size=9), max_size=5).map(
    lambda items: np.array([*items, None], object)[:-1]
)
ARRAYS = st.dictionaries(NAMES, st.one_of(NUMBERS, BYTES), max_size=4)
PARAMETERS = st.dictionaries(
    NAMES,
    st.one_of(
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=9),
    ),
    max_size=4,
)
PARAMETER = message_type("InferParameter")
# A datatype, its typed contents, and an array of it.
TYPED: list[tuple[str, str, NDArray[Any]]] = [
    ("BOOL", "bool_contents", np.array([True, False, True])),
    ("INT8", "int_contents", np.array([-128, 0, 127], np.int8)),
    ("INT16", "int_contents", np.array([-(2**15), 0, 2**15 - 1], np.int16)),
    ("INT32", "int_contents", np.array([-(2**31), 0, 2**31 - 1], np.int32)),
    ("INT64", "int64_contents", np.array([-(2**63), 0, 2**63 - 1], np.int64)),
    ("UINT8", "uint_contents", np.array([0, 1, 255], np.uint8)),
    ("UINT16", "uint_contents", np.array([0, 1, 2**16 - 1], np.uint16)),
    ("UINT32", "uint_contents", np.array([0, 1, 2**32 - 1], np.uint32)),
    ("UINT64", "uint64_contents", np.array([0, 1, 2**64 - 1], np.uint64)),
    ("FP32", "fp32_contents", np.array([0.5, -1, np.inf], np.float32)),
    ("FP64", "fp64_contents", np.array([0.1, -1, 1e300])),
    ("BYTES", "bytes_contents", np.array([b"", b"\xff", b"jpeg"], object)),
]


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "UINT8", "shape": [2], **fields}


def request(*inputs: dict[str, Any], **fields: Any) -> Message:
    return message_type("ModelInferRequest")(inputs=inputs, **fields)


@given(ARRAYS, PARAMETERS)
def test_a_request_comes_back(inputs: dict[str, NDArray[Any]], parameters: dict[str, Any]) -> None:
    sent = infer_message("m", inputs, parameters=parameters, id="7", outputs=[{"name": "y"}])
    found = decode_request(parse("ModelInferRequest", sent.SerializeToString()))
    assert (found.model, found.id, found.outputs) == ("m", "7", ("y",))
    assert found.parameters == parameters
    assert {key: type(value) for key, value in found.parameters.items()} == {
        key: type(value) for key, value in parameters.items()
    }
    assert list(found.inputs) == list(inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(found.inputs[name], array)
        assert not found.inputs[name].flags.writeable


@given(ARRAYS, PARAMETERS)
def test_a_response_comes_back(outputs: dict[str, NDArray[Any]], parameters: Any) -> None:
    response = InferResponse(model="m", outputs=outputs, parameters=parameters, id="7")
    found = parse("ModelInferResponse", encode_response(response).SerializeToString())
    assert (found.model_name, found.model_version, found.id) == ("m", "1", "7")
    assert decode_request(request(parameters=found.parameters)).parameters == parameters
    back = outputs_of(found)
    assert list(back) == list(outputs)
    for name, array in outputs.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(("datatype", "field", "array"), TYPED, ids=[row[0] for row in TYPED])
def test_typed_contents_are_read(datatype: str, field: str, array: NDArray[Any]) -> None:
    sent = tensor(datatype=datatype, shape=[3, 1], contents={field: array.tolist()})
    found = decode_request(request(sent)).inputs["x"]
    np.testing.assert_array_equal(found, array.reshape(3, 1))
    assert found.dtype == array.dtype


def test_every_datatype_but_fp16_has_typed_contents() -> None:
    assert {row[0] for row in TYPED} == {*DTYPES, "BYTES"} - {"FP16"}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (request(tensor(), raw_input_contents=[b"1"]), "takes 2 bytes, not 1"),
        (request(tensor(), raw_input_contents=[b"12", b"3"]), "1 inputs have 2 raw"),
        (request(tensor(name=""), raw_input_contents=[b"12"]), "no name"),
        (request(tensor(), tensor(), raw_input_contents=[b"12", b"34"]), "comes twice"),
        (request(tensor(shape=[-1]), raw_input_contents=[b"12"]), "below 0"),
        (request(tensor(shape=[2**62, 2**62]), raw_input_contents=[b"12"]), "too large"),
        (request(tensor(datatype="BF16"), raw_input_contents=[b"12"]), "unknown"),
        (request(tensor(datatype="FP16"), raw_input_contents=[]), "send it raw"),
        (request(tensor()), "takes 2 bytes, not 0"),
        (request(tensor(contents={"uint_contents": [1, 256]})), "out of the range"),
        (request(tensor(contents={"uint_contents": [1]})), "takes 2 bytes, not 1"),
        (request(tensor(contents={"int_contents": [1, 2]})), "does not belong"),
        (request(tensor(contents={}), raw_input_contents=[b"12"]), "send one of them"),
        (request(*[tensor()] * 257), "too many"),
        (request(parameters={"a": PARAMETER()}), "has no value"),
        (request(parameters={"a": PARAMETER(double_param=float("nan"))}), "finite"),
        (request(outputs=[{"name": "y"}] * 2), "asked for twice"),
        (
            request(tensor(datatype="BYTES", shape=[2**40]), raw_input_contents=[b"1234"]),
            "too few",
        ),
    ],
)
def test_what_is_no_request_is_refused(message: Message, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode_request(message)


@given(
    st.builds(infer_message, st.just("m"), ARRAYS, parameters=PARAMETERS),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4),
)
def test_damaged_messages_are_read_or_refused(
    message: Message, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(message.SerializeToString())
    for place, value in damage:
        if data:
            data[place % len(data)] = value
    read_or_refuse(bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refuse(data)


def read_or_refuse(data: bytes) -> None:
    try:
        found = decode_request(parse("ModelInferRequest", data))
    except WireError:
        return
    assert sum(array.size for array in found.inputs.values()) <= len(data)


def test_a_model_is_described() -> None:
    found: Any = describe_model(FunctionModel(echo, "echo"))
    assert (found.name, list(found.versions), found.platform) == ("echo", ["1"], "edgeclip")
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in found.inputs] == [
        ("data", "UINT8", [-1, -1])
    ]


def test_messages_are_apart_from_those_of_client_libraries() -> None:
    file = message_type("ModelInferRequest").DESCRIPTOR.file
    assert file.package == "inference"
    assert file.pool is not descriptor_pool.Default()


def test_the_binary_form_is_that_of_the_proto_file(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    made = tmp_path / "made.binpb"
    options = [f"-I{FOLDER}", f"--descriptor_set_out={made}", "grpc_oip.proto"]
    assert protoc.main(["protoc", *options]) == 0
    assert made.read_bytes() == (FOLDER / "grpc_oip.binpb").read_bytes()
