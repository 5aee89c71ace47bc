"""ONNX Runtime, with whichever of its execution providers a device asks for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError, first_line
from edgeclip.runtime.graph_facts import GraphFacts, cache_folder, precision_of, read_inputs
from edgeclip.runtime.ort_session import (
    data_entries,
    import_onnxruntime,
    is_plugin,
    plugin_devices,
    session_options,
)
from edgeclip.runtime.placement import check_placement, is_refusal, placement_entries
from edgeclip.runtime.providers import (
    CPU,
    CUDA,
    PROVIDERS,
    Options,
    cuda_options,
    provider_of,
)

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


Made = TypeVar("Made", bound="OrtEngine")


class OrtEngine:
    """One ONNX graph in one ONNX Runtime session; the graph may be a compiled EP context.

    Inputs are copied to a GPU once and outputs back once by `session.run` itself, so binding
    them by hand would save nothing for arrays that come from and go to the host.

    Args:
        path: the ONNX file.
        providers: execution providers, the one that must be used first. ONNX Runtime falls
            back to the CPU in silence, for a whole graph or for single nodes; here both are
            errors.
        threads: CPU threads inside one operator.
        content: what is loaded in place of the file, `path` being its name in messages.
        data_folder: where the data files of such a graph lie, which the caller has verified.
            Without it the graph can have none.
        options: a provider's options, by its name.
        cpu_fallback: single nodes may run elsewhere than on the first provider.
        entries: further session configuration.

    Raises:
        EngineError: the provider is not there, leaves nodes to another one, or the graph
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
        chain = _reach(ort, configured, providers, options or {})
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
            # Its own fallback prints to stdout and goes on with the CPU, also when a run fails.
            session = ort.InferenceSession(source, options, providers=chain, enable_fallback=0)
        except Exception as error:  # as above
            reason = first_line(error)
            if is_refusal(error):
                reason = (
                    "some nodes would run on the CPU: set cpu_fallback: true in the device "
                    "profile, or install onnxruntime>=1.24, which tells which nodes"
                )
            raise EngineError(f"{self.name} cannot load {self._path}: {reason}") from error
        session._model_bytes = None  # kept for good otherwise, beside what was made of it
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
    """Load a graph with the provider and the options that the device asks for.

    Args:
        path, content, data_folder, entries: see `OrtEngine`.
        device: which provider; a precision that it must know comes from the file's name.
        context_length: the longest text in tokens, where the graph is a text tower.

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
    """As `open_ort_engine`, where `make` is called as `OrtEngine` is and may give more.

    Args:
        path, content, data_folder, entries: see `OrtEngine`.
        device: which provider; a precision that it must know comes from the file's name.
        context_length: the longest text in tokens, where the graph is a text tower.

    Raises:
        EngineError, MissingExtraError: see `OrtEngine`.
    """
    provider = provider_of(device)
    # What TensorRT compiles is kept for a graph whose content is known, verified that is.
    facts = GraphFacts(
        precision=precision_of(path),
        inputs=read_inputs(path, content, data_folder) if provider.compiles else (),
        context_length=context_length,
        cache=cache_folder(content, data_folder) if provider.compiles and content else None,
    )
    options = {provider.name: provider.options(device, facts)}
    providers: tuple[str, ...] = (provider.name,)
    if device.engine == "onnxruntime-tensorrt" and device.cpu_fallback:
        options[CUDA] = cuda_options(device, facts)  # what TensorRT lacks is better off there
        providers = (provider.name, CUDA)
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


def _reach(
    ort: Any, configured: Any, names: tuple[str, ...], options: Mapping[str, Options]
) -> list[tuple[str, Options]]:
    """Return the providers to name to a session, or put a plugin into its options instead.

    The CPU's is always there, and ONNX Runtime refuses to forbid it where it is named.
    """
    first, available = names[0], ort.get_available_providers()
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
        mend = f"install {known.package}" if known else "choose another device"
        raise EngineError(
            f"this onnxruntime has no {first} (it has {', '.join(available)}): {mend}"
        ) from error
    configured.add_provider_for_devices(devices, options.get(first, {}))
    return []
