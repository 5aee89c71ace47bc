"""The protocol of an inference engine, and how a device's engine is opened."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgeclip.runtime.arrays import Outputs, Tensors
from edgeclip.runtime.errors import EngineError

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile


class Engine(Protocol):
    """A loaded graph that computes named arrays from named arrays."""

    @property
    def name(self) -> str:
        """Name of the engine, as in `DeviceProfile.engine`."""
        ...

    def run(self, feeds: Tensors) -> Outputs:
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
    """Load an ONNX graph with the device's engine.

    Args:
        path: the ONNX file.
        device: sets the engine and its options.
        content: loaded instead of the file; `path` is then its name in messages.
        data_folder: folder of the graph's external data, if it is loaded from `content`. The
            caller has verified these files; without a folder, external data is refused.
        context_length: for a text tower, the longest text in tokens; engines that are built
            for a range of shapes need it.

    Raises:
        EngineError: the engine cannot load the graph, or cannot run ONNX graphs.
        MissingExtraError: the engine's package is not installed.
    """
    if device.engine in ("tensorrt", "tensorrt-rtx"):
        raise EngineError(
            f"device {device.name!r} runs TensorRT engines, not the graph {path}: build them with "
            f"`edgeclip build`, or use a device whose engine is onnxruntime-{device.engine}"
        )
    if device.engine == "openvino":
        from edgeclip.runtime.engines.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(path, device=device, content=content, data_folder=data_folder)
    from edgeclip.runtime.engines.onnxruntime_engine import open_ort_engine

    return open_ort_engine(
        path,
        device=device,
        content=content,
        data_folder=data_folder,
        context_length=context_length,
    )
