"""Options of ONNX Runtime sessions, plug-in providers, and facts of a graph for a provider."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeclip.runtime.bundle.files import cache_root
from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DevicePrecision

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


Inputs = tuple[tuple[str, tuple[int | None, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """Facts of one graph.

    Attributes:
        precision: of the graph's weights.
        inputs: name and shape of each input, None for a dimension that varies. The first of
            those is the batch. Empty where nothing need be known.
        context_length: the longest text, in tokens, where a second dimension varies.
        cache: a folder for what is compiled, of this graph alone; None for none.
    """

    precision: "DevicePrecision"
    inputs: Inputs = ()
    context_length: int | None = None
    cache: Path | None = None


def precision_of(path: Path) -> "DevicePrecision":
    """The precision of a bundle's graph, which its name tells: `text_model_int8.onnx`."""
    named: dict[str, DevicePrecision] = {"fp16": "fp16", "int8": "int8", "fp8": "fp8"}
    return named.get(path.stem.rpartition("_")[2], "fp32")


def read_inputs(path: Path, content: bytes | None, data_folder: Path | None) -> Inputs:
    """Names and shapes of a graph's inputs; none of an EP context, which needs no shapes.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    ort = import_onnxruntime()
    options = session_options(ort, threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    for key, value in data_entries(path, content, data_folder).items():
        options.add_session_config_entry(key, value)
    try:
        graph = str(path) if content is None else content
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception:  # no graph, or not one for the CPU: the provider itself will say
        return ()
    return tuple(
        (item.name, tuple(size if isinstance(size, int) else None for size in item.shape))
        for item in session.get_inputs()
    )


def cache_folder(content: bytes, data_folder: Path | None) -> Path:
    """Make the user's folder for what is compiled of exactly this graph and its data files.

    TensorRT's provider knows a graph by its names and shapes: with other weights in it, it
    would use the engine of the old ones.

    Raises:
        EngineError: the folder cannot be made, or `data_folder` cannot be read.
    """
    digest = hashlib.sha256(hashlib.sha256(content).digest())
    try:
        for file in sorted(data_folder.iterdir()) if data_folder else ():
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        folder = cache_root() / "onnxruntime" / digest.hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise EngineError(
            f"cannot make a cache folder for compiled graphs: {error}: set EDGECLIP_CACHE to a "
            "folder that can be written"
        ) from error
    return folder
