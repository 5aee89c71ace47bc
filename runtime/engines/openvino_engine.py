"""The OpenVINO engine: run an ONNX graph on the CPU with Intel's own package.

OpenVINO reads ONNX itself, folds quantize and dequantize pairs into int8 kernels, and knows AMX and
bfloat16 (https://docs.openvino.ai, "CPU Device").
"""

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.runtime.arrays import Outputs, Tensors
from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile


class OpenVinoEngine:
    """One ONNX graph, compiled for this CPU.

    Args:
        path: the ONNX file.
        device: sets the threads, and whether float operators compute in bfloat16.
        content: loaded instead of the file; `path` is then its name in messages.
        data_folder: folder of the graph's external data, if there is any. OpenVINO finds it beside
            a file only, so `path` is loaded then; the caller has verified these files.

    Raises:
        EngineError: the graph cannot be loaded, or the processor has no bfloat16.
        MissingExtraError: openvino is not installed.
    """

    name = "openvino"

    def __init__(
        self,
        path: Path,
        *,
        device: "DeviceProfile",
        content: bytes | None = None,
        data_folder: Path | None = None,
    ) -> None:
        core = _core()
        if device.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                f"device {device.name!r} asks for bfloat16, which this processor lacks: "
                "drop it from the profile"
            )
        self._path = path
        settings = {
            # By default it computes in bfloat16 wherever the processor can.
            "INFERENCE_PRECISION_HINT": "bf16" if device.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": device.threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Bound to cores, several processes would share some and leave others idle.
            "ENABLE_CPU_PINNING": False,
        }
        source = content if content is not None and data_folder is None else str(path)
        try:
            self._compiled = core.compile_model(core.read_model(source), "CPU", settings)
        except Exception as error:  # RuntimeError, with a C++ trace in its message
            raise EngineError(f"openvino cannot load {path}: {_reason(error)}") from error
        self._outputs = [item.any_name for item in self._compiled.outputs]
        self._requests = threading.local()  # a request computes one thing at a time

    def run(self, feeds: Tensors) -> Outputs:
        """Run the graph once.

        Raises:
            EngineError: the inputs do not fit the graph, or it fails.
        """
        try:
            request = getattr(self._requests, "request", None)
            if request is None:
                request = self._requests.request = self._compiled.create_infer_request()
            found = request.infer(dict(feeds), share_inputs=True)
        except Exception as error:  # as above
            raise EngineError(f"openvino failed on {self._path}: {_reason(error)}") from error
        return {name: np.array(found[name]) for name in self._outputs}


@functools.cache
def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            "openvino is not installed: pip install 'edgeclip[openvino]'"
        ) from error
    return openvino.Core()


def _reason(error: Exception) -> str:
    """The last line of a message, which begins with places in OpenVINO's own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)
