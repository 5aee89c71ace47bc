"""The TensorRT engine: load a serialized engine and run it within the shapes it was built for."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.engine_records import EngineKey
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.engines.tensorrt_library import (
    CudaBuffers,
    MessageLog,
    TensorRtLibrary,
    create,
)
from edgeclip.runtime.errors import EdgeClipError, EngineError, first_line

_USUAL_TOKENS = 16  # an engine is tuned for one length; captions mostly have 8 to 20 tokens
_DYNAMIC = -1


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The smallest, best and largest shape of one input."""

    name: str
    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputContract:
    """The arrays that one input of an engine accepts: shapes from `least` to `most`, one dtype."""

    name: str
    dtype: np.dtype[Any]
    least: tuple[int, ...]
    most: tuple[int, ...]


def shape_range(name: str, shape: tuple[int, ...], key: EngineKey) -> ShapeRange:
    """Choose the range of shapes that an engine is built for.

    The first axis is the batch. The second axis of a two-dimensional input is the length of
    texts: from 1 (an empty text may have its end token only) to `text_length`, tuned for 16
    tokens, or fewer if the model accepts fewer.

    Args:
        name: name of the input.
        shape: shape in the graph, -1 where it may vary.
        key: sets the batch sizes and the length of texts.

    Raises:
        EngineError: the graph does not accept the device's batches, or another axis varies.
    """
    if not shape:
        return ShapeRange(name, (), (), ())
    axes = [_batch_axis(name, shape[0], key)]
    for axis, size in enumerate(shape[1:], start=1):
        if size != _DYNAMIC:
            axes.append((size, size, size))
        elif len(shape) == 2 and key.text_length is not None:
            axes.append((1, min(_USUAL_TOKENS, key.text_length), key.text_length))
        else:
            raise EngineError(
                f"input {name!r} of the graph varies along axis {axis}, for which no size is "
                "known: export the graph with that size fixed"
            )
    least, best, most = zip(*axes, strict=True)
    return ShapeRange(name, least, best, most)


def _batch_axis(name: str, size: int, key: EngineKey) -> tuple[int, int, int]:
    if size == _DYNAMIC:
        return key.batch_min, key.batch_best, key.batch_max
    if key.batch_min == key.batch_max == size:
        return size, size, size
    raise EngineError(
        f"input {name!r} of the graph takes batches of {size} only, and the device asks for "
        f"{key.batch_min} to {key.batch_max}: set batch_min and batch_max to {size}, or export "
        "a graph whose batch may vary"
    )


def check_feeds(contracts: Sequence[InputContract], feeds: Mapping[str, NDArray[Any]]) -> None:
    """Refuse arrays that an engine does not accept.

    Raises:
        EngineError: a missing or unknown name, another dtype, or a shape out of range.
    """
    names = [contract.name for contract in contracts]
    if set(feeds) != set(names):
        raise EngineError(
            f"the engine takes {', '.join(map(repr, sorted(names)))}, "
            f"but was given {', '.join(map(repr, sorted(feeds))) or 'nothing'}"
        )
    for contract in contracts:
        _check_feed(contract, feeds[contract.name])


def _check_feed(contract: InputContract, array: NDArray[Any]) -> None:
    if array.dtype != contract.dtype:
        raise EngineError(f"{contract.name!r} must be {contract.dtype}, got {array.dtype}")
    shape = array.shape
    inside = len(shape) == len(contract.least) and all(
        low <= size <= high
        for low, size, high in zip(contract.least, shape, contract.most, strict=True)
    )
    if not inside:
        raise EngineError(
            f"{contract.name!r} must be {_describe(contract)}, got {_times(shape)}: the engine "
            "was built for that range (batch_min and batch_max of the device)"
        )


def _describe(contract: InputContract) -> str:
    """Format the range of shapes: "1..32 x 3 x 224 x 224"."""
    pairs = zip(contract.least, contract.most, strict=True)
    return _times([str(low) if low == high else f"{low}..{high}" for low, high in pairs])


def _times(sizes: Sequence[object]) -> str:
    return " x ".join(map(str, sizes)) or "a single number"


_PROFILE = 0  # engines are built with one optimization profile


