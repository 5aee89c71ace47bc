"""The optimizers of a run: Muon for the matrices of linear layers, AdamW for all else."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_ITERATIONS = 5
# Of the quintic a x + b x^3 + c x^5 whose iteration takes singular values near to 1 soonest.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal: all its singular values near 1.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with Nesterov momentum,
    decoupled weight decay, and a step that is sqrt(max(1, out / in)) times the learning rate.
    `torch.optim.Muon` is the same in bfloat16 alone, which a processor without it computes 20 times
    slower than float32.

    Args:
        weights: matrices [out, in].
        learning_rate: the highest.
        weight_decay: of all of them.
        matmul_dtype: of the matrix products.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        matmul_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weights, {"lr": learning_rate, "weight_decay": weight_decay})
        self._matmul_dtype = matmul_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; a weight without a gradient stays as it is."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum: Tensor = state["momentum"].lerp_(weight.grad, 1 - _MOMENTUM)
                update = newton_schulz(weight.grad.lerp(momentum, _MOMENTUM), self._matmul_dtype)
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def newton_schulz(matrix: Tensor, matmul_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return about U V^T of a matrix U S V^T, as float32: Newton-Schulz iterations.

    Its singular values are from 0.5 to 1.5 but for those that were next to 0.
    """
    found = matrix.to(matmul_dtype)
    is_high = found.shape[0] > found.shape[1]
    if is_high:
        found = found.T
    found = found / found.norm().clamp(min=_TINY)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = found @ found.T
        found = torch.addmm(
            found, torch.addmm(square, square, square, beta=b, alpha=c), found, beta=a
        )
    return (found.T if is_high else found).float()


def linear_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of linear layers that are trained, in the order of the module's weights.

    Tables of embeddings and convolutions are none.
    """
    linear = {
        id(weight)
        for part in module.modules()
        if isinstance(part, nn.Linear | nn.MultiheadAttention)
        for weight in part.parameters(recurse=False)
        if weight.ndim == 2
    }
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return [
        weight
        for weight in module.parameters()
        if weight.requires_grad and id(weight) in linear - tables
    ]


def adamw(
    weights: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019); biases, norms and scales are not decayed."""
    held = list(weights)
    groups: list[dict[str, Any]] = [
        {"params": [w for w in held if w.ndim > 1], "weight_decay": weight_decay},
        {"params": [w for w in held if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
