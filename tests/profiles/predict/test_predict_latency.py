import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.profiles.predict.measured_device import (
    BlockCost,
    CheckTime,
    MeasuredDevice,
    load_measured,
)
from edgeclip.profiles.predict.predict_latency import (
    FARTHEST,
    Prediction,
    Predictor,
    non_negative_fit,
)
from edgeclip.profiles.predict.tower_shapes import AnyTower, ConvTower, TowerBlock
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.predict.known_device import TOWERS, image, known_device, law, tower_ms

DEVICE = known_device()
PREDICTOR = Predictor(DEVICE)
STEM = ConvTower(widths=(48,), depths=(0,), image_size=64, dim=8).stem()

SMALL = image(192, 6, 50, 32)
# Enough for `SMALL`, so that a device is quickly fitted.
FEW_COSTS = tuple(
    cost
    for cost in DEVICE.costs
    if cost.precision == "fp32" and cost.piece.kind in ("image-stem", "image-block", "image-last")
)


def with_errors(
    errors: Sequence[float], costs: tuple[BlockCost, ...] = DEVICE.costs
) -> MeasuredDevice:
    """A device with whole towers in fp32 that take so much longer, as logarithms."""
    parts = SMALL.parts()
    bare = dataclasses.replace(DEVICE, costs=costs, checks=())
    ms = Predictor(bare).predict_blocks(parts, "fp32").ms
    checks = []
    for number, error in enumerate(errors):
        took = ms * math.exp(error)
        checks.append(
            CheckTime(
                name=f"tower {number}",
                precision="fp32",
                parts=parts,
                ms=Interval(took, took, took),
            )
        )
    return dataclasses.replace(bare, checks=tuple(checks))


def block(width: int, tokens: int) -> TowerBlock:
    return image(width, 2, tokens, 8).block()


def predict(device: MeasuredDevice, tower: AnyTower, precision: Precision = "fp32") -> Prediction:
    return Predictor(device).predict(tower, precision)


@pytest.mark.parametrize("width", [64, 192, 320, 448])
@pytest.mark.parametrize("tokens", [17, 50, 145, 197])
def test_costs_between_measured_sizes_follow_the_law(width: int, tokens: int) -> None:
    for precision in DEVICE.precisions:
        found = PREDICTOR.block_ms(block(width, tokens), precision)
        assert found == pytest.approx(law(block(width, tokens), precision), rel=0.08)


@given(
    widths=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    tokens=st.tuples(st.integers(17, 257), st.integers(17, 257)),
)
def test_a_larger_block_never_costs_less(widths: tuple[int, int], tokens: tuple[int, int]) -> None:
    small = block(64 * min(widths), min(tokens))
    large = block(64 * max(widths), max(tokens))
    assert PREDICTOR.block_ms(small, "fp32") <= PREDICTOR.block_ms(large, "fp32") * (1 + 1e-9)


def test_sizes_far_from_the_measured_ones_are_refused() -> None:
    assert PREDICTOR.outside(block(256, 65), "int8") == 1
    assert PREDICTOR.outside(block(1024, 257), "int8") == pytest.approx(2)
    assert FARTHEST < 4
    with pytest.raises(InputError, match=r"is too far .*: width 2048 \(measured: 64 to 512\)"):
        PREDICTOR.block_ms(block(2048, 65), "int8")


def test_unusual_heads_lie_outside() -> None:
    half = dataclasses.replace(block(256, 65), heads=8)
    assert PREDICTOR.outside(half, "fp32") == pytest.approx(2)
    quarter = dataclasses.replace(block(256, 65), heads=1)
    with pytest.raises(InputError, match=r"width of a head 256 \(measured: 64 to 64\)"):
        PREDICTOR.outside(quarter, "fp32")


def test_float_blocks_of_int8_are_those_of_fp32() -> None:
    assert PREDICTOR.block_ms(STEM, "int8") == PREDICTOR.block_ms(STEM, "fp32")
    with pytest.raises(InputError, match="no times of conv-stem in fp16"):
        PREDICTOR.block_ms(STEM, "fp16")


def test_fp16_is_never_predicted_from_fp32() -> None:
    costs = [
        dataclasses.replace(cost, precision="fp16")
        for cost in DEVICE.costs
        if cost.piece.kind in ("image-block", "text-block") and cost.precision == "fp32"
    ]
    both = Predictor(dataclasses.replace(DEVICE, costs=(*DEVICE.costs, *costs)))
    assert both.block_ms(block(256, 65), "fp16") == both.block_ms(block(256, 65), "fp32")
    with pytest.raises(InputError, match="no times of conv-stem in fp16"):
        both.block_ms(STEM, "fp16")


def test_a_cost_that_noise_took_below_nothing_does_no_harm() -> None:
    costs = [
        dataclasses.replace(cost, ms=Interval(-0.001, -0.01, 0.01))
        if cost.piece.kind == "conv-head" and cost.piece.width == 64
        else cost
        for cost in DEVICE.costs
    ]
    noisy = Predictor(dataclasses.replace(DEVICE, costs=tuple(costs)))
    head = ConvTower(widths=(96,), depths=(0,), image_size=32, dim=512).head()
    assert noisy.block_ms(head, "fp32") == pytest.approx(PREDICTOR.block_ms(head, "fp32"), rel=0.2)


