"""What `gpu_latency.py` compares: a case, and the ways of torch and of the runtime to compute it.

Batches from host memory go through the engines' own `run`, as a bundle's do. What lies in the
GPU's memory is beyond that, so here their sessions and contexts are used directly.

All ways of torch but the first run the module that the ONNX files are captured from, whose last
layer is computed for one token only. Attention is the fused kernel that transformers takes by
default. Fp16 means weights in half precision, without autocast.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.embedders import tower_inputs
from edgeclip.export.graph.export_modules import PlainImageTower, PlainTextTower, tower_module
from edgeclip.export.graph.to_onnx import export_tower
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.engine_records import GraphSource
from edgeclip.runtime.bundle.files import sha256_file, tower_path
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.device_profile import DeviceProfile, EngineName
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.engines.engine_cache import find_or_build
from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime, open_ort_engine
from edgeclip.runtime.engines.tensorrt_engine import TensorRtEngine
from edgeclip.runtime.engines.tensorrt_library import open_library
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import OUTPUT_NAMES, PIXEL_INPUTS, TEXT_INPUT, PixelForm, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

GpuPrecision = Literal["fp32", "fp16"]
PRECISIONS: tuple[GpuPrecision, ...] = ("fp32", "fp16")
REFERENCE = "torch eager fp32"

_PIXELS: PixelForm = "float32-nchw"
_INPUTS = 32  # how many different pictures and captions there are
_BOUNDS: dict[GpuPrecision, float] = {"fp32": 0.9999, "fp16": 0.999}  # those of `open_tower`
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_WARM_UPS = 3  # before a capture, as the documentation of torch.cuda.graphs asks for
_TITLES: dict[EngineName, str] = {
    "onnxruntime-cuda": "ONNX Runtime CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT",
    "onnxruntime-tensorrt-rtx": "ONNX Runtime TensorRT-RTX",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
_PROVIDERS_TENSORRT = 10  # what ONNX Runtime's provider is written for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One tower of one model on one batch: what candidates are given, and what is right.

    `values` are normalised pixels, float32 [batch, 3, size, size], or token ids, int64
    [batch, length]; `expected`, float32 [32, dim], is what torch computes on the CPU in fp32 of 32
    inputs, those of `values` first.
    """

    model: str
    tower: Tower
    dual: DualEncoder
    graphs: Mapping[GpuPrecision, Path]
    values: NDArray[Any]
    expected: FloatArray

    def judge(self, found: NDArray[Any], precision: GpuPrecision) -> tuple[float | None, str]:
        """The least cosine of embeddings [batch, dim] with torch's; and what is wrong, or "".

        Random weights bring all embeddings close together, so each must also be nearer to its
        own input's than to any other's.
        """
        try:
            least = float(cosines(found, self.expected[: len(self.values)]).min())
        except InputError as error:
            return None, str(error)
        bound = _BOUNDS[precision]
        if least < bound:
            return least, f"least cosine with torch fp32 {least:.4f} (bound >= {bound:g})"
        nearest = (found.astype(np.float64) @ self.expected.T).argmax(axis=1)
        strays = np.flatnonzero(nearest != np.arange(len(self.values)))
        if len(strays):
            return least, f"row {strays[0]} is nearest to the embedding of another input"
        return least, ""


@dataclass(frozen=True, slots=True)
class Resident:
    """A batch in the GPU's memory: embed it there, and copy the last result to host memory."""

    run: Callable[[], None]
    fetch: Callable[[], NDArray[Any]]


class Runner(Protocol):
    """A candidate, loaded for a case. Any error says that it cannot run here."""

    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """Embed a batch that lies in host memory; the result lies there too."""

    def place(self, values: NDArray[Any]) -> Resident:
        """Put a batch into the GPU's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to compute a tower, which `open` loads for a case; `ours` is one of the runtime's.

    A slow one takes minutes to load, which `--quick` leaves out.
    """

    name: str
    precision: GpuPrecision
    open: Callable[[Case], Runner]
    ours: bool = False
    slow: bool = False


