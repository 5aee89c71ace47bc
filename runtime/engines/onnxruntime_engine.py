"""The ONNX Runtime engine: open a graph on a device's execution provider, and run it.

A session is refused where ONNX Runtime would silently fall back to the CPU.
"""

import ctypes
import hashlib
import importlib
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.files import atomic_file, cache_root
from edgeclip.runtime.device.machine import detect_processor, has_int8_dot_products
from edgeclip.runtime.engines.providers import (
    CPU,
    CUDA,
    PROVIDERS,
    TENSORRT,
    GraphFacts,
    Inputs,
    Options,
    cuda_options,
    provider_of,
)
from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile
    from edgeclip.runtime.spec import Precision

_log = logging.getLogger(__name__)

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_registered: set[str] = set()  # onnxruntime keeps a plugin's library until the process ends
RECORD = "session.record_ep_graph_assignment_info"
FORBID = "session.disable_cpu_ep_fallback"
_SHOWN = 5
# Operators on shapes and copies, which may run on the CPU at no cost.
_SHAPE_OPERATORS = frozenset(
    (
        "ArgMax",
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Equal",
        "Expand",
        "Gather",
        "Identity",
        "Range",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Squeeze",
        "Unsqueeze",
    )
)
# Without int8 dot products, ONNX Runtime's fused int8 kernels saturate sums of products. With these
# it computes quantized nodes in float, and the integer products of unsigned weights, which do not.
EXACT_INT8 = {"session.disable_quant_qdq": "1", "session.x64quantprecision": "1"}
Made = TypeVar("Made", bound="OrtEngine")


class OrtEngine:
    """One ONNX graph, or compiled EP context, in one ONNX Runtime session.

    `session.run` copies inputs to a GPU once and outputs back once, so I/O binding would save
    nothing for arrays in host memory.

    Args:
        path: the ONNX file.
        providers: execution providers; the first must be used. ONNX Runtime silently falls
            back to the CPU, for a whole graph or for single nodes; here both are errors.
        threads: CPU threads inside one operator.
        content: loaded instead of the file; `path` is then its name in messages.
        data_folder: folder of the graph's external data, if it is loaded from `content`. The
            caller has verified these files; without a folder, external data is refused.
        options: options of each provider, by its name.
        cpu_fallback: allow single nodes to run on another provider than the first.
        entries: further session configuration.

    Raises:
        EngineError: the provider is missing, leaves nodes to another one, or the graph
            cannot be loaded.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        providers: tuple[str, ...],
        threads: int,
        content: bytes | None = None,
        data_folder: Path | None = None,
        options: Mapping[str, Options] | None = None,
        cpu_fallback: bool = False,
        entries: Mapping[str, str] | None = None,
    ) -> None:
        ort = import_onnxruntime()
        asked = providers[0]
        engines = {provider.name: engine for engine, provider in PROVIDERS.items()}
        self.name = engines.get(asked, asked)
        self._path = path
        checked = asked != CPU and not cpu_fallback
        configured = session_options(ort, threads)
        for key, value in {
            **data_entries(path, content, data_folder),
            **(placement_entries(ort) if checked else {}),
            **(entries or {}),
        }.items():
            configured.add_session_config_entry(key, value)
        chain = _session_providers(ort, configured, providers, options or {})
        self._session = self._load(ort, path if content is None else content, configured, chain)
        used = self._session.get_providers()
        if used[0] != asked:
            raise EngineError(
                f"{asked} could not start and ONNX Runtime fell back to {used[0]}: check "
                "the driver and libraries, or use a device whose engine is onnxruntime-cpu"
            )
        if checked:
            check_placement(ort, self._session, asked, path)
        self._outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Raises:
            EngineError: the inputs do not fit the graph, or it fails.
        """
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"{self.name} failed on {self._path}: {first_line(error)}") from error
        return dict(zip(self._outputs, map(np.asarray, values), strict=True))

    def _load(self, ort: Any, graph: Path | bytes, options: Any, chain: list[Any]) -> Any:
        source = graph if isinstance(graph, bytes) else str(graph)
        try:
            # ONNX Runtime's own fallback prints to stdout and continues on the CPU.
            session = ort.InferenceSession(source, options, providers=chain, enable_fallback=0)
        except Exception as error:  # as above
            reason = first_line(error)
            if is_refusal(error):
                reason = (
                    "some nodes would run on the CPU: set cpu_fallback: true in the device "
                    "profile, or install onnxruntime>=1.24, which reports which nodes"
                )
            raise EngineError(f"{self.name} cannot load {self._path}: {reason}") from error
        session._model_bytes = None  # or the graph would stay in memory twice
        return session


