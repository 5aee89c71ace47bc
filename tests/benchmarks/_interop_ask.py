"""Ask an Open Inference Protocol server with one of its other clients.

    python _interop_ask.py CLIENT HTTP_ADDRESS GRPC_ADDRESS GIVEN OUT.json

GIVEN holds pixels.npy, texts.json and pictures; OUT.json gets a row for each way to ask, with
the embeddings or the reason why there are none. Nothing of EdgeCLIP is imported: this is what
somebody without it would write.
"""

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
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
    """NVIDIA's client for Triton."""

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
    """KServe's own client."""

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


READERS: dict[str, dict[str, Ask]] = {
    "tritonclient": {
        "http, binary": with_tritonclient("http"),
        "http, JSON": with_tritonclient("http", binary=False),
        "grpc": with_tritonclient("grpc"),
    },
    "kserve": {
        "http, binary": with_kserve("http"),
        "http, JSON": with_kserve("http", binary=False),
        "grpc": with_kserve("grpc"),
    },
}


def inputs(folder: Path) -> dict[str, Array]:
    """What each model is given."""
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    return {
        "B-pixels": np.load(folder / "pixels.npy"),
        "B-image": np.array([*pictures, None], object)[:-1],
        "B-text": np.array([text.encode() for text in texts], object),
    }


def main() -> None:
    """Every way of one client, on every model."""
    client, http, grpc, folder, out = sys.argv[1:]
    rows = []
    for model, values in inputs(Path(folder)).items():
        for how, ask in READERS[client].items():
            if (model, how) == ("B-image", "http, JSON"):  # JSON has no bytes, only texts
                continue
            row: dict[str, Any] = {"model": model, "how": how, "embeddings": None, "why": ""}
            try:
                row["embeddings"] = ask(grpc if how == "grpc" else http, model, values).tolist()
            except Exception as error:  # whatever the client raises is the answer
                row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append(row)
    record = {"version": version(client), "rows": rows}
    Path(out).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
