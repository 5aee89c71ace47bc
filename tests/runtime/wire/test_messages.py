"""Messages survive the wire; what is no message is refused in words."""

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgeclip.runtime.wire.messages import (
    JSON_LENGTH_HEADER,
    InferRequest,
    InferResponse,
    WireError,
    decode_error,
    decode_request,
    decode_response,
    encode_error,
    encode_request,
    encode_response,
    json_length,
)
from edgeclip.runtime.wire.tensors import DTYPES, MAX_BYTES_ELEMENTS

Headers = dict[str, str]

names = st.text(min_size=1, max_size=12)
int64s = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
parameters = st.dictionaries(names, st.text() | int64s | finite | st.booleans(), max_size=4)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
numeric = st.sampled_from(list(DTYPES.values())).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
byte_arrays = hnp.arrays(object, shapes, elements=st.binary(max_size=20))
tensors = st.dictionaries(names, numeric | byte_arrays, max_size=4)


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Equal to the last bit, NaN included."""
    if one.dtype.kind == "O":
        return one.shape == other.shape and one.tolist() == other.tolist()
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def length_of(headers: Headers) -> int | None:
    return json_length(headers.get(JSON_LENGTH_HEADER))


def message(head: object, rest: bytes = b"") -> tuple[bytes, int]:
    text = json.dumps(head).encode()
    return text + rest, len(text)


def read_or_refuse(body: bytes, length: int | None) -> None:
    """Let anything but a `WireError` through."""
    with contextlib.suppress(WireError):
        decode_request("m", body, length)
    with contextlib.suppress(WireError):
        decode_response(body, length)


def one_input(rest: bytes = b"", **changes: object) -> tuple[bytes, int]:
    """A request with one input of two FP32, changed."""
    item = {
        "name": "x",
        "datatype": "FP32",
        "shape": [2],
        "parameters": {"binary_data_size": 8},
    }
    return message({"inputs": [item | changes]}, rest or bytes(8))


@given(tensors, parameters, st.text(), st.lists(names, unique=True, max_size=3), st.booleans())
def test_requests_survive(
    inputs: dict[str, NDArray[Any]],
    parameters: dict[str, Any],
    request_id: str,
    outputs: list[str],
    binary: bool,
) -> None:
    parameters.pop("binary_data_output", None)
    request = InferRequest(
        model="m",
        inputs=inputs,
        parameters=parameters,
        id=request_id,
        outputs=tuple(outputs),
        binary=binary,
    )
    headers, body = encode_request(request)
    found = decode_request("m", body, length_of(headers))
    assert list(found.inputs) == list(inputs)
    assert all(same(found.inputs[name], array) for name, array in inputs.items())
    assert (found.parameters, found.id, found.outputs) == (parameters, request_id, tuple(outputs))
    expected = frozenset(outputs if binary else ()) if outputs else binary
    assert found.binary == expected
    assert [type(value) for value in found.parameters.values()] == [
        type(value) for value in parameters.values()
    ]


@given(tensors, parameters, st.text(), st.data())
def test_responses_survive(
    outputs: dict[str, NDArray[Any]],
    parameters: dict[str, Any],
    answer_id: str,
    data: st.DataObject,
) -> None:
    binary = data.draw(st.booleans() | st.frozensets(st.sampled_from(sorted(outputs) or ["x"])))
    response = InferResponse(model="m", outputs=outputs, parameters=parameters, id=answer_id)
    try:
        headers, body = encode_response(response, binary)
    except WireError:  # NaN, or bytes that are no text
        assert binary is not True
        encode_response(response)
        return
    found = decode_response(body, length_of(headers))
    assert (found.model, found.parameters, found.id) == ("m", parameters, answer_id)
    assert list(found.outputs) == list(outputs)
    for name, array in outputs.items():
        got = found.outputs[name]
        assert same(got, array) or (array.dtype.kind == "f" and np.array_equal(got, array))


def test_large_tensors_are_views_of_the_body() -> None:
    pixels = np.arange(150_528, dtype=np.float32).reshape(1, 3, 224, 224)
    headers, body = encode_request(InferRequest(model="m", inputs={"pixels": pixels}))
    found = decode_request("m", body, length_of(headers)).inputs["pixels"]
    assert np.shares_memory(found, np.frombuffer(body, np.uint8))
    assert found.flags.aligned
    assert not found.flags.writeable


def test_arrays_without_order_are_sent_in_order() -> None:
    big = np.arange(6, dtype=">f8").reshape(2, 3).T
    headers, body = encode_request(InferRequest(model="m", inputs={"x": big}))
    found = decode_request("m", body, length_of(headers)).inputs["x"]
    assert found.tolist() == big.tolist()


def test_json_alone_is_understood() -> None:
    body, _ = message(
        {
            "id": "7",
            "inputs": [
                {"name": "flat", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4.5]},
                {"name": "nested", "datatype": "INT8", "shape": [2, 2], "data": [[1, 2], [3, -4]]},
                {"name": "texts", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]},
                {"name": "flags", "datatype": "BOOL", "shape": [1], "data": [True]},
                {"name": "none", "datatype": "UINT64", "shape": [0, 3], "data": []},
                {"name": "one", "datatype": "UINT64", "shape": [], "data": [2**64 - 1]},
            ],
            "outputs": [{"name": "a", "parameters": {"binary_data": True}}, {"name": "b"}],
        }
    )
    found = decode_request("m", body, None)
    assert found.id == "7"
    assert found.inputs["flat"].tolist() == [[1, 2], [3, 4.5]]
    assert found.inputs["nested"].tolist() == [[1, 2], [3, -4]]
    assert found.inputs["texts"].tolist() == [b"a", "é".encode()]
    assert found.inputs["flags"].tolist() == [True]
    assert found.inputs["none"].shape == (0, 3)
    assert found.inputs["one"].item() == 2**64 - 1
    assert found.outputs == ("a", "b")
    assert found.binary == frozenset({"a"})


def test_bytes_in_base64_are_understood() -> None:
    described = {"name": "x", "datatype": "BYTES", "shape": [2]}
    coded = {**described, "parameters": {"content_type": "base64"}, "data": ["AP9Q", ""]}
    body, _ = message({"inputs": [coded]})
    assert decode_request("m", body, None).inputs["x"].tolist() == [b"\x00\xffP", b""]
    as_text = {**coded, "parameters": {"content_type": "str"}}
    body, _ = message({"inputs": [as_text]})
    assert decode_request("m", body, None).inputs["x"].tolist() == [b"AP9Q", b""]


HOSTILE: dict[str, tuple[bytes, int | None]] = {
    "empty": (b"", None),
    "no JSON": (b"\x00\xff", None),
    "no base64": message(
        {
            "inputs": [
                {
                    **{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a?b"]},
                    "parameters": {"content_type": "base64"},
                }
            ]
        }
    ),
    "numbers in base64": message(
        {
            "inputs": [
                {
                    **{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
                    "parameters": {"content_type": "base64"},
                }
            ]
        }
    ),
    "not an object": (b"[]", None),
    "UTF-16": ('{"inputs": []}'.encode("utf-16"), None),
    "deep lists": (b"[" * 200_000, None),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None),
    "NaN": (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', None),
    "a key twice": (b'{"inputs":[],"inputs":[]}', None),
    "a very long number": (b'{"id":' + b"9" * 5000 + b"}", None),
    "JSON longer than the body": (b"{}", 3),
    "negative length": (b"{}", -1),
    "inputs no list": message({"inputs": {}}),
    "inputs no objects": message({"inputs": [1]}),
    "an input twice": message(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [0], "data": []}] * 2}
    ),
    "too many inputs": message({"inputs": [{}] * 1000}),
    "no name": one_input(name=""),
    "name no text": one_input(name=3),
    "unknown datatype": one_input(datatype="FP8"),
    "datatype no text": one_input(datatype=["FP32"]),
    "shape no list": one_input(shape=2),
    "shape of floats": one_input(shape=[2.0]),
    "shape of booleans": one_input(shape=[True]),
    "negative shape": one_input(shape=[-1]),
    "another shape": one_input(shape=[3]),
    "huge shape": one_input(shape=[2**62, 2**62]),
    "huge empty shape": one_input(shape=[0, 2**63], parameters={"binary_data_size": 0}),
    "shape of many axes": one_input(shape=[1] * 70),
    "huge whole number in a shape": one_input(shape=[10**4000]),
    "size too small": one_input(parameters={"binary_data_size": 4}),
    "size too large": one_input(parameters={"binary_data_size": 10**30}),
    "negative size": one_input(parameters={"binary_data_size": -8}),
    "size true": one_input(parameters={"binary_data_size": True}),
    "size a text": one_input(parameters={"binary_data_size": "8"}),
    "neither data nor size": one_input(parameters={}),
    "both data and size": one_input(data=[1, 2]),
    "parameters no object": one_input(parameters=[1]),
    "a parameter null": message({"parameters": {"top": None}}),
    "a parameter infinite": (b'{"parameters":{"top":1e999}}', None),
    "a parameter beyond int64": message({"parameters": {"top": 2**64}}),
    "truncated": one_input(bytes(7)),
    "bytes left over": one_input(bytes(9)),
    "bytes after JSON alone": message({"inputs": []}, b"x"),
    "data beyond the dtype": one_input(datatype="INT8", shape=[1], parameters={}, data=[300]),
    "data of fractions": one_input(datatype="INT8", shape=[1], parameters={}, data=[1.5]),
    "data of booleans": one_input(shape=[1], parameters={}, data=[True]),
    "data of numbers for flags": one_input(datatype="BOOL", shape=[1], parameters={}, data=[1]),
    "data of numbers for texts": one_input(datatype="BYTES", shape=[1], parameters={}, data=[1]),
    "data beyond every float": one_input(shape=[1], parameters={}, data=[10**400]),
    "data beyond FP16": one_input(datatype="FP16", shape=[1], parameters={}, data=[1e6]),
    "ragged data": one_input(shape=[2, 2], parameters={}, data=[[1, 2], [3]]),
    "data too deep": one_input(shape=[2], parameters={}, data=[[1], [2]]),
    "data no list": one_input(shape=[1], parameters={}, data=1),
    "half a surrogate": (
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}',
        None,
    ),
    "an output twice": message({"outputs": [{"name": "a"}, {"name": "a"}]}),
    "binary_data no flag": message({"outputs": [{"name": "a", "parameters": {"binary_data": 1}}]}),
    "binary_data_output no flag": message({"parameters": {"binary_data_output": "yes"}}),
    "id no text": message({"id": 5}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bodies_are_refused(case: str) -> None:
    body, length = HOSTILE[case]
    with pytest.raises(WireError) as found:
        decode_request("m", body, length)
    assert len(str(found.value)) < 400
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ([2], struct.pack("<I", 1) + b"a"),
        ([1], struct.pack("<I", 2) + b"a"),
        ([1], struct.pack("<I", 2**32 - 1) + b"a"),
        ([1], struct.pack("<I", 0) + b"a"),
        ([1], b"\x00\x00"),
        ([2**40], b"\x00" * 8),
        ([MAX_BYTES_ELEMENTS + 1], b"\x00" * 4 * (MAX_BYTES_ELEMENTS + 1)),
    ],
)
def test_bytes_that_do_not_fit_their_lengths_are_refused(shape: list[int], content: bytes) -> None:
    changes = {"datatype": "BYTES", "shape": shape}
    body, length = one_input(content, **changes, parameters={"binary_data_size": len(content)})
    with pytest.raises(WireError, match="BYTES"):
        decode_request("m", body, length)


def test_flags_other_than_0_and_1_are_refused() -> None:
    parameters = {"binary_data_size": 2}
    body, length = one_input(b"\x01\x02", datatype="BOOL", parameters=parameters)
    with pytest.raises(WireError, match="0 and 1"):
        decode_request("m", body, length)


@given(st.binary(max_size=200), st.none() | st.integers(-1, 250))
def test_no_bytes_raise_anything_else(body: bytes, length: int | None) -> None:
    read_or_refuse(body, length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
KEYS = ("name", "datatype", "shape", "data", "parameters", "binary_data_size", "inputs", "outputs")
known = st.sampled_from([*DTYPES, "BYTES", *KEYS])
tensor_like = st.dictionaries(
    st.sampled_from(KEYS),
    json_values
    | known
    | st.lists(st.integers(0, 4), max_size=3)
    | st.fixed_dictionaries({"binary_data_size": st.integers(-1, 40)}),
)


@given(
    st.dictionaries(
        st.sampled_from(("inputs", "outputs", "parameters", "id", "model_name")),
        json_values | st.lists(tensor_like, max_size=3),
    ),
    st.binary(max_size=40),
)
def test_no_json_raises_anything_else(head: dict[str, Any], rest: bytes) -> None:
    read_or_refuse(*message(head, rest))


@given(st.data())
def test_changed_messages_raise_nothing_else(data: st.DataObject) -> None:
    inputs = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "t": np.array([b"ab", b""], object),
    }
    headers, body = encode_request(InferRequest(model="m", inputs=inputs))
    start = length_of(headers)
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    read_or_refuse(bytes(changed[:cut]), start)


@pytest.mark.parametrize("text", ["-1", "1.5", "", "²", "9" * 30, "0x10", " 1"])
def test_length_headers_other_than_numbers_are_refused(text: str) -> None:
    with pytest.raises(WireError, match="whole number"):
        json_length(text)
    assert json_length(None) is None
    assert json_length(b"12") == 12


@pytest.mark.parametrize(
    "array",
    [
        np.array(["text"]),
        np.array([1j]),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.array([b"fixed"]),
        np.array(["no bytes"], object),
        np.array([None], object),
    ],
)
def test_arrays_that_cannot_be_said_are_refused(array: NDArray[Any]) -> None:
    with pytest.raises(WireError):
        encode_request(InferRequest(model="m", inputs={"x": array}))


def test_parameters_that_cannot_be_said_are_refused() -> None:
    for value in (float("nan"), b"bytes", object()):
        with pytest.raises(WireError, match="parameter"):
            encode_request(InferRequest(model="m", inputs={}, parameters={"p": value}))  # type: ignore[dict-item]


def test_errors_have_their_own_body() -> None:
    headers, body = encode_error('what "was" wrong')
    assert headers == {"Content-Type": "application/json"}
    assert decode_error(body) == 'what "was" wrong'
    assert decode_error(b"<html>") == ""
    assert decode_error(b'{"error": 5}') == ""
