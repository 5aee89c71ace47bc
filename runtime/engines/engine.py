"""What an inference engine is, and how the one that suits a device is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile


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


def open_engine(
    path: Path,
    *,
    device: "DeviceProfile",
    content: bytes | None = None,
    data_folder: Path | None = None,
    context_length: int | None = None,
) -> Engine:
    """Load a graph with the engine that the device asks for.

    Args:
        path: the ONNX file.
        device: says which engine, and its options.
        content: what is loaded in place of the file, `path` being its name in messages.
        data_folder: where the data files of such a graph lie, which the caller has verified;
            without it the graph can have none.
        context_length: the longest text in tokens, where the graph is a text tower; engines
            that are built for a range of shapes need it.

    Raises:
        EngineError: the engine cannot load the graph, or cannot run ONNX graphs.
        MissingExtraError: the engine's package is not installed.
    """
    if device.engine in ("tensorrt", "tensorrt-rtx"):
        raise EngineError(
            f"device {device.name!r} runs TensorRT engines, not the graph {path}: build them with "
            f"`edgeclip build`, or use a device whose engine is onnxruntime-{device.engine}"
        )
    from edgeclip.runtime.engines.onnxruntime_engine import open_ort_engine

    return open_ort_engine(
        path,
        device=device,
        content=content,
        data_folder=data_folder,
        context_length=context_length,
    )
