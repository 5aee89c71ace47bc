import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.quantization_aware import (
    InputGrid,
    ProductGrid,
    WeightGrid,
    fake_quantized,
)
from edgeclip.runtime.errors import ConfigError

GRID = InputGrid(scale=0.25, zero=10, lowest=0, highest=31)  # from -2.5 to 5.25


def quantize(values: Any, grid: InputGrid) -> Any:
    """QuantizeLinear and DequantizeLinear, as ONNX defines them."""
    whole = np.clip(np.rint(values / grid.scale) + grid.zero, grid.lowest, grid.highest)
    return (whole - grid.zero) * grid.scale


def linear(inputs: int = 4, outputs: int = 3) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


@given(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4))
def test_inputs_are_rounded_and_clipped_as_onnx_does(values: list[float]) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    with fake_quantized(model, {"0": ProductGrid(input=GRID)}):
        found = model(torch.tensor([values]))
    np.testing.assert_array_equal(
        found.detach().numpy()[0], quantize(np.array(values, np.float32), GRID)
    )


@pytest.mark.parametrize("largest", [127, 64, 7])
def test_weights_have_a_step_for_each_channel(largest: int) -> None:
    weight = linear(16, 5)[0].weight
    found = WeightGrid(largest=largest).round(weight)
    steps = weight.abs().amax(dim=1, keepdim=True) / largest
    torch.testing.assert_close(found, (weight / steps).round() * steps)
    assert (found - weight).abs().max() <= steps.max() / 2 * 1.001
    levels = (found / steps).round()
    assert levels.abs().amax(dim=1).tolist() == [largest] * 5


def test_weights_may_share_one_step() -> None:
    weight = torch.tensor([[1.0, 0.4], [0.003, -0.2]])
    found = WeightGrid(largest=10, per_channel=False).round(weight)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.4], [0.0, -0.2]]))


def test_a_channel_of_zeros_stays_so() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    torch.testing.assert_close(WeightGrid().round(weight), weight, atol=0.02, rtol=0)
    assert not WeightGrid().round(weight)[0].any()


def test_gradients_go_straight_through_but_not_from_outside_a_range() -> None:
    model = linear(4, 1)
    values = torch.tensor([[0.1, 5.0, 9.0, -3.0]], requires_grad=True)
    with fake_quantized(model, {"0": ProductGrid(input=GRID)}):
        model(values).sum().backward()
    weight = WeightGrid().round(model[0].weight)[0]
    assert values.grad is not None
    inside = torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(values.grad[0], weight.detach() * inside)
    assert model[0].weight.grad is not None
    rounded = quantize(values.detach().numpy(), GRID)
    np.testing.assert_allclose(model[0].weight.grad.numpy(), rounded)


def test_convolutions_are_padded_as_they_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))
    values = torch.rand(2, 3, 9, 9)
    grid = InputGrid(scale=1 / 255, zero=0, lowest=0, highest=255)
    exact = model(values)
    with fake_quantized(model, {"0": ProductGrid(input=grid)}):
        found = model(values)
    assert found.shape == exact.shape
    assert 0 < (found - exact).abs().max() < 0.02


def test_a_model_is_itself_again_and_keeps_its_names(teacher: DualEncoder) -> None:
    student = copy.deepcopy(teacher)
    names = list(student.state_dict())
    pixels = torch.rand(2, 3, 32, 32)
    grid = ProductGrid(input=InputGrid(scale=0.1, zero=128, lowest=0, highest=255))
    products = {
        name: grid
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and "vision" in name
    }
    assert len(products) == 24
    with torch.no_grad():
        before = student.embed_image(pixels)
        with fake_quantized(student, products):
            assert list(student.state_dict()) == names
            assert not torch.equal(student.embed_image(pixels), before)
        assert torch.equal(student.embed_image(pixels), before)


def test_a_model_is_itself_again_after_an_interruption() -> None:
    model = linear()

    def stopped() -> None:
        with fake_quantized(model, {"0": ProductGrid(input=GRID)}):
            assert "forward" in vars(model[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("name", ["1", "0.weight", ""])
def test_what_is_no_product_is_refused(name: str) -> None:
    model = linear()
    grids = dict.fromkeys(("0", name), ProductGrid(input=GRID))
    with pytest.raises(ConfigError, match=f"no linear layer or convolution '{name}'"):
        fake_quantized(model, grids).__enter__()
    assert "forward" not in vars(model[0])


def test_grids_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        InputGrid(scale=0.0, zero=0, lowest=0, highest=255)
    with pytest.raises(ValueError, match="zero must be from 0 to 255"):
        InputGrid(scale=1.0, zero=256, lowest=0, highest=255)
    with pytest.raises(ValueError, match="largest must be 1 or more"):
        WeightGrid(largest=0)
