"""Candidates of torch: as transformers runs a tower, eager, compiled, and as a CUDA graph.

All but the first run the module that the ONNX files are captured from, whose last layer is
computed for one token only; so they differ from the engines in nothing but the engine.
Attention is the fused kernel that transformers takes by default. Fp16 means weights in half
precision, without autocast.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu_case import PRECISIONS, Case, GpuPrecision, Resident, Runner, Variant
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.export.graph.export_modules import PlainImageTower, PlainTextTower, tower_module

REFERENCE = "torch eager fp32"
_WARM_UPS = 3  # before a capture, as the documentation of torch.cuda.graphs asks for
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def torch_variants(device: str) -> Iterator[Variant]:
    """All candidates of torch on a device, "cuda" or "cpu"."""
    yield Variant(
        name="transformers fp32",
        precision="fp32",
        open=functools.partial(_open_eager, precision="fp32", device=device, plain=True),
    )
    for precision in PRECISIONS:
        options: dict[str, Any] = {"precision": precision, "device": device}
        yield Variant(
            name=f"torch eager {precision}",
            precision=precision,
            open=functools.partial(_open_eager, **options),
        )
        for mode in ("reduce-overhead", "max-autotune"):
            yield Variant(
                name=f"torch.compile {mode} {precision}",
                precision=precision,
                open=functools.partial(_open_compiled, mode=mode, **options),
                slow=mode == "max-autotune",
            )
        yield Variant(
            name=f"torch CUDA graph {precision}",
            precision=precision,
            open=functools.partial(_open_graph, **options),
        )


class TorchRunner:
    """A function of tensors, called for each batch."""

    def __init__(self, call: Callable[[Tensor], Tensor], device: str) -> None:
        self._call = call
        self._device = device

    @torch.inference_mode()
    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """Copy, run, copy back, which waits for the GPU."""
        return self._call(torch.from_numpy(values).to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def place(self, values: NDArray[Any]) -> Resident:
        """Keep the batch on the device."""
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
        return Resident(self._run, lambda: self._found.cpu().numpy())

    def _run(self) -> None:
        self._graph.replay()
        _wait(self._device)


def _module(case: Case, precision: GpuPrecision, device: str, *, plain: bool = False) -> nn.Module:
    """A copy of the tower on the device."""
    dual = copy.deepcopy(case.dual)
    dual.model.set_attn_implementation("sdpa")
    module = tower_module(dual, case.tower)
    if plain:
        module = PlainImageTower(dual) if case.tower == "image" else PlainTextTower(dual)
    return module.eval().to(device, _DTYPES[precision])


def _open_eager(case: Case, *, precision: GpuPrecision, device: str, plain: bool = False) -> Runner:
    return TorchRunner(_module(case, precision, device, plain=plain), device)


def _open_compiled(case: Case, *, precision: GpuPrecision, device: str, mode: str) -> Runner:
    """Both modes use CUDA graphs; a part that is not compiled would be an error."""
    module = _module(case, precision, device)
    return TorchRunner(torch.compile(module, mode=mode, fullgraph=True, dynamic=False), device)


def _open_graph(case: Case, *, precision: GpuPrecision, device: str) -> Runner:
    return GraphRunner(_module(case, precision, device), case.values, device)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.current_stream().synchronize()
