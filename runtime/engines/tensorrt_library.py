"""The installed TensorRT: version, what it can build for, CUDA calls, log, build progress."""

import importlib
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.engine_records import LibraryName, sm
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line

T = TypeVar("T")

_DEVICE = 0  # the first GPU in CUDA_VISIBLE_DEVICES
_CUDA_HINTS = {
    "cudaErrorInsufficientDriver": "install or update the NVIDIA driver",
    "cudaErrorNoDevice": "this needs an NVIDIA GPU",
    "cudaErrorMemoryAllocation": "lower batch_max of the device",
}


def cuda_runtime() -> Any:
    """Import `cuda.bindings.runtime`.

    Raises:
        MissingExtraError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtraError(
            "TensorRT needs the package cuda-bindings of the machine's CUDA version: pip install "
            "'edgeclip[tensorrt-cu12]', 'edgeclip[tensorrt-cu13]' or 'edgeclip[tensorrt-rtx]', on "
            "a Jetson 'edgeclip[jetpack6]' or 'edgeclip[jetpack7]'"
        ) from error
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime, such as "cudaMalloc", and return its result.

    Raises:
        EngineError: it returned an error code.
        MissingExtraError: cuda-bindings is not installed.
    """
    cuda = cuda_runtime()
    code, *results = getattr(cuda, name)(*arguments)
    if code != cuda.cudaError_t.cudaSuccess:
        text = cuda.cudaGetErrorString(code)[1]
        words = text.decode() if isinstance(text, bytes) else str(text)
        hint = _CUDA_HINTS.get(code.name)
        raise EngineError(f"{name} failed: {words} ({code.name})" + (f": {hint}" if hint else ""))
    return results[0] if results else None


def gpu_name() -> str:
    """Return the GPU's name, such as "NVIDIA RTX A2000".

    Raises:
        EngineError: there is no usable GPU.
        MissingExtraError: cuda-bindings is not installed.
    """
    name = call("cudaGetDeviceProperties", _DEVICE).name
    return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)


def gpu_capability() -> str:
    """Return the GPU's compute capability, such as "8.7".

    Raises:
        EngineError: there is no usable GPU.
        MissingExtraError: cuda-bindings is not installed.
    """
    kinds = cuda_runtime().cudaDeviceAttr
    major = call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, _DEVICE)
    minor = call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, _DEVICE)
    return f"{major}.{minor}"


