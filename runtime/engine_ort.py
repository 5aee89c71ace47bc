"""ONNX Runtime, on the CPU or on CUDA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

_NAMES = {
    "CPUExecutionProvider": "onnxruntime-cpu",
    "CUDAExecutionProvider": "onnxruntime-cuda",
}
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


class OrtEngine:
    """One ONNX graph in one ONNX Runtime session.

    Args:
        path: the ONNX file.
        providers: execution providers, the one that must be used first. ONNX Runtime
            falls back to the CPU in silence where that one cannot start; here it is an error.
        threads: threads inside one operator.
        content: what is loaded in place of the file, `path` being its name in messages. Such
            a graph can have no data files beside it.

    Raises:
        EngineError: the provider is not there, or the graph cannot be loaded.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        providers: tuple[str, ...],
        threads: int,
        content: bytes | None = None,
    ) -> None:
        ort = _onnxruntime()
        self.name = _NAMES.get(providers[0], providers[0])
        self._path = path
        _check_available(ort, providers[0])
        options = _options(ort, threads)
        if content is not None:
            # ONNX Runtime would look for a graph's data files in the current directory. Below
            # a file there are none, so external data, which nobody verified, is impossible.
            options.add_session_config_entry(_DATA_FOLDER, str(path))
        graph = str(path) if content is None else content
        try:
            self._session = ort.InferenceSession(graph, options, providers=list(providers))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"{self.name} cannot load {path}: {first_line(error)}") from error
        self._session._model_bytes = None  # kept for good otherwise, beside what was made of it
        used = self._session.get_providers()
        if used[0] != providers[0]:
            raise EngineError(
                f"{providers[0]} could not start and ONNX Runtime fell back to {used[0]}: check "
                "the driver and libraries, or use a device whose engine is onnxruntime-cpu"
            )
        self._outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Raises:
            EngineError: the inputs do not fit the graph, or it fails.
        """
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # as above
            raise EngineError(f"{self.name} failed on {self._path}: {first_line(error)}") from error
        return dict(zip(self._outputs, map(np.asarray, values), strict=True))


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only: they come as exceptions too
    # Threads stop spinning between calls, which frees the CPU at no cost in latency.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "onnxruntime is not installed: pip install 'edgeclip[cpu]' or 'edgeclip[gpu]'"
        ) from error
    return onnxruntime


def _check_available(ort: Any, provider: str) -> None:
    available = ort.get_available_providers()
    if provider not in available:
        mend = "install 'edgeclip[gpu]' instead of 'edgeclip[cpu]'" if "CUDA" in provider else ""
        raise EngineError(
            f"this onnxruntime has no {provider} (it has {', '.join(available)}): "
            f"{mend or 'choose another device'}"
        )