@pytest.mark.parametrize("open_ones", [3, len(DEVICE.costs)])
def test_costs_without_an_interval_are_fitted_all_the_same(open_ones: int) -> None:
    costs = [
        dataclasses.replace(cost, ms=Interval(cost.ms.value, -math.inf, math.inf))
        if number < open_ones
        else cost
        for number, cost in enumerate(DEVICE.costs)
    ]
    unbounded = Predictor(dataclasses.replace(DEVICE, costs=tuple(costs)))
    found, right = (item.predict(SMALL, "fp32").ms for item in (unbounded, PREDICTOR))
    assert found == pytest.approx(right, rel=0.05)


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


@given(st.integers(0, 2**32 - 1))
def test_no_other_non_negative_coefficients_come_closer(seed: int) -> None:
    draw = np.random.default_rng(seed)
    matrix, target = draw.normal(size=(8, 4)), draw.normal(size=8)
    best = non_negative_fit(matrix, target)
    assert best.min() >= 0
    error = float(np.sum((matrix @ best - target) ** 2))
    others = np.maximum(0.0, best + draw.normal(0, 0.1, (50, 4)))
    assert error <= float(np.sum((others @ matrix.T - target) ** 2, axis=1).min()) + 1e-9


@pytest.mark.parametrize("tower", TOWERS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tower_takes_the_sum_of_its_blocks(tower: AnyTower, precision: Precision) -> None:
    found = PREDICTOR.predict(tower, precision)
    right = tower_ms(tower, precision)
    assert found.ms == pytest.approx(right, rel=0.05)
    assert found.low < found.ms < found.high
    parts = (part.count * PREDICTOR.block_ms(part.piece, precision) for part in tower.parts())
    assert found.ms == pytest.approx(sum(parts))
    assert found.method.startswith("sum of block costs fitted to what was measured on known; ")


def test_the_interval_grows_with_the_error_of_whole_towers() -> None:
    tower = image(192, 6, 50, 32)
    exact, off = predict(DEVICE, tower), predict(known_device(off=0.2), tower)
    assert exact.high / exact.ms < 1.02
    assert off.high / off.ms == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize(("towers", "level"), [(1, 1 / 2), (3, 3 / 4), (8, 8 / 9)])
def test_few_whole_towers_bound_no_more_than_their_number_allows(towers: int, level: float) -> None:
    found = predict(with_errors([0.01 * number for number in range(1, towers + 1)]), SMALL)
    assert found.level == pytest.approx(level)
    assert found.high / found.ms == pytest.approx(math.exp(0.01 * towers))  # the largest error
    assert f"no more than {100 * level:.1f}% for so few" in found.method


def test_enough_whole_towers_give_the_usual_level() -> None:
    nine = predict(with_errors([0.01 * number for number in range(1, 10)]), SMALL)
    assert nine.level == 0.9
    assert nine.high / nine.ms == pytest.approx(math.exp(0.09))
    many = predict(with_errors([0.01 * number for number in range(1, 40)]), SMALL)
    assert many.level == 0.9
    assert many.high / many.ms == pytest.approx(math.exp(0.36))
    assert "for so few" not in many.method


def test_errors_in_another_precision_bound_nothing() -> None:
    device = with_errors([0.1, 0.2])
    found = predict(device, SMALL, "int8")
    assert (found.low, found.high, found.level) == (0.0, math.inf, None)
    assert "no bound, since no whole tower was measured in int8" in found.method
    assert found.bounds == "no bound"


@pytest.mark.slow
def test_the_bound_holds_as_often_as_its_level_says() -> None:
    """Errors with the long tail and the bias that sums of blocks have; 1,000 devices each."""
    draw = np.random.default_rng(0)
    parts = SMALL.parts()
    ms = PREDICTOR.predict(SMALL, "fp32").ms
    for towers in (3, 8, 12):
        held = 0
        for _ in range(1000):
            errors = 0.05 + 0.1 * draw.standard_t(3, towers + 1)
            predictor = Predictor(with_errors(errors[1:].tolist(), costs=FEW_COSTS))
            found = predictor.predict_blocks(parts, "fp32")
            took = found.ms * math.exp(errors[0])
            held += found.low <= took <= found.high
        assert found.ms == pytest.approx(ms, rel=0.05)
        assert found.level is not None
        # Three standard errors of 1,000 draws.
        least = found.level - 3 * math.sqrt(found.level * (1 - found.level) / 1000)
        assert least <= held / 1000 <= math.ceil((towers + 1) * found.level) / (towers + 1) + 0.03


def test_the_interval_grows_outside_of_what_was_measured() -> None:
    inside, outside = (predict(DEVICE, image(width, 4, 257, 14)) for width in (512, 1024))
    assert outside.high / outside.ms > 1.1 * inside.high / inside.ms
    assert "outside the measured ones by a factor of 2.00" in outside.method
    assert "widened by a rule of thumb" in outside.method
    assert inside.level is not None
    assert outside.level is None
    with pytest.raises(InputError, match="too far"):
        predict(DEVICE, image(2048, 4, 257, 14))


def test_towers_of_the_kept_device_are_predicted_within_ten_percent() -> None:
    """Its whole towers were measured beside the probes, and take no part in the fit."""
    measured = load_measured("x86-avx512-vnni-epyc-2-cores")
    predictor = Predictor(measured)
    errors = [
        abs(predicted / ms - 1)
        for precision in measured.precisions
        for predicted, ms in predictor.checks(precision)
    ]
    assert len(errors) == len(measured.checks) >= 16
    assert np.median(errors) < 0.1
