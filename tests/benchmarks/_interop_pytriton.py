"""Serve an image tower with PyTriton, NVIDIA's Triton for Python, on the CPU.

    python _interop_pytriton.py TOWER.onnx HTTP_PORT GRPC_PORT METRICS_PORT

The model B-pixels takes what the tower takes and gives its first output, `image_embeds`.
Nothing of EdgeCLIP is imported.
"""

import importlib
import sys
from typing import Any

import numpy as np


def main() -> None:
    """Serve until SIGTERM."""
    path, *ports = sys.argv[1:]
    http, grpc, metrics = map(int, ports)
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
    with pytriton.Triton(config=config) as triton:
        triton.bind(
            model_name="B-pixels",
            infer_func=infer,
            inputs=[tensor(name="pixels", dtype=np.uint8, shape=tuple(source.shape[1:]))],
            outputs=[tensor(name="image_embeds", dtype=np.float32, shape=(-1,))],
            config=settings.ModelConfig(max_batch_size=32),
        )
        triton.serve()


if __name__ == "__main__":
    main()
