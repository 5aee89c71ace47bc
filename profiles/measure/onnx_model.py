"""Run somebody else's ONNX file with made-up inputs, and find the files that hold its weights."""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.engines.onnxruntime_engine import (
    import_onnxruntime,
    precision_of,
    session_options,
)
from edgeclip.runtime.engines.providers import GraphFacts, provider_of
from edgeclip.runtime.errors import EngineError, InputError, first_line

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile

_DTYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


class OnnxModel:
    """An ONNX graph in an ONNX Runtime session, with generated inputs of any batch size.

    The batch is the first axis of each input whose first axis is dynamic. A graph without a
    dynamic batch axis takes only the batch size of its first input.

    Args:
        path: the ONNX file.
        device: provider and threads.
        axes: size of each other dynamic axis by its name, or INPUT.PLACE if it has no name.

    Raises:
        EngineError: ONNX Runtime cannot load it on the device's provider.
        InputError: an input that cannot be generated.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, device: "DeviceProfile", axes: dict[str, int]) -> None:
        self._path = path
        self._session = _open_session(path, device)
        self._inputs = [_Input(path, item, axes) for item in self._session.get_inputs()]
        if not self._inputs:
            raise InputError(f"{path} has no inputs: there is nothing to measure")
        dynamic = [item for item in self._inputs if item.shape[:1] == (None,)]
        self._first = (dynamic or self._inputs)[0]
        self._rest: dict[int, dict[str, NDArray[Any]]] = {}  # by batch size

    @property
    def provider(self) -> str:
        """The execution provider that the session reports."""
        return str(self._session.get_providers()[0])

    def make_batch(self, size: int) -> NDArray[Any]:
        """Make the first input for a batch.

        Raises:
            InputError: the graph takes only another batch size.
        """
        values = self._first.values(size)
        if values.shape[:1] != (size,):
            only = values.shape[0] if values.ndim else "no"
            raise InputError(f"{self._path} takes batches of {only} only, not of {size}")
        return values

    def run(self, batch: NDArray[Any]) -> object:
        """Run the graph once.

        Raises:
            EngineError: it failed.
        """
        size = len(batch)
        if size not in self._rest:
            others = (item for item in self._inputs if item is not self._first)
            self._rest[size] = {item.name: item.values(size) for item in others}
        try:
            return self._session.run(None, {self._first.name: batch, **self._rest[size]})
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"{self._path} failed: {first_line(error)}") from error


class _Input:
    """Name, dtype and shape of a graph's input; None in the shape is the batch axis."""

    def __init__(self, path: Path, item: Any, axes: dict[str, int]) -> None:
        if item.type not in _DTYPES:
            raise InputError(
                f"{path} has an input {item.name!r} of {item.type}, which is not made up"
            )
        shape: list[int | None] = []
        for place, side in enumerate(item.shape):
            if isinstance(side, int):
                shape.append(side)
            elif place == 0:
                shape.append(None)
            else:
                name = side or f"{item.name}.{place}"
                if name not in axes:
                    raise InputError(
                        f"{path} leaves open how long the axis {name!r} of its input "
                        f"{item.name!r} is: say so with --peer-axis {name}=SIZE"
                    )
                shape.append(axes[name])
        if math.prod(side for side in shape if side is not None) < 1:
            raise InputError(
                f"{path} has an input {item.name!r} of shape {item.shape}: nothing to run"
            )
        self.name = str(item.name)
        self.dtype = np.dtype(_DTYPES[item.type])
        self.shape = tuple(shape)

    def values(self, size: int) -> NDArray[Any]:
        """Generate a batch: noise for floats and pixels, ones for what may be an index."""
        shape = [size if side is None else side for side in self.shape]
        random = np.random.default_rng(0)
        if self.dtype.kind == "f":
            return random.standard_normal(shape).astype(self.dtype)
        if self.dtype == np.uint8:
            return random.integers(0, 256, shape, dtype=np.uint8)
        return np.ones(shape, self.dtype)


def _open_session(path: Path, device: "DeviceProfile") -> Any:
    """Load the graph on the device's provider, without falling back to another one."""
    ort, provider = import_onnxruntime(), provider_of(device)
    available = ort.get_available_providers()
    if provider.name not in available:
        raise EngineError(
            f"this onnxruntime has no {provider.name} (it has {', '.join(available)}): install "
            f"{provider.package}"
        )
    chain = [(provider.name, provider.options(device, GraphFacts(precision=precision_of(path))))]
    options = session_options(ort, device.threads)
    try:
        session = ort.InferenceSession(str(path), options, providers=chain, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"cannot load {path}: {first_line(error)}") from error
    used = session.get_providers()[0]
    if used != provider.name:
        raise EngineError(f"{path}: ONNX Runtime took {used} in place of {provider.name}")
    return session


# Wire types of protocol buffers (protobuf.dev/programming-guides/encoding).
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
# For each message type of onnx.proto the fields to descend into, down to the entries
# ("location", FILE) of a TensorProto's external_data.
_NESTED_FIELDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # fields of an external_data entry


def data_files(model: Path) -> tuple[Path, ...]:
    """List the external data files that hold an ONNX file's weights, sorted; usually none.

    The file is scanned without the package onnx, which the runtime does not depend on.

    Raises:
        InputError: the file cannot be read, or is not an ONNX graph.
    """
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = set(_locations(data, 0, len(data), "model"))
    except (IndexError, UnicodeDecodeError):
        raise InputError(f"{model} is no ONNX graph, or not all of it") from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"cannot read {model}: {error}") from None
    return tuple(sorted(model.parent / name for name in names))


def _locations(data: mmap.mmap, start: int, end: int, message: str) -> Iterator[str]:
    """Yield the value of each external_data entry "location" inside a message."""
    for number, first, last in _byte_fields(data, start, end):
        inner = _NESTED_FIELDS[message].get(number)
        if inner == "entry":
            entry = {field: data[a:b] for field, a, b in _byte_fields(data, first, last)}
            if entry.get(_KEY) == b"location":
                yield entry[_VALUE].decode()
        elif inner is not None:
            yield from _locations(data, first, last, inner)


def _byte_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of each length-delimited field of a message.

    Raises:
        IndexError: the bytes are not a whole message.
    """
    at = start
    while at < end:
        tag, at = _varint(data, at)
        wire_type = tag & 7
        if wire_type == _BYTES:
            size, at = _varint(data, at)
            if at + size > end:
                raise IndexError
            yield tag >> 3, at, at + size
            at += size
        elif wire_type == _VARINT:
            _, at = _varint(data, at)
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
        else:
            raise IndexError
    if at > end:
        raise IndexError


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Read a number of seven bits per byte, lowest first; return it and the next position."""
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError
