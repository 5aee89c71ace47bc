"""Build a TensorRT engine from an ONNX graph for one device."""

import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgeclip.runtime.bundle.engine_records import EngineKey, GraphSource
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.tensorrt_engine import shape_range
from edgeclip.runtime.engines.tensorrt_library import (
    MessageLog,
    PhaseBars,
    PhaseSink,
    TensorRtLibrary,
    create,
    gpu_capability,
    gpu_name,
    make_monitor,
)
from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """The result of a build.

    Attributes:
        engine: the serialized engine.
        key: graph, library and GPU that it was built for.
        timing_cache: measured times of kernels, for the next build on the same GPU; None
            with TensorRT for RTX, which measures none.
        report: TensorRT's JSON description of the layers; None if this machine has no GPU
            that can load the engine.
        seconds: duration of the build.
    """

    engine: bytes
    key: EngineKey
    timing_cache: bytes | None
    report: str | None
    seconds: float


def build_engine(
    source: GraphSource,
    *,
    device: DeviceProfile,
    library: TensorRtLibrary,
    timing_cache: bytes | None = None,
    progress: PhaseSink | None = None,
) -> BuiltEngine:
    """Build the engine that a device needs.

    Args:
        source: the graph. Its batch axes accept `batch_min` to `batch_max` of the device and
            are tuned for `batch_best`; the text axis accepts 1 to `text_length` tokens.
        device: where the engine will run.
        library: the TensorRT that builds it.
        timing_cache: `BuiltEngine.timing_cache` of an earlier build; one of another GPU or
            version is ignored.
        progress: is notified of the build's phases; by default progress bars on stderr, if
            it is a terminal.

    Raises:
        EngineError: the library cannot build for the device, or cannot read or build the
            graph; the message names the nodes and TensorRT's errors.
        KeyboardInterrupt: Ctrl-C was pressed; the build has stopped.
    """
    obstacle = library.why_not_build(device)
    if obstacle is not None:
        raise EngineError(obstacle)
    gpu = "" if library.builds_without_gpu else gpu_name()
    key = EngineKey.of(source, device, library, gpu=gpu)
    bars = PhaseBars(f"building {source.name} for {device.name}")
    start = time.perf_counter()

    def work(cancel: threading.Event) -> tuple[bytes, bytes | None]:
        build = _Build(source, key, library)
        try:
            return build.run(timing_cache, progress or bars, cancel)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold objects of TensorRT
            raise
        finally:
            build.close()

    try:
        engine, timings = _interruptible(work)
    finally:
        bars.close()  # TensorRT does not finish the phases of a build that stops
    return BuiltEngine(
        engine=engine,
        key=key,
        timing_cache=timings,
        report=_report(engine, key, library),
        seconds=time.perf_counter() - start,
    )


def _interruptible(work: Callable[[threading.Event], T]) -> T:
    """Run `work` in another thread, and set its event on Ctrl-C.

    Python raises KeyboardInterrupt in the main thread only, and only between two Python
    instructions: inside TensorRT it would come too late, or be raised through C++.
    """
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, cancel)
        try:
            return future.result()
        except KeyboardInterrupt:
            cancel.set()
            raise


class _Build:
    """One run of TensorRT's builder, in one thread, which also has to close it.

    Left to the garbage collector, TensorRT's objects are destroyed in whichever thread collects
    next, and in one that never called TensorRT its destructor can wait for itself forever.
    """

    def __init__(self, source: GraphSource, key: EngineKey, library: TensorRtLibrary) -> None:
        self._source, self._key, self._library = source, key, library
        self._trt = trt = library.module
        self._log = MessageLog(trt)
        self._builder = create(library, lambda: trt.Builder(self._log.logger), self._log)
        flags = 0
        strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        if strong is not None:
            flags |= 1 << int(strong)
        self._network = self._builder.create_network(flags)

    def run(
        self, timing_cache: bytes | None, sink: PhaseSink, cancel: threading.Event
    ) -> tuple[bytes, bytes | None]:
        """Parse and build; return the engine and the new timing cache."""
        # The network may refer to the parser's memory: keep it until the build is done.
        parser = self._parse()
        config = self._builder.create_builder_config()
        self._configure(config)
        self._add_shapes(config)
        cache = self._attach_timings(config, timing_cache)
        monitor = make_monitor(self._trt, sink, cancel)
        config.progress_monitor = monitor
        engine = self._builder.build_serialized_network(self._network, config)
        del parser
        if engine is None:
            raise EngineError(
                f"TensorRT cannot build {self._source.name} for compute capability "
                f"{self._key.capability}: {self._log.summary()}"
            )
        return bytes(engine), None if cache is None else bytes(cache.serialize())

    def close(self) -> None:
        """Destroy the network, then the builder, in this thread."""
        self._network = None
        self._builder = None

    def _parse(self) -> Any:
        parser = self._trt.OnnxParser(self._network, self._log.logger)
        content = self._source.content
        if isinstance(content, Path):
            read = parser.parse_from_file(str(content))
        else:
            read = parser.parse(content)
        if not read or not self._network.num_outputs:  # empty bytes parse as an empty graph
            raise EngineError(_parser_errors(self._source.name, parser, self._log))
        return parser

    def _configure(self, config: Any) -> None:
        trt, key = self._trt, self._key
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # fp32 towers are the reference of the others, so no TF32 with its 10-bit mantissa.
        config.clear_flag(trt.BuilderFlag.TF32)
        if key.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace_mb * 1_000_000)
        if key.sparse_weights:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        if key.version_portability:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if key.hardware_portability != "none":
            wanted = key.hardware_portability.replace("-", "_").upper()
            level = getattr(trt.HardwareCompatibilityLevel, wanted, None)
            if level is None:  # same-compute-capability came with a later TensorRT 10
                raise EngineError(
                    f"{self._library.title} does not know hardware_portability "
                    f"{key.hardware_portability}: set another in the device's YAML file"
                )
            config.hardware_compatibility_level = level
        if self._library.builds_without_gpu:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._library.target(key.capability), 0)

    def _add_shapes(self, config: Any) -> None:
        profile = self._builder.create_optimization_profile()
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            chosen = shape_range(tensor.name, tuple(tensor.shape), self._key)
            profile.set_shape(chosen.name, chosen.least, chosen.best, chosen.most)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"TensorRT refuses the input shapes of {self._source.name}: {self._log.summary()}"
            )

    def _attach_timings(self, config: Any, content: bytes | None) -> Any | None:
        if self._library.name == "tensorrt-rtx":
            return None
        cache = config.create_timing_cache(content or b"")
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache


def _parser_errors(name: str, parser: Any, log: MessageLog) -> str:
    """Return all parser errors in one line, with a hint for known ones."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = []
    for error in errors:
        node = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
        words = " ".join(error.desc().split())
        lines.append(f"node {node}: {words}" if node else words)
    text = "; ".join(dict.fromkeys(lines)) or log.summary()
    hint = ""
    if "symmetric quantization" in text or "shiftIsAllZeros" in text:
        hint = ": export int8 for a device whose engine is TensorRT, which makes it symmetric"
    return f"TensorRT cannot read {name}: {text}{hint}"


def _report(engine: bytes, key: EngineKey, library: TensorRtLibrary) -> str | None:
    """Return TensorRT's JSON description of an engine's layers, if it can be loaded here.

    The engine is built: whatever fails here costs the description alone.
    """
    try:
        if gpu_capability() != key.capability:
            return None
        return _described(engine, key, library)
    except (EngineError, MissingExtraError):
        return None
    except Exception as error:  # TensorRT's bindings raise what they like
        _log.warning("the engine is built, but not described: %s", first_line(error))
        return None


def _described(engine: bytes, key: EngineKey, library: TensorRtLibrary) -> str | None:
    trt = library.module
    log = MessageLog(trt)
    runtime = create(library, lambda: trt.Runtime(log.logger), log)
    if key.version_portability:
        runtime.engine_host_code_allowed = True  # this process has just built it
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    inspector = loaded.create_engine_inspector()
    found = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    del inspector, loaded  # before the runtime that made them
    return found
