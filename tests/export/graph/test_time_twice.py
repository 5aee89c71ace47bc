from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.graph.tune_passes import ab_benchmark
from edgeclip.export.quantizing.candidate_evaluator import SEARCHING, measure_latency, race

Run = Callable[[NDArray[Any]], NDArray[Any]]

QUICK = replace(SEARCHING, repeats=12, max_warmup_seconds=0.01)
VALUES = np.arange(6.0).reshape(3, 2)


class Openers:
    """Engines that do next to nothing, and note when they are loaded and what they get."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.given: list[NDArray[Any]] = []

    def opener(self, name: str) -> Callable[[], Run]:
        def run(values: NDArray[Any]) -> NDArray[Any]:
            self.given.append(values)
            return values

        def opened() -> Run:
            self.loaded.append(name)
            return run

        return opened


def test_engines_are_loaded_anew_in_both_orders_and_run_on_the_first_input() -> None:
    made = Openers()
    found = ab_benchmark(
        made.opener("old"), made.opener("new"), VALUES, tower="image", workload=QUICK
    )
    assert made.loaded == ["old", "new", "new", "old"]
    assert all(np.array_equal(values, VALUES[:1]) for values in made.given)
    assert len(found) == 2
    for item in found:
        assert item.candidate.latency.runs == item.reference.latency.runs == 12
        assert item.ratio.low <= item.ratio.value <= item.ratio.high


def test_a_latency_holds_both_measurements() -> None:
    made = Openers()
    found = measure_latency(
        made.opener("old"), made.opener("new"), VALUES, tower="text", workload=QUICK
    )
    assert len(made.loaded) == 4
    for interval in (found.ratio, found.ms, found.reference_ms):
        assert 0 < interval.low <= interval.value <= interval.high


def test_a_race_times_all_in_the_same_rounds_and_tells_them_in_their_order() -> None:
    made = Openers()
    names = ("old", "quick", "slow")

    def sluggish() -> Run:
        run = made.opener("slow")()

        def slower(values: NDArray[Any]) -> NDArray[Any]:
            for _ in range(200):
                run(values)
            return values

        return slower

    openers = [made.opener("quick"), sluggish]
    quick, slow = race(made.opener("old"), openers, VALUES, tower="image", workload=QUICK)
    assert made.loaded == [*names, *reversed(names)]
    assert slow.ratio.low > quick.ratio.high
    assert slow.ms.value > quick.ms.value