def open_ort_engine(
    path: Path,
    *,
    device: "DeviceProfile",
    content: bytes | None = None,
    data_folder: Path | None = None,
    context_length: int | None = None,
    entries: Mapping[str, str] | None = None,
) -> OrtEngine:
    """Load a graph with a device's provider and its options.

    Where the device has int8 dot products and this processor has none, int8 is computed as the
    device does it, and slowly.

    Args:
        path, content, data_folder, entries: see `OrtEngine`.
        device: sets the provider. The graph's precision is taken from the file's name.
        context_length: for a text tower, the longest text in tokens.

    Raises:
        EngineError, MissingExtraError: see `OrtEngine`.
    """
    return make_ort_engine(
        OrtEngine,
        path,
        device=device,
        content=content,
        data_folder=data_folder,
        context_length=context_length,
        entries=entries,
    )


def make_ort_engine(
    make: Callable[..., Made],
    path: Path,
    *,
    device: "DeviceProfile",
    content: bytes | None = None,
    data_folder: Path | None = None,
    context_length: int | None = None,
    entries: Mapping[str, str] | None = None,
) -> Made:
    """Load a graph as `open_ort_engine` does, with a subclass of `OrtEngine`.

    Args:
        make: called with the arguments of `OrtEngine`.
        path, content, data_folder, entries: see `OrtEngine`.
        device: sets the provider. The graph's precision is taken from the file's name.
        context_length: for a text tower, the longest text in tokens.

    Raises:
        EngineError, MissingExtraError: see `OrtEngine`.
    """
    provider = provider_of(device)
    # TensorRT's engines are cached only for graphs given as content, which is verified.
    facts = GraphFacts(
        precision=precision_of(path),
        inputs=read_inputs(path, content, data_folder) if provider.compiles else (),
        context_length=context_length,
        cache=cache_folder(content, data_folder) if provider.compiles and content else None,
    )
    options = {provider.name: provider.options(device, facts)}
    providers: tuple[str, ...] = (provider.name,)
    if device.engine == "onnxruntime-tensorrt" and device.cpu_fallback:
        options[CUDA] = cuda_options(device, facts)  # faster than the CPU for what TensorRT lacks
        providers = (provider.name, CUDA)
    emulated = device.vnni and not has_int8_dot_products(detect_processor().flags)
    if emulated and provider.name == CPU:
        entries = {**EXACT_INT8, **(entries or {})}
    return make(
        path,
        providers=providers,
        threads=device.threads,
        content=content,
        data_folder=data_folder,
        options=options,
        cpu_fallback=device.cpu_fallback,
        entries=entries,
    )


def embed_context(
    graph: Path, *, device: "DeviceProfile", target: Path, context_length: int | None = None
) -> None:
    """Compile a graph with a device's provider into one ONNX file (EP context).

    The file is loaded once before it gets its name: not every build of a provider can read
    what it writes.

    Args:
        graph: the ONNX file.
        device: where the file will run; this machine must have its provider and hardware.
        target: the file to write; an existing one is replaced.
        context_length: for a text tower, the longest text in tokens.

    Raises:
        EngineError: the provider has no EP contexts, is missing, or cannot compile the graph
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
                f"{provider.name} compiled no context of {graph}: if its shapes vary, give their "
                "bounds"
            )
        try:
            open_ort_engine(file, device=device)
        except EngineError as error:
            raise EngineError(
                f"{provider.name} cannot read the context that it compiled of {graph}: install "
                f"another build of it: {error}"
            ) from error


def _session_providers(
    ort: Any, configured: Any, names: tuple[str, ...], options: Mapping[str, Options]
) -> list[tuple[str, Options]]:
    """Return the providers for a new session; a plug-in goes into its options instead.

    The CPU provider is never listed: it is always present, and ONNX Runtime cannot forbid
    a fallback to a provider that is listed.
    """
    first, available = names[0], ort.get_available_providers()
    if first in available and first in (CUDA, TENSORRT):
        load_cuda_libraries(ort)
    known = next((item for item in PROVIDERS.values() if item.name == first), None)
    plugin = known.plugin if known else None
    if first in available and not (plugin and is_plugin(ort, first)):
        rest = [name for name in names[1:] if name != CPU and name in available]
        return [(name, options.get(name, {})) for name in (first, *rest)]
    try:
        if plugin is None:
            raise ImportError(first)
        devices = plugin_devices(ort, first, plugin)
    except ImportError as error:
        hint = f"install {known.package}" if known else "choose another device"
        raise EngineError(
            f"this onnxruntime has no {first} (it has {', '.join(available)}): {hint}"
        ) from error
    configured.add_provider_for_devices(devices, options.get(first, {}))
    return []


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


def load_cuda_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels, where the providers' own libraries do not look.

    Does nothing before ONNX Runtime 1.21. What it prints of libraries that are missing is logged.
    """
    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    said = io.StringIO()
    with redirect_stdout(said):
        preload()
    if said.getvalue():
        _log.info("onnxruntime: %s", " ".join(said.getvalue().split()))


