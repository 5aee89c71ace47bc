"""The few CUDA calls that a TensorRT engine needs, through NVIDIA's `cuda-bindings`.

Sources: the CUDA Runtime API reference, and the reference of `cuda.bindings.runtime`, each
of whose functions returns a tuple that starts with an error code.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError, MissingExtraError

_DEVICE = 0  # CUDA_VISIBLE_DEVICES says which GPU that is
_MENDS = {
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
            "TensorRT needs the package cuda-bindings of the machine's CUDA version: "
            "pip install 'edgeclip[tensorrt]' or 'edgeclip[tensorrt-rtx]'"
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
        mend = _MENDS.get(code.name)
        raise EngineError(f"{name} failed: {words} ({code.name})" + (f": {mend}" if mend else ""))
    return results[0] if results else None


def gpu_name() -> str:
    """The GPU's name, such as "NVIDIA RTX A2000".

    Raises:
        EngineError: there is no usable GPU.
        MissingExtraError: cuda-bindings is not installed.
    """
    name = call("cudaGetDeviceProperties", _DEVICE).name
    return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)


def gpu_capability() -> str:
    """The GPU's compute capability, such as "8.7".

    Raises:
        EngineError: there is no usable GPU.
        MissingExtraError: cuda-bindings is not installed.
    """
    kinds = cuda_runtime().cudaDeviceAttr
    major = call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, _DEVICE)
    minor = call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, _DEVICE)
    return f"{major}.{minor}"


class CudaBuffers:
    """Named pieces of GPU memory that grow as needed, and a stream to copy and run on.

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
        """The handle that `execute_async_v3` takes."""
        return int(self._stream)

    def at_least(self, name: str, size: int) -> int:
        """The address of a piece of at least `size` bytes; what it held is lost if it grows.

        Nothing that uses the piece may be running.

        Raises:
            EngineError: the GPU has too little memory.
        """
        address, held = self._pieces.get(name, (0, 0))
        if address and held >= size:
            return address
        if address:
            del self._pieces[name]
            call("cudaFree", address)
        size = max(size, 1)  # nothing at all would have no address
        address = int(call("cudaMalloc", size))
        self._pieces[name] = (address, size)
        return address

    def send(self, name: str, array: NDArray[Any]) -> int:
        """Copy a contiguous array to a piece, and return its address.

        Raises:
            EngineError: the copy failed, or the GPU has too little memory.
        """
        address = self.at_least(name, array.nbytes)
        kind = cuda_runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)
        return address

    def fetch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Begin to copy a piece to a new array, which is filled once `wait` returns.

        Raises:
            EngineError: the copy failed.
        """
        array = np.empty(shape, dtype)
        kind = cuda_runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        address = self._pieces[name][0]
        call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)
        return array

    def wait(self) -> None:
        """Wait for all that was begun.

        Raises:
            EngineError: any of it failed.
        """
        call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Give back the memory and the stream; a second call does nothing."""
        pieces, self._pieces = self._pieces, {}
        stream, self._stream = self._stream, None
        if stream is not None:
            call("cudaStreamDestroy", stream)
        for address, _ in pieces.values():
            call("cudaFree", address)
