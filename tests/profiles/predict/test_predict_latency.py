import dataclasses

import pytest

from edgeclip.profiles.predict.measure_probes import carry_over
from edgeclip.profiles.predict.predict_latency import Predictor, predict_latency
from edgeclip.profiles.predict.tower_shapes import AnyTower, ConvTower, Piece, TransformerTower
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision
from tests.profiles.predict.known_device import known_device, law, tower_ms


def image(width: int, layers: int, tokens: int, patch: int) -> TransformerTower:
    return TransformerTower(
        part="image",
        width=width,
        heads=width // 64,
        hidden=4 * width,
        layers=layers,
        tokens=tokens,
        dim=512,
        patch=patch,
    )


TOWERS: tuple[AnyTower, ...] = (
    image(192, 6, 50, 32),
    image(384, 12, 197, 16),
    image(64, 1, 65, 8),
    TransformerTower(part="text", width=320, heads=5, hidden=1280, layers=6, tokens=12, dim=512),
    ConvTower(widths=(48, 96, 192), depths=(2, 2, 4), image_size=64, dim=512),
    ConvTower(widths=(40, 80, 160), depths=(2, 3, 6), image_size=224, dim=256),
)


@pytest.mark.parametrize("tower", TOWERS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tower_takes_the_sum_of_its_pieces(tower: AnyTower, precision: Precision) -> None:
    found = predict_latency(known_device(), tower, precision)
    right = tower_ms(tower, precision)
    assert found.ms == pytest.approx(right, rel=0.03)
    assert found.low < right < found.high
    assert found.ms == pytest.approx(sum(part.ms for part in found.parts))
    assert found.method == "sum of pieces measured on known"


def test_the_interval_grows_with_the_error_of_whole_towers() -> None:
    tower = image(192, 6, 50, 32)
    exact = predict_latency(known_device(), tower)
    off = predict_latency(known_device(off=0.2), tower)
    assert exact.high / exact.ms == pytest.approx(1.03, abs=0.02)
    assert off.high / off.ms == pytest.approx(1.2, abs=0.02)


def test_the_interval_grows_outside_of_what_was_measured() -> None:
    inside = predict_latency(known_device(), image(512, 4, 257, 14))
    outside = predict_latency(known_device(), image(1024, 4, 257, 14))
    assert outside.high / outside.ms > 1.05 > inside.high / inside.ms
    assert "outside the measured ones by a factor of 2.00" in outside.method
    with pytest.raises(InputError, match="too far"):
        predict_latency(known_device(), image(2048, 4, 257, 14))


def test_a_device_with_a_few_probes_is_told_by_another() -> None:
    def slower(piece: Piece, precision: Precision) -> float:
        return 0.02 + 1.8 * law(piece, precision)

    source, few = known_device(), known_device(slower, name="slow", few=True)
    carried = carry_over(source, few)
    predictor = Predictor(carried)
    for tower in TOWERS:
        for precision in source.precisions:
            found = predictor.predict(tower, precision)
            right = tower_ms(tower, precision, slower)
            assert found.ms == pytest.approx(right, rel=0.15)
            assert found.low < right < found.high
    assert "carried over from known" in predictor.predict(TOWERS[0], "fp32").method


def test_what_was_measured_on_the_few_stays() -> None:
    source = known_device()
    few = known_device(lambda piece, precision: 3 * law(piece, precision), few=True)
    carried = carry_over(source, few)
    assert carried.costs[: len(few.costs)] == few.costs
    assert {(c.piece, c.precision) for c in carried.costs} == {
        (c.piece, c.precision) for c in source.costs
    }
    assert all(not cost.samples_ms for cost in carried.costs[len(few.costs) :])
    assert carried.carried is not None
    assert carried.carried.worst == pytest.approx(0, abs=0.2)


def test_a_precision_that_the_device_cannot_run_is_not_carried_over() -> None:
    few = known_device(few=True)
    floats = dataclasses.replace(
        few, costs=tuple(cost for cost in few.costs if cost.precision == "fp32")
    )
    carried = carry_over(known_device(), floats)
    assert carried.precisions == ("fp32",)
    with pytest.raises(InputError, match=r"no times of .* in int8"):
        predict_latency(carried, TOWERS[0], "int8")


def test_devices_without_common_probes_are_refused() -> None:
    source, few = known_device(), known_device(few=True, name="slow")
    one = dataclasses.replace(few, costs=few.costs[:2])
    with pytest.raises(InputError, match="'slow' shares 2 pieces with 'known'"):
        carry_over(source, one)