def cases(
    model: str, dual: DualEncoder, tower: Tower, batches: Sequence[int], folder: Path
) -> Iterator[Case]:
    """Export a tower into an empty folder, and yield a case for each batch size.

    Fp16 graphs are made as for a bundle: what goes beyond half precision stays in fp32.
    """
    spec = dual.spec.image
    source = EmojiSource("test", _INPUTS, size=spec.size)
    (given,) = tower_inputs(dual, tower, source, batch_size=_INPUTS)
    (values,) = tower_feed(given, tower, _PIXELS, spec).values()
    graphs = {precision: folder / tower_path(tower, precision) for precision in PRECISIONS}
    export_tower(dual, tower, graphs["fp32"])
    write_fp16(graphs["fp32"], graphs["fp16"], CalibrationData(1, lambda _: values))
    with torch.inference_mode():
        expected = tower_module(dual, tower)(torch.from_numpy(values)).numpy()
    about: dict[str, Any] = {"model": model, "tower": tower, "dual": dual, "graphs": graphs}
    for batch in batches:
        yield Case(**about, values=values[:batch], expected=expected)


def torch_variants(device: str) -> Iterator[Variant]:
    """All candidates of torch on "cuda" or "cpu"; a break in what is compiled is an error."""

    def eager(case: Case, precision: GpuPrecision, plain: bool = False) -> Runner:
        return TorchRunner(_module(case, precision, device, plain=plain), device)

    def compiled(case: Case, precision: GpuPrecision, mode: str) -> Runner:
        module = _module(case, precision, device)
        return TorchRunner(torch.compile(module, mode=mode, fullgraph=True, dynamic=False), device)

    def captured(case: Case, precision: GpuPrecision) -> Runner:
        return GraphRunner(_module(case, precision, device), case.values, device)

    plain = partial(eager, precision="fp32", plain=True)
    yield Variant(name="transformers fp32", precision="fp32", open=plain)
    for precision in PRECISIONS:
        for title, load in (
            ("torch eager", eager),
            ("torch CUDA graph", captured),
            ("torch.compile reduce-overhead", partial(compiled, mode="reduce-overhead")),
            ("torch.compile max-autotune", partial(compiled, mode="max-autotune")),
        ):
            opened, slow = partial(load, precision=precision), title.endswith("max-autotune")
            name = f"{title} {precision}"
            yield Variant(name=name, precision=precision, open=opened, slow=slow)


def _module(case: Case, precision: GpuPrecision, device: str, *, plain: bool = False) -> nn.Module:
    dual = copy.deepcopy(case.dual)
    dual.model.set_attn_implementation("sdpa")
    module = tower_module(dual, case.tower)
    if plain:
        module = PlainImageTower(dual) if case.tower == "image" else PlainTextTower(dual)
    return module.eval().to(device, _DTYPES[precision])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


