"""SmoothQuant in the student itself, as `smooth` does it in a graph.

A fine-tune for int8 moves weights by parts of a step, so it has to begin with the weights that
are quantized in the end. Smoothing them afterwards would move them by more than it did.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.errors import ExportError
from edgeclip.export.quantizing.smooth import factors
from edgeclip.runtime.spec import Tower


@dataclass(slots=True, eq=False)
class _Norm:
    """A LayerNorm, the largest values that it gave for each channel, and what read them."""

    name: str
    sizes: Tensor | None = None
    readers: dict[str, nn.Linear] = field(default_factory=dict)
    given: Tensor | None = None  # by the pass in hand

    def gave(self, _module: nn.Module, _inputs: Any, result: Tensor) -> None:
        largest = result.detach().abs().flatten(0, -2).amax(dim=0)
        self.sizes = largest if self.sizes is None else torch.maximum(self.sizes, largest)
        self.given = result

    def was_read(self, name: str, module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0] is self.given:
            self.readers[name] = module


def smooth_student(
    student: DualEncoder, tower: Tower, alphas: Mapping[str, float], data: CalibrationData
) -> None:
    """Divide the channels of some norms, and multiply the layers behind them, in place.

    Args:
        student: what it computes stays the same, but for rounding.
        tower: which one is smoothed.
        alphas: names of `nn.LayerNorm` in it, and for each the share that the weights take.
            Only linear layers may read its result.
        data: shows how large the channels become; pictures normalised, as float32.

    Raises:
        ExportError: a norm that no linear layer reads.
    """
    student.eval()
    norms = {name: _Norm(name) for name in alphas}
    embed = student.embed_image if tower == "image" else student.embed_text
    with _watched(student, norms), torch.inference_mode():
        for index in range(data.count):
            embed(torch.from_numpy(data.batch(index)).to(student.device))
    for name, alpha in alphas.items():
        _fold(student.get_submodule(name), norms[name], alpha)


@contextmanager
def _watched(student: DualEncoder, norms: Mapping[str, _Norm]) -> Iterator[None]:
    handles = []
    for norm in norms.values():
        handles.append(student.get_submodule(norm.name).register_forward_hook(norm.gave))
        handles += [
            module.register_forward_pre_hook(partial(norm.was_read, name))
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms.values():
            norm.given = None


def _fold(module: nn.Module, norm: _Norm, alpha: float) -> None:
    if norm.sizes is None or not norm.readers:
        raise ExportError(f"no linear layer reads {norm.name}, so it cannot be smoothed")
    weights = [
        layer.weight.detach().cpu().numpy().T.astype(np.float64) for layer in norm.readers.values()
    ]
    found = factors(norm.sizes.cpu().numpy().astype(np.float64), weights, alpha)
    divisors = torch.from_numpy(found).to(norm.sizes)
    with torch.no_grad():
        for values in module.parameters():
            values.div_(divisors)
        for layer in norm.readers.values():
            layer.weight.mul_(divisors)