class CudaBuffers:
    """Named GPU buffers that grow as needed, and a stream to copy and run on.

    Raises:
        EngineError: there is no usable GPU.
        MissingExtraError: cuda-bindings is not installed.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[int, int]] = {}  # name: address and size in bytes
        self._stream: Any = None
        call("cudaSetDevice", _DEVICE)
        # TensorRT synchronises the whole device for each run on the default stream.
        self._stream = call("cudaStreamCreate")

    @property
    def stream(self) -> int:
        """The CUDA stream handle for `execute_async_v3`."""
        return int(self._stream)

    def at_least(self, name: str, size: int) -> int:
        """Return the address of a buffer of at least `size` bytes; growing it loses its content.

        Nothing that uses the buffer may be running.

        Raises:
            EngineError: the GPU has too little memory.
        """
        address, held = self._pieces.get(name, (0, 0))
        if address and held >= size:
            return address
        if address:
            del self._pieces[name]
            call("cudaFree", address)
        size = max(size, 1)  # an empty buffer would have no address
        address = int(call("cudaMalloc", size))
        self._pieces[name] = (address, size)
        return address

    def send(self, name: str, array: NDArray[Any]) -> int:
        """Start to copy a contiguous array to a buffer, and return the buffer's address.

        Raises:
            EngineError: the copy failed, or the GPU has too little memory.
        """
        address = self.at_least(name, array.nbytes)
        kind = cuda_runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)
        return address

    def fetch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Start to copy a buffer to a new array, which is filled once `wait` returns.

        Raises:
            EngineError: the copy failed.
        """
        array = np.empty(shape, dtype)
        kind = cuda_runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        address = self._pieces[name][0]
        call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)
        return array

    def wait(self) -> None:
        """Wait until all work on the stream is done.

        Raises:
            EngineError: any of it failed.
        """
        call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the memory and the stream; a second call does nothing."""
        pieces, self._pieces = self._pieces, {}
        stream, self._stream = self._stream, None
        if stream is not None:
            call("cudaStreamDestroy", stream)
        for address, _ in pieces.values():
            call("cudaFree", address)


_INSTALL: dict[LibraryName, str] = {
    "tensorrt": (
        "pip install 'edgeclip[tensorrt-cu12]' or 'edgeclip[tensorrt-cu13]', as the driver has "
        "it; on a Jetson it comes with JetPack, and a virtual environment sees it when made with "
        "--system-site-packages"
    ),
    "tensorrt-rtx": "pip install 'edgeclip[tensorrt-rtx]'",
}


@dataclass(frozen=True, slots=True)
class TensorRtLibrary:
    """An installed TensorRT.

    Attributes:
        name: "tensorrt", or "tensorrt-rtx" for TensorRT for RTX.
        version: such as "10.3.0" or "1.7.1.116".
        module: the imported Python package.
    """

    name: LibraryName
    version: str
    module: Any = field(repr=False, compare=False)

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version.split(".")[0])

    @property
    def title(self) -> str:
        """Name and version, such as "TensorRT 10.3.0"."""
        return f"{'TensorRT' if self.name == 'tensorrt' else 'TensorRT-RTX'} {self.version}"

    @property
    def builds_without_gpu(self) -> bool:
        """Whether it can build for GPUs that this machine does not have."""
        return self.name == "tensorrt-rtx"

    def why_not_build(self, device: DeviceProfile) -> str | None:
        """Return why this installation cannot build engines for a device; None if it can.

        TensorRT for RTX builds for every GPU that it supports, on any machine. Full TensorRT
        measures its kernels, so it builds for the machine's own GPU only.
        """
        wanted = device.compute_capability
        if wanted is None:
            return f"device {device.name!r} has no NVIDIA GPU"
        if self.builds_without_gpu:
            if self.target(wanted) is not None:
                return None
            return f"{self.title} does not build for compute capability {wanted}"
        try:
            found = gpu_capability()
        except (EngineError, MissingExtraError) as error:
            return f"{self.title} builds on a machine with the device's GPU only: {error}"
        if found != wanted:
            return (
                f"{self.title} builds for this machine's GPU (compute capability {found}) only, "
                f"not for {wanted}: build on device {device.name!r} itself"
            )
        return None

    def target(self, capability: str) -> Any | None:
        """Return TensorRT for RTX's constant of a compute capability; None if unsupported."""
        kinds = getattr(self.module, "ComputeCapability", None)
        return getattr(kinds, sm(capability).upper(), None)


def open_library(device: DeviceProfile) -> TensorRtLibrary:
    """Import the TensorRT of a device's engine.

    Raises:
        EngineError: the engine is not "tensorrt" or "tensorrt-rtx", the installation is
            broken, or its major version is not the device's.
        MissingExtraError: it is not installed.
    """
    name = next((known for known in get_args(LibraryName) if known == device.engine), None)
    if name is None:
        raise EngineError(
            f"device {device.name!r} runs on {device.engine}: choose one whose engine is "
            f"{' or '.join(get_args(LibraryName))}"
        )
    library = _import(name)
    wanted = device.tensorrt_major
    if wanted is not None and wanted != library.major:
        raise EngineError(
            f"device {device.name!r} has tensorrt_major {wanted}, but {library.title} is "
            "installed: choose the device that fits, or install the other version"
        )
    return library


def _import(name: LibraryName) -> TensorRtLibrary:
    try:
        module = importlib.import_module(name.replace("-", "_"))
        version = str(module.__version__)
    except ImportError as error:
        raise MissingExtraError(f"{name} is not installed: {_INSTALL[name]}") from error
    except Exception as error:  # each release fails in its own way if a library is missing
        raise EngineError(
            f"{name} is installed but cannot start ({first_line(error)}): {_INSTALL[name]}"
        ) from error
    return TensorRtLibrary(name, version, module)


_MOST_MESSAGES = 8
_LONGEST_MESSAGE = 500
_DEEPEST_BAR = 3  # TensorRT's deeper phases pass too fast to read


