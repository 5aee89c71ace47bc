"""What an inference engine is, and how the one that suits a device is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


class Engine(Protocol):
    """A loaded graph that turns named arrays into named arrays."""

    @property
    def name(self) -> str:
        """The kind of engine, as a `DeviceProfile` calls it."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Raises:
            EngineError: the inputs do not fit the graph, or it fails.
        """
        ...


def open_engine(path: Path, *, device: "DeviceProfile", content: bytes | None = None) -> Engine:
    """Load a graph with the engine that the device asks for.

    Args:
        path: the ONNX file.
        device: says which engine, and how many threads.
        content: what is loaded in place of the file, `path` being its name in messages.

    Raises:
        EngineError: the engine cannot load the graph, or this software has no such engine.
        MissingExtraError: the engine's package is not installed.
    """
    from edgeclip.runtime.engine_ort import OrtEngine

    if device.engine == "onnxruntime-cpu":
        providers: tuple[str, ...] = ("CPUExecutionProvider",)
    elif device.engine == "onnxruntime-cuda":
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    else:
        raise EngineError(
            f"device {device.name!r} asks for the engine {device.engine!r}, which this version "
            "cannot run: use a device whose engine is onnxruntime-cpu or onnxruntime-cuda"
        )
    return OrtEngine(path, providers=providers, threads=device.threads, content=content)
