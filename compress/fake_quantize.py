"""Fake quantization: products computed in float, of values rounded as an int8 graph rounds them.

What goes in and the weights are rounded to the steps that the quantizer gives them, so the
loss is that of the quantized tower. The gradient goes straight through the rounding
(Bengio et al. 2013; Jacob et al. 2018), except where a value lies outside its range. Ranges of
what goes in are given and stay; steps of weights follow the weights, as the quantizer takes
them from the weights too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.profiles.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGrid:
    """What a quantized input can be: `scale * (n - zero)`, n an integer of `lowest` to `highest`."""

    scale: float
    zero: int
    lowest: int
    highest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeQuantization:
    inputs: Mapping[str, InputGrid]
    largest: int = 127
    per_channel: bool = True


@contextmanager
def fake_quantized(model: nn.Module, how: FakeQuantization) -> Iterator[None]:
    modules = {name: model.get_submodule(name) for name in how.inputs}
    for name, module in modules.items():
        module.forward = _Product(module, how.inputs[name], how.largest, how.per_channel)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


class _Product:
    def __init__(self, module, grid, largest, per_channel):
        self.module, self.grid, self.largest, self.per_channel = module, grid, largest, per_channel

    def __call__(self, values):
        grid = self.grid
        values = torch.fake_quantize_per_tensor_affine(
            values.float(), grid.scale, grid.zero, grid.lowest, grid.highest
        )
        weight = rounded_weight(self.module.weight, self.largest, self.per_channel)
        return F.linear(values, weight, self.module.bias)

LSQ = False
def rounded_weight(weight, largest, per_channel):
    if LSQ:
        scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / largest
        q = weight / scale
        return scale * (q + (q.round() - q).detach())
    with torch.no_grad():
        if per_channel:
            scale = weight.abs().amax(tuple(range(1, weight.ndim))) / largest
        else:
            scale = (weight.abs().amax() / largest).expand(len(weight))
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.zeros_like(scale)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -largest, largest)
