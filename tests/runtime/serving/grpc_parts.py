"""A real server with a gRPC port, a client for it, and models that wait or fail."""

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.grpc_codec import SERVICE, message_type
from edgeclip.runtime.serving.grpc_server import GrpcListener
from edgeclip.runtime.serving.models import Registry, ServingModel, TensorSpec
from edgeclip.runtime.serving.security import TlsFiles
from edgeclip.runtime.serving.server import in_background
from edgeclip.runtime.wire.messages import Parameter
from edgeclip.runtime.wire.tensors import datatype_of, from_binary, to_binary

SPACE = "5" * 64
TOO_LONG = 20.0  # seconds; for what comes at once on any machine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """A running server: its HTTP address, its gRPC one, a channel to that, its application."""

    url: str
    address: str
    channel: grpc.Channel
    app: App


@contextmanager
def serving(*models: ServingModel, tls: TlsFiles | None = None, **options: Any) -> Iterator[Served]:
    """Serve models; `options` are those of `App`."""
    registry = Registry()
    for model in models:
        registry.add(model)
    app = App(registry, **options)
    listener = GrpcListener(app, host="127.0.0.1", port=0, tls=tls)
    with (
        in_background(app, tls=tls, listeners=(listener,)) as url,
        grpc.insecure_channel(listener.address) as channel,
    ):
        yield Served(url=url, address=listener.address, channel=channel, app=app)


class Held:
    """Gives `data` back once it is let go, and keeps how many rows each run had."""

    name = "held"
    inputs = (TensorSpec(name="data", datatype="UINT8", shape=(-1, 1)),)
    outputs = inputs
    space: str | None = SPACE

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.began = threading.Semaphore(0)
        self.go = threading.Event()

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        self.runs.append(len(inputs["data"]))
        self.began.release()
        assert self.go.wait(TOO_LONG)
        return {"data": inputs["data"]}


class Broken(Held):
    """Fails."""

    name = "broken"

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        raise RuntimeError("a secret")


def infer_message(model: str, inputs: Tensors, parameters: Any = None, **fields: Any) -> Any:
    """A ModelInferRequest with raw inputs; parameters are Python values."""
    parts = [to_binary(array) for array in inputs.values()]
    return message_type("ModelInferRequest")(
        model_name=model,
        inputs=[
            {"name": name, "datatype": datatype_of(array), "shape": array.shape}
            for name, array in inputs.items()
        ],
        raw_input_contents=[part if isinstance(part, bytes) else part.tobytes() for part in parts],
        parameters={key: _parameter(value) for key, value in (parameters or {}).items()},
        **fields,
    )


def rows_message(model: str, rows: int = 1, **fields: Any) -> Any:
    """A request with `data` UINT8 [rows, 1], all 7."""
    return infer_message(model, {"data": np.full((rows, 1), 7, np.uint8)}, **fields)


def outputs_of(response: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a ModelInferResponse."""
    return {
        output.name: from_binary(output.datatype, tuple(output.shape), memoryview(raw))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def begin(channel: grpc.Channel, name: str, message: Any = None, **options: Any) -> Any:
    """Call `name`; a future, which is a `grpc.Call` too. `options` are such as `timeout`."""
    stub: Any = channel.unary_unary(
        f"/{SERVICE}/{name}",
        request_serializer=lambda found: found.SerializeToString(),
        response_deserializer=message_type(f"{name}Response").FromString,
    )
    request = message_type(f"{name}Request")() if message is None else message
    return stub.future(request, **options)


def call(channel: grpc.Channel, name: str, message: Any = None, **options: Any) -> Any:
    """Call `name` and wait for its response."""
    return begin(channel, name, message, **options).result(TOO_LONG)


def refusal(wait: Callable[[], Any]) -> Any:
    """The error of a call, a `grpc.Call` with a code, details and trailers."""
    with pytest.raises(grpc.RpcError) as caught:
        wait()
    return caught.value


def metrics(served: Served) -> str:
    """The server's figures, as Prometheus reads them."""
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text: str = answer.read().decode()
    return text


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something has come about."""
    end = time.monotonic() + TOO_LONG
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.005)


def _parameter(value: object) -> Any:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return message_type("InferParameter")(**{kinds[type(value)]: value})