class TensorRtEngine:
    """One TensorRT engine on the GPU. Calls from several threads run one after the other.

    Args:
        content: the serialized engine.
        library: the TensorRT that loads it.
        source: its name in messages.
        host_code: the engine was built for later versions too and contains CPU code. Set it
            only for an engine whose hash was verified.
        runtime_cache: file of the kernels that TensorRT for RTX compiled on this GPU; read
            if it exists and fits, written after the first run and at the end.

    Raises:
        EngineError: there is no usable GPU, or the engine is not for it or this version.
        MissingExtraError: cuda-bindings is not installed.
    """

    def __init__(
        self,
        content: bytes,
        *,
        library: TensorRtLibrary,
        source: str,
        host_code: bool = False,
        runtime_cache: Path | None = None,
    ) -> None:
        self.name: str = library.name
        self._source = source
        self._lock = threading.Lock()
        self._buffers = CudaBuffers()
        self._saver = _CacheSaver(runtime_cache)
        self._loaded = loaded = _Loaded()
        # The finalizer must not refer to this object, or it would never be collected.
        self._finalizer = weakref.finalize(self, _release, loaded, self._buffers, self._saver)
        self._log = log = MessageLog(library.module)
        loaded.runtime = create(library, lambda: library.module.Runtime(log.logger), log)
        if host_code:
            loaded.runtime.engine_host_code_allowed = True
        loaded.engine = loaded.runtime.deserialize_cuda_engine(content)
        if loaded.engine is None:
            raise EngineError(f"{library.title} cannot load {source}: {log.summary()}")
        loaded.context = self._make_context(library)
        self._inputs, self._outputs = _contracts(library.module, loaded.engine)

    @property
    def context(self) -> Any:
        """TensorRT's `IExecutionContext`; None once the engine is closed."""
        return self._loaded.context

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine once.

        Raises:
            EngineError: the inputs do not fit the engine, or it fails.
        """
        check_feeds(self._inputs, feeds)
        with self._lock:
            if not self._finalizer.alive:
                raise EngineError(f"{self.name} engine {self._source} is closed: open it again")
            outputs = self._run(feeds)
            self._saver.after_run()
        return outputs

    def close(self) -> None:
        """Free the GPU memory and save the compiled kernels; later calls of `run` fail."""
        with self._lock:
            self._finalizer()

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._log.clear()
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        context = self._loaded.context
        try:
            for name, array in arrays.items():
                self._check(context.set_input_shape(name, array.shape))
                self._place(name, self._buffers.send(name, array))
            shapes = self._output_shapes()
            for name, dtype in self._outputs.items():
                size = int(np.prod(shapes[name], dtype=np.int64)) * dtype.itemsize
                self._place(name, self._buffers.at_least(name, size))
            self._check(context.execute_async_v3(self._buffers.stream))
            found = {
                name: self._buffers.fetch(name, shapes[name], dtype)
                for name, dtype in self._outputs.items()
            }
        except BaseException:
            with suppress(EngineError):  # of the same cause, and it says less
                self._buffers.wait()
            raise
        self._buffers.wait()  # the copies read and write the arrays until then
        return found

    def _place(self, name: str, address: int) -> None:
        self._check(self._loaded.context.set_tensor_address(name, address))

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the outputs; those of the inputs must be set."""
        shapes = {
            name: tuple(self._loaded.context.get_tensor_shape(name)) for name in self._outputs
        }
        for name, shape in shapes.items():
            if any(size < 0 for size in shape):
                raise EngineError(
                    f"{self._source}: the size of {name!r} depends on the values of the inputs, "
                    "which this engine does not support: export the graph without it"
                )
        return shapes

    def _check(self, done: bool) -> None:
        if not done:
            raise EngineError(f"{self.name} failed on {self._source}: {self._log.summary()}")

    def _make_context(self, library: TensorRtLibrary) -> Any:
        loaded = self._loaded
        try:
            if library.name == "tensorrt-rtx":
                loaded.config = loaded.engine.create_runtime_config()
                self._saver.attach(loaded.config)
                context = loaded.engine.create_execution_context(runtime_config=loaded.config)
            else:
                context = loaded.engine.create_execution_context()
        except RuntimeError as error:
            raise EngineError(
                f"{library.title} cannot start {self._source}: {first_line(error)}"
            ) from error
        if context is None:
            raise EngineError(
                f"{library.title} cannot start {self._source}: {self._log.summary()}: "
                "the GPU may have too little memory, lower batch_max of the device"
            )
        return context


class _CacheSaver:
    """Saves the kernels that TensorRT for RTX compiles at run time, for the next start."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._cache: Any = None
        self._saved = b""
        self._first = True

    def attach(self, config: Any) -> None:
        """Set the cache of a runtime configuration, filled from the file if it fits."""
        if self._path is None:
            return
        cache = config.create_runtime_cache()
        try:
            content = self._path.read_bytes()
        except OSError:
            content = b""
        # TensorRT checks GPU, driver and version of the content; else the cache stays empty.
        if content and cache.deserialize(content):
            self._saved = content
        if config.set_runtime_cache(cache):
            self._cache = cache

    def after_run(self) -> None:
        """Save after the first run, in case the process is killed later."""
        if self._first:
            self._first = False
            self.save()

    def free(self) -> None:
        """Let the cache go."""
        self._cache = None

    def save(self) -> None:
        """Write the cache if it has grown; a failed write only makes the next start slower."""
        if self._cache is None or self._path is None:
            return
        content = self._cache.serialize()
        if content is None or (content := bytes(content)) == self._saved:
            return
        try:
            with atomic_file(self._path) as temporary:
                temporary.write_bytes(content)
        except (OSError, EdgeClipError):
            return
        self._saved = content


@dataclass(slots=True)
class _Loaded:
    """What TensorRT made of an engine; each refers to those above it, and must go before them.

    Nobody else keeps them: left to the garbage collector, they would go in any order.
    """

    runtime: Any = None
    engine: Any = None
    config: Any = None
    context: Any = None

    def free(self) -> None:
        """Destroy all, the context first."""
        self.context = None
        self.config = None
        self.engine = None
        self.runtime = None


def _release(loaded: _Loaded, buffers: CudaBuffers, saver: _CacheSaver) -> None:
    try:
        saver.save()
    finally:
        loaded.context = None  # the cache and the buffers belong to it
        saver.free()
        try:
            buffers.close()
        finally:
            loaded.free()


def _contracts(trt: Any, engine: Any) -> tuple[tuple[InputContract, ...], dict[str, np.dtype[Any]]]:
    """Return the inputs that an engine accepts, and names and dtypes of its outputs."""
    inputs = []
    outputs = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            outputs[name] = dtype
        else:
            least, _, most = engine.get_tensor_profile_shape(name, _PROFILE)
            inputs.append(InputContract(name, dtype, tuple(least), tuple(most)))
    return tuple(inputs), outputs
