import dataclasses

import pytest

from edgeclip.profiles.predict.measure_probes import transfer_costs
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.tower_shapes import TowerBlock
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision
from tests.profiles.predict.known_device import TOWERS, known_device, law, tower_ms


def test_a_device_with_a_few_probes_is_predicted_from_another() -> None:
    def slower(block: TowerBlock, precision: Precision) -> float:
        return 0.02 + 1.8 * law(block, precision)

    source, few = known_device(), known_device(slower, name="slow", few=True)
    moved = transfer_costs(source, few)
    predictor = Predictor(moved)
    for tower in TOWERS:
        for precision in source.precisions:
            found = predictor.predict(tower, precision)
            right = tower_ms(tower, precision, slower)
            assert found.ms == pytest.approx(right, rel=0.15)
            assert found.low < found.ms < found.high
            assert found.level == 3 / 4  # three whole towers are among the few
    assert "transferred from known" in predictor.predict(TOWERS[0], "fp32").method


def test_what_was_measured_on_the_few_stays() -> None:
    source = known_device()
    few = known_device(lambda block, precision: 3 * law(block, precision), few=True)
    moved = transfer_costs(source, few)
    assert moved.costs[: len(few.costs)] == few.costs
    assert {(c.piece, c.precision) for c in moved.costs} == {
        (c.piece, c.precision) for c in source.costs
    }
    assert all(not cost.samples_ms for cost in moved.costs[len(few.costs) :])
    assert moved.carried is not None
    assert moved.carried.error <= moved.carried.bound == pytest.approx(0, abs=0.2)
    assert moved.carried.level == 0.9


def test_a_precision_that_the_device_cannot_run_is_not_transferred() -> None:
    few = known_device(few=True)
    floats = dataclasses.replace(
        few, costs=tuple(cost for cost in few.costs if cost.precision == "fp32")
    )
    moved = transfer_costs(known_device(), floats)
    assert moved.precisions == ("fp32",)
    with pytest.raises(InputError, match=r"no times of .* in int8"):
        Predictor(moved).predict(TOWERS[0], "int8")


def test_devices_without_common_probes_are_refused() -> None:
    source, few = known_device(), known_device(few=True, name="slow")
    one = dataclasses.replace(few, costs=few.costs[:2])
    with pytest.raises(InputError, match="'slow' shares 2 blocks with 'known'"):
        transfer_costs(source, one)