class MessageLog:
    """Collects TensorRT's errors and warnings while it is kept; `logger` is its `ILogger`.

    A process has one `ILogger` for each TensorRT: the library keeps a pointer to the first that it
    is given, whatever is made with others. Every log that is in use collects all messages, since
    TensorRT does not say whose they are.

    Args:
        trt: the TensorRT module.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.logger = _logger_of(trt)
        with _logging:
            _logs.add(self)

    def clear(self) -> None:
        """Drop all messages so far."""
        self.errors.clear()
        self.warnings.clear()

    def summary(self) -> str:
        """Return the errors in one line, or the warnings if there is no error."""
        messages = self.errors or self.warnings
        shown = messages[:_MOST_MESSAGES]
        more = len(messages) - len(shown)
        return "; ".join(shown + ([f"and {more} more"] if more else [])) or "it gives no reason"


_logs: weakref.WeakSet[MessageLog] = weakref.WeakSet()
_loggers: dict[str, Any] = {}  # kept until the process ends, as TensorRT keeps its pointer
_logging = threading.Lock()


def _logger_of(trt: Any) -> Any:
    with _logging:
        return _loggers.setdefault(trt.__name__, _make_logger(trt))


def _make_logger(trt: Any) -> Any:
    severities = trt.ILogger.Severity
    names = {
        severities.INTERNAL_ERROR: "errors",
        severities.ERROR: "errors",
        severities.WARNING: "warnings",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            kind = names.get(severity)  # first: a build has thousands of messages below warnings
            if kind is None:
                return
            line = " ".join(message.split())[:_LONGEST_MESSAGE]
            with _logging:
                for known in _logs:
                    messages: list[str] = getattr(known, kind)
                    if line not in messages:
                        messages.append(line)

    return Logger()


def create(library: TensorRtLibrary, make: Callable[[], T], log: MessageLog) -> T:
    """Call what makes an object of TensorRT.

    Raises:
        EngineError: it cannot be made; TensorRT's bindings raise a bare TypeError then.
    """
    try:
        return make()
    except (TypeError, RuntimeError) as error:
        reason = log.summary() if log.errors or log.warnings else first_line(error)
        raise EngineError(
            f"{library.title} cannot start: {reason}: check the NVIDIA driver and the GPU"
        ) from error


class PhaseSink(Protocol):
    """Receives the nested phases of a build; called by one thread at a time."""

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin a phase of `steps` steps, inside `parent` if there is one."""
        ...

    def step(self, phase: str, done: int) -> None:
        """Set the number of finished steps of a phase."""
        ...

    def finish(self, phase: str) -> None:
        """End a phase."""
        ...


class PhaseBars:
    """Nested progress bars on stderr, if it is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bars: dict[str, Any] = {}
        self._depths: dict[str, int] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Draw the bar of a phase below its parent's."""
        from tqdm import tqdm

        depth = self._depths.get(parent, 0) + 1 if parent else 0
        self._depths[phase] = depth
        if depth >= _DEEPEST_BAR:
            return
        title = self._title if depth == 0 else "  " * depth + phase
        self._bars[phase] = tqdm(
            desc=title, total=steps, position=depth, leave=False, disable=not sys.stderr.isatty()
        )

    def step(self, phase: str, done: int) -> None:
        """Advance the bar of a phase."""
        bar = self._bars.get(phase)
        if bar is not None:
            bar.update(done - bar.n)

    def finish(self, phase: str) -> None:
        """Remove the bar of a phase."""
        self._depths.pop(phase, None)
        bar = self._bars.pop(phase, None)
        if bar is not None:
            bar.close()

    def close(self) -> None:
        """Remove the bars of phases that never finished."""
        for phase in list(self._bars):
            self.finish(phase)


def make_monitor(trt: Any, sink: PhaseSink, cancel: threading.Event) -> Any:
    """Return TensorRT's `IProgressMonitor`, which notifies `sink` and stops on `cancel`.

    TensorRT calls it from C++, where an exception would end the process: after the sink has
    raised once, it is not called again, so only the progress display is lost.
    """
    lock = threading.Lock()  # TensorRT calls from several threads
    broken = threading.Event()

    def tell(method: Any, *arguments: Any) -> None:
        with lock:
            if broken.is_set():
                return
            try:
                method(*arguments)
            except Exception:
                broken.set()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(sink.start, phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            tell(sink.finish, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(sink.step, phase_name, step + 1)
            return not cancel.is_set()

    return Monitor()