class TorchRunner:
    """A function of tensors, called for each batch."""

    def __init__(self, call: Callable[[Tensor], Tensor], device: str) -> None:
        self._call, self._device = call, device

    @torch.inference_mode()
    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """Copy, run, copy back, which waits for the GPU."""
        return self._call(torch.from_numpy(values).to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def place(self, values: NDArray[Any]) -> Resident:
        held = torch.from_numpy(values).to(self._device)
        results: list[Tensor] = []

        @torch.inference_mode()
        def run() -> None:
            results.clear()  # before the next run: a compiled graph writes to the same place
            results.append(self._call(held))
            _wait(self._device)

        return Resident(run, lambda: results[0].cpu().numpy())


class GraphRunner:
    """A module captured once as a CUDA graph, for batches of one shape."""

    @torch.inference_mode()
    def __init__(self, module: nn.Module, values: NDArray[Any], device: str) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._given = torch.from_numpy(values).to(device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                module(self._given)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph):
            self._found: Tensor = module(self._given)

    @torch.inference_mode()
    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """Copy into the captured input, replay, copy back, which waits for the GPU."""
        self._given.copy_(torch.from_numpy(values))
        self._graph.replay()
        return self._found.cpu().numpy()

    @torch.inference_mode()
    def place(self, values: NDArray[Any]) -> Resident:
        """Fill the captured input, and nothing into its output: `run` must."""
        self._given.copy_(torch.from_numpy(values))
        self._found.zero_()

        def run() -> None:
            self._graph.replay()
            _wait(self._device)

        return Resident(run, lambda: self._found.cpu().numpy())


def engine_variants(capability: str, tensorrt_major: int | None, folder: Path) -> Iterator[Variant]:
    """All of the runtime's engines on a GPU; TensorRT's are kept in `folder`."""
    for engine, title in _TITLES.items():
        profile = partial(gpu_device, engine, capability, tensorrt_major)
        for precision in PRECISIONS:
            yield engine_variant(f"{title} {precision}", profile, precision, folder)


def engine_variant(
    name: str, profile: Callable[[int], DeviceProfile], precision: GpuPrecision, folder: Path
) -> Variant:
    def load(case: Case) -> Runner:
        return EngineRunner(case, precision, profile(len(case.values)), folder)

    return Variant(name=name, precision=precision, open=load, ours=True)


def gpu_device(
    engine: EngineName, capability: str, tensorrt_major: int | None, batch: int
) -> DeviceProfile:
    """This machine's GPU as a device whose engines are tuned for one batch size."""
    majors = {"tensorrt": tensorrt_major or _PROVIDERS_TENSORRT}  # what is missing is said later
    majors["onnxruntime-tensorrt"] = _PROVIDERS_TENSORRT
    return DeviceProfile(
        name="this-gpu",
        description=f"compute capability {capability}",
        engine=engine,
        precisions=PRECISIONS,
        threads=1,
        memory_mb=None,
        batch_best=batch,
        batch_max=max(batch, _INPUTS),
        compute_capability=capability,
        tensorrt_major=majors.get(engine),
    )


class EngineRunner:
    """An engine of the runtime; TensorRT's are built and kept by the runtime's own store."""

    def __init__(
        self, case: Case, precision: GpuPrecision, device: DeviceProfile, folder: Path
    ) -> None:
        is_text, path = case.tower == "text", case.graphs[precision]
        length = case.dual.spec.text.context_length if is_text else None
        self._input = TEXT_INPUT if is_text else PIXEL_INPUTS[_PIXELS]
        self._output = OUTPUT_NAMES[case.tower]
        self._memory = "cpu" if device.on_cpu else "cuda"
        self._engine: Engine
        if device.engine not in ("tensorrt", "tensorrt-rtx"):
            self._engine = open_ort_engine(path, device=device, context_length=length)
            return
        self._engine = find_or_build(
            GraphSource(
                name=path.stem,
                content=path.read_bytes(),
                sha256=sha256_file(path),
                text_length=length,
            ),
            device=device,
            library=open_library(device),
            check=lambda _: (),  # every candidate is held against torch, this one too
            folder=folder,
        )

    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        return self._engine.run({self._input: values})[self._output]

    def place(self, values: NDArray[Any]) -> Resident:
        engine: Any = self._engine
        if isinstance(engine, TensorRtEngine):
            return self._place_tensorrt(engine, values)
        # The same session: its options, and its nodes' places.
        session, ort = engine._session, import_onnxruntime()
        held = ort.OrtValue.ortvalue_from_numpy(values, self._memory, 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input(self._input, held)
        binding.bind_output(self._output, self._memory, 0)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return Resident(run, lambda: np.asarray(binding.copy_outputs_to_cpu()[0]))

    def _place_tensorrt(self, engine: TensorRtEngine, values: NDArray[Any]) -> Resident:
        """Leave the batch where a run of the engine put it, and zeros in its output."""
        buffers, name, found = engine._buffers, self._output, self.host(values)
        buffers.send(name, np.zeros_like(found))
        buffers.wait()

        def run() -> None:
            engine._check(engine.context.execute_async_v3(buffers.stream))
            buffers.wait()

        def fetch() -> NDArray[Any]:
            copied = buffers.fetch(name, found.shape, found.dtype)
            buffers.wait()
            return copied

        return Resident(run, fetch)