def session_options(ort: Any, threads: int) -> Any:
    """Return the options of a session with `threads` threads inside one operator."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # not the errors, which are raised as exceptions too
    # Threads stop spinning between calls, which frees the CPU at no cost in latency.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def data_entries(path: Path, content: bytes | None, data_folder: Path | None) -> dict[str, str]:
    """Return the session entry for the external data of a graph that is loaded from bytes.

    By default ONNX Runtime would look in the current directory. Without `data_folder` the
    entry is the path of a file, below which nothing can lie: unverified data is never read.
    """
    return {} if content is None else {_DATA_FOLDER: str(data_folder or path)}


def is_plugin(ort: Any, name: str) -> bool:
    """Return whether a provider comes from a registered plug-in, chosen by its devices."""
    return name in _registered or bool(_devices(ort, name))


def plugin_devices(ort: Any, name: str, module: str) -> list[Any]:
    """Register a provider's plug-in and return the one device that it will use, in a list.

    Args:
        ort: the onnxruntime module.
        name: name of the provider in the plug-in.
        module: the plug-in's Python module, which knows the path of its library.

    Raises:
        ImportError: the plug-in is not installed, or this onnxruntime has no plug-ins.
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


def placement_entries(ort: Any) -> dict[str, str]:
    """Return the session configuration that reveals a silent fallback to the CPU.

    Since 1.24 ONNX Runtime reports where each node runs. Older versions can only refuse every
    node on the CPU, shape arithmetic included. That is too strict for CUDA with a varying
    batch, but a false alarm with a way out is better than a silent fallback.
    """
    return {RECORD: "1"} if _can_tell(ort) else {FORBID: "1"}


def check_placement(ort: Any, session: Any, provider: str, path: Path) -> None:
    """Refuse a session that computes on another provider than `provider`.

    Does nothing before ONNX Runtime 1.24, which refuses by itself: see `placement_entries`.

    Raises:
        EngineError: some nodes run elsewhere; the message names the first few.
    """
    if not _can_tell(ort):
        return
    total, elsewhere = 0, []
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = subgraph.get_nodes()
        total += len(nodes)
        if subgraph.ep_name != provider:
            elsewhere += [node for node in nodes if node.op_type not in _SHAPE_OPERATORS]
    if elsewhere:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in elsewhere[:_SHOWN])
        more = ", ..." if len(elsewhere) > _SHOWN else ""
        raise EngineError(
            f"{provider} leaves {len(elsewhere)} of the {total} nodes of {path} to another "
            f"provider: {names}{more}: use another precision or engine, or set cpu_fallback: true "
            "in the device profile"
        )


def is_refusal(error: Exception) -> bool:
    """Return whether an error is ONNX Runtime's own refusal to place nodes on the CPU."""
    return "fallback to CPU EP has been explicitly disabled" in str(error)


def _can_tell(ort: Any) -> bool:
    return hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")


def precision_of(path: Path) -> "Precision":
    """Return the precision in a bundle's file name, such as `text_model_int8.onnx`."""
    named: dict[str, Precision] = {"fp16": "fp16", "int8": "int8", "fp8": "fp8"}
    return named.get(path.stem.rpartition("_")[2], "fp32")


def read_inputs(path: Path, content: bytes | None, data_folder: Path | None) -> Inputs:
    """Return names and shapes of a graph's inputs; none for an EP context, which needs no shapes.

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
    except Exception:  # no graph, or none for the CPU: the provider will report it
        return ()
    return tuple(
        (item.name, tuple(size if isinstance(size, int) else None for size in item.shape))
        for item in session.get_inputs()
    )


def cache_folder(content: bytes, data_folder: Path | None) -> Path:
    """Create the user's cache folder for engines of exactly this graph and its data files.

    TensorRT's provider identifies a graph by names and shapes only, so it would use an old
    engine for a graph with new weights; and one of another TensorRT fails the session.

    Raises:
        EngineError: the folder cannot be made, or `data_folder` cannot be read.
    """
    digest = hashlib.sha256(hashlib.sha256(content).digest())
    digest.update(f"onnxruntime {import_onnxruntime().__version__}\n".encode())
    digest.update(f"tensorrt {tensorrt_version()}\n".encode())
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


# The libraries that ONNX Runtime's providers are linked with, by their names on Linux and Windows.
_TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.8", "nvinfer_10.dll", "nvinfer.dll")


def tensorrt_version() -> int | None:
    """Return the version of the TensorRT library that is found, 100304 for 10.3.4; None for none.

    It is asked of the library: the Python package may be another one, or missing.
    """
    for name in _TENSORRT_LIBRARIES:
        with suppress(OSError, AttributeError):
            return int(ctypes.CDLL(name).getInferLibVersion())
    return None
