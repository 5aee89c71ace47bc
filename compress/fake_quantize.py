"""Fake quantization: float products of values that are rounded as an int8 graph rounds them.

Inputs and weights of the products are rounded to the steps that the quantizer gives them, so
a loss is that of the quantized tower. Everything else stays float, as it does in the graph:
norms, softmax, GELU, the products of attention, the patches. Biases do too; the int32 that
CPU graphs make of some of them is far finer than all else.

Gradients go straight through the rounding (Bengio et al., Estimating or Propagating Gradients
Through Stochastic Neurons, 2013), and stop where a value lies outside its range (Jacob et al.,
Quantization and Training of Neural Networks, CVPR 2018). Steps of weights follow the weights,
from which the quantizer takes them; ranges of inputs stay as they were calibrated. Learned
steps (LSQ, Esser et al., ICLR 2020) do not pay: they would have to travel with the weights,
because calibration finds ranges anew, and LSQ's gradient for the steps of weights gave the
same cosines on the built-in student as none.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from edgeclip.profiles.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGrid:
    """What the input of a product can be: `scale * (n - zero)`, n from `lowest` to `highest`.

    Raises:
        ValueError: a scale that is not positive, or a zero that is not one of the integers.
    """

    scale: float
    zero: int
    lowest: int
    highest: int

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not self.lowest <= self.zero <= self.highest:
            raise ValueError(f"zero must be from {self.lowest} to {self.highest}, got {self.zero}")

    def round(self, values: Tensor) -> Tensor:
        """Round values of any shape, and limit them to the range; ties go to even."""
        rounded: Tensor = torch.fake_quantize_per_tensor_affine(
            values.float(), self.scale, self.zero, self.lowest, self.highest
        )
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrid:
    """What weights can be: n times a step, n from -`largest` to `largest`.

    Attributes:
        largest: 127, or 64 where weights take 7 bits.
        per_channel: each output channel has a step of its own.

    Raises:
        ValueError: fewer than two levels.
    """

    largest: int = 127
    per_channel: bool = True

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"largest must be 1 or more, got {self.largest}")

    def round(self, weight: Tensor) -> Tensor:
        """Round a float32 weight [outputs, ...]; its largest value of each step stays."""
        with torch.no_grad():
            sizes = weight.abs().flatten(1).amax(dim=1)
            if not self.per_channel:
                sizes = sizes.amax().expand(len(weight))
            steps = torch.where(sizes > 0, sizes / self.largest, 1.0)
            zeros = torch.zeros_like(steps, dtype=torch.int32)
        rounded: Tensor = torch.fake_quantize_per_channel_affine(
            weight, steps, zeros, 0, -self.largest, self.largest
        )
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductGrid:
    """How both factors of a product are rounded."""

    input: InputGrid
    weight: WeightGrid = WeightGrid()


# Names of the `nn.Linear` and `nn.Conv2d` of a model that are quantized.
ProductGrids = Mapping[str, ProductGrid]


@contextmanager
def fake_quantized(model: nn.Module, grids: ProductGrids) -> Iterator[None]:
    """Let a model compute what its quantized graph does, while the block lasts.

    Its modules, parameters and their names stay the same, so checkpoints are those of the
    float model. Modules that share its parts, such as a tower for export, see it too.
    Autocast must be off: a bfloat16 has no more digits than an int8.

    Raises:
        ConfigError: a name that is no product of the model.
    """
    products = {name: _product(model, name) for name in grids}
    try:
        for name, product in products.items():
            vars(product)["forward"] = partial(_rounded_forward, product, grids[name])
        yield
    finally:
        for product in products.values():
            vars(product).pop("forward", None)  # the class's own is seen again


def _product(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    found = dict(model.named_modules()).get(name)
    if isinstance(found, nn.Linear | nn.Conv2d):
        return found
    raise ConfigError(f"the model has no linear layer or convolution {name!r} to quantize")


def _rounded_forward(product: nn.Linear | nn.Conv2d, grid: ProductGrid, values: Tensor) -> Tensor:
    rounded, weight = grid.input.round(values), grid.weight.round(product.weight)
    if isinstance(product, nn.Linear):
        return nn.functional.linear(rounded, weight, product.bias)
    result: Tensor = product._conv_forward(rounded, weight, product.bias)  # pads as it is told
    return result
