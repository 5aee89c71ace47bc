"""What every ONNX Runtime session is made with: its options, and how a provider is reached.

A provider is either built into onnxruntime or a plugin: a package of its own that is
registered with a plain onnxruntime (onnxruntime.ai/docs/execution-providers/plugin-ep-libraries).
A plugin must be asked for by device; by name, ONNX Runtime would use the CPU instead and say
nothing.
"""

import importlib
from pathlib import Path
from typing import Any

from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_registered: set[str] = set()  # onnxruntime keeps a plugin's library until the process ends


def import_onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "onnxruntime is not installed: pip install 'edgeclip[cpu]' or 'edgeclip[gpu]'"
        ) from error
    return onnxruntime


def session_options(ort: Any, threads: int) -> Any:
    """Options of a session with so many threads inside one operator."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only: they come as exceptions too
    # Threads stop spinning between calls, which frees the CPU at no cost in latency.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def data_entries(path: Path, content: bytes | None, data_folder: Path | None) -> dict[str, str]:
    """Where ONNX Runtime looks for the data files of a graph that comes as bytes.

    It would look in the current directory. Below a file there are none, so external data,
    which nobody verified, is impossible unless the caller names a folder.
    """
    return {} if content is None else {_DATA_FOLDER: str(data_folder or path)}


def is_plugin(ort: Any, name: str) -> bool:
    """Whether a provider is reached by device: one of a plugin that was registered."""
    return name in _registered or bool(_devices(ort, name))


def plugin_devices(ort: Any, name: str, module: str) -> list[Any]:
    """Register a provider's plugin and return the one device that it will use, in a list.

    Args:
        ort: onnxruntime.
        name: the provider, which the plugin must provide under that very name.
        module: the plugin's module; it tells where its library is.

    Raises:
        ImportError: the plugin is not installed, or this onnxruntime knows no plugins.
        EngineError: it cannot be loaded, or supports no hardware of this machine.
    """
    if not is_plugin(ort, name):
        plugin = importlib.import_module(module)
        if not hasattr(ort, "get_ep_devices"):
            raise ImportError("onnxruntime before 1.23")
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(
                f"{module} cannot be loaded: {first_line(error)}: check the driver and libraries"
            ) from error
        _registered.add(name)
    # OpenVINO also finds Intel's GPUs and NPUs.
    kind = "CPU" if "OpenVINO" in name else "GPU"
    found = [item for item in _devices(ort, name) if item.device.type.name == kind]
    if not found:
        raise EngineError(f"{module} supports no hardware of this machine: choose another device")
    return found[:1]


def _devices(ort: Any, name: str) -> list[Any]:
    if not hasattr(ort, "get_ep_devices"):
        return []
    return [item for item in ort.get_ep_devices() if item.ep_name == name]
