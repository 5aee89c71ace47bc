import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.profiles.predict.predict_latency import FARTHEST, BlockCosts, non_negative_fit
from edgeclip.profiles.predict.tower_shapes import ConvTower, Piece
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval
from tests.profiles.predict.known_device import known_device, law

DEVICE = known_device()
COSTS = BlockCosts(DEVICE)


def block(width: int, tokens: int) -> Piece:
    return Piece(
        kind="image-block",
        width=width,
        positions=tokens,
        heads=max(1, width // 64),
        hidden=4 * width,
    )


def test_a_measured_piece_costs_what_was_measured() -> None:
    for cost in DEVICE.costs:
        assert COSTS.ms(cost.piece, cost.precision) == pytest.approx(cost.ms.value, rel=0.03)


@pytest.mark.parametrize("width", [64, 192, 320, 448])
@pytest.mark.parametrize("tokens", [17, 50, 145, 197])
def test_costs_between_measured_sizes_follow_the_law(width: int, tokens: int) -> None:
    for precision in DEVICE.precisions:
        found = COSTS.ms(block(width, tokens), precision)
        assert found == pytest.approx(law(block(width, tokens), precision), rel=0.03)


@given(
    widths=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    tokens=st.tuples(st.integers(17, 257), st.integers(17, 257)),
)
def test_a_larger_piece_never_costs_less(widths: tuple[int, int], tokens: tuple[int, int]) -> None:
    small = block(64 * min(widths), min(tokens))
    large = block(64 * max(widths), max(tokens))
    assert COSTS.ms(small, "fp32") <= COSTS.ms(large, "fp32") * (1 + 1e-9)


def test_sizes_far_from_the_measured_ones_are_refused() -> None:
    assert COSTS.outside(block(256, 65), "int8") == 1
    assert COSTS.outside(block(1024, 257), "int8") == pytest.approx(2)
    assert FARTHEST < 4
    with pytest.raises(InputError, match=r"is too far .*: width 2048 \(measured: 64 to 512\)"):
        COSTS.ms(block(2048, 65), "int8")


def test_unusual_heads_lie_outside() -> None:
    half = dataclasses.replace(block(256, 65), heads=8)
    assert COSTS.outside(half, "fp32") == pytest.approx(2)
    quarter = dataclasses.replace(block(256, 65), heads=1)
    with pytest.raises(InputError, match=r"width of a head 256 \(measured: 64 to 64\)"):
        COSTS.outside(quarter, "fp32")


def test_float_pieces_of_int8_are_those_of_fp32() -> None:
    stem = ConvTower(widths=(48,), depths=(0,), image_size=64, dim=8).stem()
    assert COSTS.ms(stem, "int8") == COSTS.ms(stem, "fp32")
    with pytest.raises(InputError, match="no times of conv-stem in fp16"):
        COSTS.ms(stem, "fp16")


def test_fp16_is_never_told_by_fp32() -> None:
    costs = [
        dataclasses.replace(cost, precision="fp16")
        for cost in DEVICE.costs
        if cost.piece.kind == "image-block" and cost.precision == "fp32"
    ]
    both = BlockCosts(dataclasses.replace(DEVICE, costs=(*DEVICE.costs, *costs)))
    assert both.ms(block(256, 65), "fp16") == both.ms(block(256, 65), "fp32")
    stem = ConvTower(widths=(48,), depths=(0,), image_size=64, dim=8).stem()
    with pytest.raises(InputError, match="no times of conv-stem in fp16"):
        both.ms(stem, "fp16")


def test_each_piece_is_told_by_the_others() -> None:
    piece = block(256, 65)
    errors = COSTS.errors(piece, "fp32")
    measured = [c for c in DEVICE.costs if c.piece.kind == "image-block" and c.precision == "fp32"]
    assert len(errors) == len(measured)
    assert 0 < np.abs(errors).max() < 0.1


def test_a_cost_that_noise_took_below_nothing_does_no_harm() -> None:
    costs = [
        dataclasses.replace(cost, ms=Interval(-0.001, -0.01, 0.01))
        if cost.piece.kind == "conv-head" and cost.piece.width == 64
        else cost
        for cost in DEVICE.costs
    ]
    noisy = BlockCosts(dataclasses.replace(DEVICE, costs=tuple(costs)))
    head = ConvTower(widths=(96,), depths=(0,), image_size=32, dim=512).head()
    assert noisy.ms(head, "fp32") == pytest.approx(COSTS.ms(head, "fp32"), rel=0.2)


def test_weights_are_never_negative() -> None:
    draw = np.random.default_rng(0)
    matrix = draw.uniform(0, 1, (30, 4))
    right = np.array([2.0, 0.0, 0.5, 0.0])
    assert non_negative_fit(matrix, matrix @ right) == pytest.approx(right, abs=1e-9)
    best = non_negative_fit(matrix, matrix @ np.array([1.0, -1.0, 1.0, 0.2]))
    assert best.min() >= 0
    assert best[1] == 0


def test_columns_that_are_alike_or_empty_can_be_fitted() -> None:
    matrix = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    weights = non_negative_fit(matrix, np.array([1.0, 2.0, 3.0]))
    assert matrix @ weights == pytest.approx([1, 2, 3])
    assert weights.min() >= 0
