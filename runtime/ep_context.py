"""EP contexts: ONNX files whose graph is what a provider compiled, so that it starts at once.

See onnxruntime.ai/docs/execution-providers/EP-Context-Design.html. Such a file runs on the
kind of hardware, and the versions of the provider, that made it. It is loaded like any graph.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.engine_ort import open_ort_engine
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.providers import PROVIDERS, provider_of

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


def embed_context(
    graph: Path, *, device: "DeviceProfile", target: Path, context_length: int | None = None
) -> None:
    """Compile a graph with a device's provider and write the result as one ONNX file.

    The file is loaded once before it appears under its name: not every build of a provider
    can read what it writes.

    Args:
        graph: the ONNX file.
        device: where the file will run; its provider must be here, and its hardware too.
        target: the file to write; an existing one is replaced.
        context_length: the longest text in tokens, where the graph is a text tower.

    Raises:
        EngineError: the provider has no contexts, is not there, or cannot compile the graph
            or read it back.
        InputError: `target` cannot be written.
        MissingExtraError: onnxruntime is not installed.
    """
    provider = provider_of(device)
    if not provider.has_context:
        able = ", ".join(engine for engine, item in PROVIDERS.items() if item.has_context)
        raise EngineError(
            f"{provider.name} compiles nothing ahead of time, so there is no context to embed: "
            f"use a device whose engine is one of {able}"
        )
    with atomic_file(target) as file:
        open_ort_engine(
            graph,
            device=device,
            context_length=context_length,
            entries={
                "ep.context_enable": "1",
                "ep.context_file_path": str(file),
                "ep.context_embed_mode": "1",
            },
        )
        if not file.is_file():
            raise EngineError(
                f"{provider.name} compiled no context of {graph}: where its shapes vary, give "
                "their bounds"
            )
        try:
            open_ort_engine(file, device=device)
        except EngineError as error:
            raise EngineError(
                f"{provider.name} cannot read back the context that it made of {graph}: install "
                f"another build of it: {error}"
            ) from error
