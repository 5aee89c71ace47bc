"""Others' clients and servers of the Open Inference Protocol, as used without EdgeCLIP.

    python _interop_others.py ask CLIENT HTTP_ADDRESS GRPC_ADDRESS GIVEN OUT.json
    python _interop_others.py serve TOWER.onnx --port 0

GIVEN holds pixels.npy, texts.json and pictures; OUT.json gets a row for each way to ask, with
the embeddings or the reason why there are none. `serve` is PyTriton, NVIDIA's Triton for Python,
on the CPU and any free port until SIGTERM, and says where; its model B-pixels takes what the tower
takes and gives its first output, `image_embeds`. Nothing of EdgeCLIP is imported.
"""

import asyncio
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Ask = Callable[[str, str, Array], Array]

# Each tower's model, its input and its output.
MODELS = {
    "B-pixels": ("pixels", "image_embeds"),
    "B-image": ("images", "image_embeds"),
    "B-text": ("texts", "text_embeds"),
}


def with_tritonclient(protocol: str, *, binary: bool = True) -> Ask:
    def ask(address: str, model: str, values: Array) -> Array:
        triton: Any = importlib.import_module(f"tritonclient.{protocol}")
        utils: Any = importlib.import_module("tritonclient.utils")
        source, target = MODELS[model]
        client = triton.InferenceServerClient(address.removeprefix("http://"))
        if not (client.is_server_live() and client.is_server_ready()):
            raise RuntimeError("the server is not ready")
        if not client.is_model_ready(model) or client.is_model_ready("none"):
            raise RuntimeError("the wrong models are ready")
        client.get_server_metadata()
        client.get_model_metadata(model)
        options = {"binary_data": binary} if protocol == "http" else {}
        given = triton.InferInput(source, values.shape, utils.np_to_triton_dtype(values.dtype))
        given.set_data_from_numpy(values, **options)
        wanted = triton.InferRequestedOutput(target, **options)
        return np.asarray(client.infer(model, [given], outputs=[wanted]).as_numpy(target))

    return ask


def with_kserve(protocol: str, *, binary: bool = True) -> Ask:
    async def wait(address: str, model: str, values: Array) -> Array:
        kserve: Any = importlib.import_module("kserve")
        source, target = MODELS[model]
        datatype = "BYTES" if values.dtype == object else "UINT8"
        given = kserve.InferInput(source, list(values.shape), datatype)
        given.set_data_from_numpy(values, binary_data=binary)
        request = kserve.InferRequest(model, [given])
        if protocol == "grpc":
            async with kserve.InferenceGRPCClient(address) as client:
                ready = await client.is_server_ready() and await client.is_model_ready(model)
                response = await client.infer(request)
        else:
            config = kserve.RESTConfig(protocol="v2", retries=0)
            async with kserve.InferenceRESTClient(config) as client:
                ready = await client.is_server_ready(address)
                ready = ready and await client.is_model_ready(address, model)
                response = await client.infer(address, request, model_name=model)
        if not ready:
            raise RuntimeError("the server or its model is not ready")
        (output,) = (item for item in response.outputs if item.name == target)
        return np.asarray(output.as_numpy())

    return lambda address, model, values: asyncio.run(wait(address, model, values))


def inputs(folder: Path) -> dict[str, Array]:
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    return {
        "B-pixels": np.load(folder / "pixels.npy"),
        "B-image": np.array([*pictures, None], object)[:-1],
        "B-text": np.array([text.encode() for text in texts], object),
    }


def ask(client: str, http: str, grpc: str, folder: str, out: str) -> None:
    """Every way of one client, on every model."""
    rows, way = [], with_kserve if client == "kserve" else with_tritonclient
    ways = {"http, binary": way("http"), "http, JSON": way("http", binary=False)}
    ways["grpc"] = way("grpc")
    for model, values in inputs(Path(folder)).items():
        for how, way_of in ways.items():
            if (model, how) == ("B-image", "http, JSON"):  # JSON has no bytes, only texts
                continue
            row: dict[str, Any] = {"model": model, "how": how, "embeddings": None, "why": ""}
            try:
                row["embeddings"] = way_of(grpc if how == "grpc" else http, model, values).tolist()
            except Exception as error:  # whatever the client raises is the answer
                row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append(row)
    record = {"version": version(client), "rows": rows}
    Path(out).write_text(json.dumps(record), encoding="utf-8")


def serve(path: str, *_: str) -> None:
    said = os.dup(1)
    os.dup2(2, 1)  # what Triton says must not fill the pipe
    with ExitStack() as stack:  # ports that are free at this moment; Triton does not choose
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (item.getsockname()[1] for item in bound)
    onnxruntime: Any = importlib.import_module("onnxruntime")
    settings: Any = importlib.import_module("pytriton.model_config")
    pytriton: Any = importlib.import_module("pytriton.triton")
    batch: Any = importlib.import_module("pytriton.decorators").batch
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    source, target = session.get_inputs()[0], session.get_outputs()[0]

    @batch  # type: ignore[untyped-decorator]
    def infer(pixels: Any) -> dict[str, Any]:
        (embeddings,) = session.run([target.name], {source.name: pixels})
        return {"image_embeds": embeddings}

    tensor = settings.Tensor
    local = {"http_address": "127.0.0.1", "grpc_address": "127.0.0.1"}
    config = pytriton.TritonConfig(http_port=http, grpc_port=grpc, metrics_port=metrics, **local)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with pytriton.Triton(config=config) as triton:
        triton.bind(
            model_name="B-pixels",
            infer_func=infer,
            inputs=[tensor(name="pixels", dtype=np.uint8, shape=tuple(source.shape[1:]))],
            outputs=[tensor(name="image_embeds", dtype=np.float32, shape=(-1,))],
            config=settings.ModelConfig(max_batch_size=32),
        )
        triton.run()
        os.write(said, f"serving PyTriton at http://127.0.0.1:{http}\n".encode())
        signal.pause()


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    ask(*given) if what == "ask" else serve(*given)
