"""Candidates of the runtime: ONNX Runtime's providers, and TensorRT by itself.

Batches from host memory go through the engines' own `run`, as a bundle's do. What lies in the
GPU's memory is beyond that, so here their sessions and contexts are used directly.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_case import PRECISIONS, Case, GpuPrecision, Resident, Runner, Variant
from _gpu_machine import GpuMachine
from numpy.typing import NDArray

from edgeclip.runtime.bundle.engine_records import GraphSource
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.device.device_profile import DeviceProfile, EngineName
from edgeclip.runtime.engines.engine_cache import find_or_build
from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime, open_ort_engine
from edgeclip.runtime.engines.tensorrt_engine import TensorRtEngine
from edgeclip.runtime.engines.tensorrt_library import open_library
from edgeclip.runtime.errors import EngineError

_TITLES: dict[EngineName, str] = {
    "onnxruntime-cuda": "ONNX Runtime CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT",
    "onnxruntime-tensorrt-rtx": "ONNX Runtime TensorRT-RTX",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
_PROVIDERS_TENSORRT = 10  # what ONNX Runtime's provider is written for
_MOST = 32

Profile = Callable[[int], DeviceProfile]  # for a batch size


def engine_variants(gpu: GpuMachine, folder: Path) -> Iterator[Variant]:
    """All of the runtime's engines on a GPU; TensorRT's are kept in `folder`."""
    for engine, title in _TITLES.items():
        profile = functools.partial(gpu_device, engine, gpu)
        for precision in PRECISIONS:
            yield engine_variant(f"{title} {precision}", profile, precision, folder)


def engine_variant(name: str, profile: Profile, precision: GpuPrecision, folder: Path) -> Variant:
    """One engine, opened for the device that `profile` makes for a batch size."""

    def load(case: Case) -> Runner:
        device = profile(case.batch)
        if device.engine in ("tensorrt", "tensorrt-rtx"):
            return TensorRtRunner(case, precision, device, folder)
        return OrtRunner(case, precision, device)

    return Variant(name=name, precision=precision, open=load, ours=True)


def gpu_device(engine: EngineName, gpu: GpuMachine, batch: int) -> DeviceProfile:
    """This machine's GPU as a device whose engines are tuned for one batch size.

    Raises:
        ValueError: the engine does not know such a GPU.
    """
    major: int | None = None
    if engine == "tensorrt":
        major = int((gpu.tensorrt or "10").split(".")[0])  # what is missing is said later
    elif engine == "onnxruntime-tensorrt":
        major = _PROVIDERS_TENSORRT
    return DeviceProfile(
        name="this-gpu",
        description=gpu.name,
        engine=engine,
        precisions=PRECISIONS,
        threads=1,
        memory_mb=None,
        batch_best=batch,
        batch_max=max(batch, _MOST),
        compute_capability=gpu.capability,
        tensorrt_major=major,
    )


class OrtRunner:
    """ONNX Runtime with the provider of a device.

    Raises:
        EngineError: see `open_ort_engine`.
    """

    def __init__(self, case: Case, precision: GpuPrecision, device: DeviceProfile) -> None:
        self._case = case
        self._memory = "cpu" if device.on_cpu else "cuda"
        self._engine = open_ort_engine(
            case.graphs[precision], device=device, context_length=case.text_length
        )

    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """As the runtime does: the provider copies in and out."""
        return self._engine.run({self._case.input_name: values})[self._case.output_name]

    def place(self, values: NDArray[Any]) -> Resident:
        """Bind input and output to the provider's memory."""
        ort = import_onnxruntime()
        session = self._engine._session  # the same one: its options, and its nodes' places
        held = ort.OrtValue.ortvalue_from_numpy(values, self._memory, 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input(self._case.input_name, held)
        binding.bind_output(self._case.output_name, self._memory, 0)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return Resident(run, lambda: np.asarray(binding.copy_outputs_to_cpu()[0]))


class TensorRtRunner:
    """A TensorRT engine, built and kept by the runtime's own store.

    Raises:
        EngineError: see `find_or_build`.
        MissingExtraError: the library is not installed.
    """

    def __init__(
        self, case: Case, precision: GpuPrecision, device: DeviceProfile, folder: Path
    ) -> None:
        path = case.graphs[precision]
        engine = find_or_build(
            GraphSource(
                name=path.stem,
                content=path.read_bytes(),
                sha256=sha256_file(path),
                text_length=case.text_length,
            ),
            device=device,
            library=open_library(device),
            check=lambda engine: (),  # every candidate is held against torch, this one too
            folder=folder,
        )
        if not isinstance(engine, TensorRtEngine):
            raise EngineError(f"{engine.name} is not TensorRT by itself")
        self._case = case
        self._engine = engine

    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """As the runtime does."""
        return self._engine.run({self._case.input_name: values})[self._case.output_name]

    def place(self, values: NDArray[Any]) -> Resident:
        """Leave the batch where a run of the engine put it, and zeros in its output."""
        engine, buffers, name = self._engine, self._engine._buffers, self._case.output_name
        found = self.host(values)
        blank = np.zeros_like(found)
        buffers.send(name, blank)
        buffers.wait()

        def run() -> None:
            engine._check(engine._context.execute_async_v3(buffers.stream))
            buffers.wait()

        def fetch() -> NDArray[Any]:
            copied = buffers.fetch(name, found.shape, found.dtype)
            buffers.wait()
            return copied

        return Resident(run, fetch)
