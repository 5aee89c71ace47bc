import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_loads import LOADS, LoadableTarget, measure_loads
from edgeclip.profiles.measure.interleaved_runs import repeat_rows
from edgeclip.runtime.errors import InputError
from tests.conftest import QUICK

Run = Callable[[NDArray[Any]], object]


class Engines:
    """Engines that do next to nothing, and note when they are loaded and what they get."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.given: list[NDArray[Any]] = []

    def target(self, name: str, work: int = 0) -> LoadableTarget:
        def load() -> Run:
            self.loaded.append(name)
            return lambda values: self.given.extend([values] * (work + 1))

        return LoadableTarget(name, load, repeat_rows(np.arange(6.0).reshape(3, 2)))


def test_every_load_is_new_and_in_another_order() -> None:
    made = Engines()
    names = ["a", "b", "c"]
    found = measure_loads([made.target(name) for name in names], QUICK, part="image", reference="b")
    assert [item.name for item in found] == names
    loads = [made.loaded[at : at + 3] for at in range(0, len(made.loaded), 3)]
    assert len(loads) == LOADS
    assert all(sorted(load) == names for load in loads)
    assert len({tuple(load) for load in loads}) == 6
    assert {values.shape for values in made.given} == {(1, 2)}
    for item in found:
        assert [len(runs) for runs in item.samples_ms] == [QUICK.repeats] * LOADS
        assert item.latency.runs == QUICK.repeats * LOADS
    assert [item.ratio is None for item in found] == [False, True, False]


def test_a_ratio_has_student_s_interval_over_the_loads() -> None:
    made = Engines()
    targets = [made.target("base"), made.target("slow", work=300)]
    _, slow = measure_loads(targets, QUICK, part="text", reference="base", loads=4)
    assert slow.ratio is not None
    ratio = slow.ratio.ratio
    assert 1 < ratio.low < ratio.value < ratio.high < np.inf


def test_slow_engines_run_less_often_where_time_is_short() -> None:
    slow = LoadableTarget("a", lambda: lambda _: time.sleep(0.003), np.zeros)
    many = replace(QUICK, repeats=200)
    (found,) = measure_loads([slow], many, part="image", reference="a", loads=2, seconds=0.01)
    assert {len(runs) for runs in found.samples_ms} == {5}


@pytest.mark.parametrize(
    ("names", "reference", "loads"), [([], "a", 1), (["a", "a"], "a", 1), (["a"], "b", 1),
                                      (["a"], "a", 0)]
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(names: list[str], reference: str, loads: int) -> None:
    targets = [Engines().target(name) for name in names]
    with pytest.raises(InputError, match="targets with different names, the reference among"):
        measure_loads(targets, QUICK, part="image", reference=reference, loads=loads)
