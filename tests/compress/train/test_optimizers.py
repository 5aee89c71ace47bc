"""Muon and AdamW: which weights each takes, and what a step of Muon is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeclip.compress.train.optimizers import Muon, adamw, linear_matrices, newton_schulz

sides = st.integers(1, 12)


@given(sides, sides, st.integers(0, 1000))
def test_singular_values_come_near_1(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.empty(rows, columns)
    nn.init.orthogonal_(whole, generator=generator)  # no direction is next to 0
    scales = 0.5 + torch.rand(min(rows, columns), generator=generator)
    matrix = whole * scales[:, None] if rows <= columns else whole * scales
    found = newton_schulz(100 * matrix)
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.5
    # The directions stay: each is stretched, none is turned.
    assert torch.allclose(found.T @ matrix, matrix.T @ found, atol=1e-3)


def test_a_matrix_of_zeros_stays_finite() -> None:
    assert newton_schulz(torch.zeros(3, 5)).abs().max() == 0


def test_a_first_step_by_hand() -> None:
    # A gradient of one direction: u v^T with its singular value alone, so the update is f u v^T,
    # where f is the quintic applied five times to 1.
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]))
    weight.grad = torch.zeros(4, 2)
    weight.grad[1, 0] = -7.0
    factor = 1.0
    for _ in range(5):
        factor = 3.4445 * factor - 4.7750 * factor**3 + 2.0315 * factor**5
    expected = weight.detach() * (1 - 0.1 * 0.5)
    expected[1, 0] += 0.1 * (4 / 2) ** 0.5 * factor
    Muon([weight], learning_rate=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, expected, atol=1e-5)


def test_the_steps_are_those_of_torch_but_for_bfloat16() -> None:
    torch.manual_seed(0)
    begin = [torch.randn(24, 16), torch.randn(8, 16)]
    ours = [nn.Parameter(own.clone()) for own in begin]
    theirs = [nn.Parameter(own.clone()) for own in begin]
    mine = Muon(ours, learning_rate=0.05, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(one.shape)
            one.grad, other.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    for one, other, before in zip(ours, theirs, begin, strict=True):
        moved = (one - before).norm()
        assert (one - other).norm() < 0.02 * moved


def test_a_weight_without_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Muon([weight], learning_rate=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 2))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.convolution = nn.Conv2d(3, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)


def test_muon_takes_the_matrices_of_linear_layers_alone() -> None:
    model = _Model()
    found = {
        name
        for name, weight in model.named_parameters()
        if any(weight is own for own in linear_matrices(model))
    }
    assert found == {"attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"}


def test_adamw_does_not_decay_biases_and_scales() -> None:
    model = _Model()
    optimizer = adamw(model.parameters(), learning_rate=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    optimizer.step()
    for name, weight in model.named_parameters():
        decay = 0.95 if weight.ndim > 1 else 1.0
        assert torch.allclose(weight, decay * before[name]), name


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_matrix_products_changes_digits_alone(matmul_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(16, 16)
    exact = newton_schulz(matrix)
    assert (newton_schulz(matrix, matmul_dtype) - exact).norm() < 0.05 * exact.norm()
