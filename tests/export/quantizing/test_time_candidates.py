from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.quantizing.candidate_evaluator import SEARCH_WORKLOAD, time_candidates
from edgeclip.profiles.measure.interleaved_loads import LOADS

Run = Callable[[NDArray[Any]], NDArray[Any]]

SHORT = replace(SEARCH_WORKLOAD, repeats=6, max_warmup_seconds=0.01)
VALUES = np.arange(6.0).reshape(3, 2)


class Loaders:
    """Engines that do next to nothing, and note when they are loaded and what they get."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.given: list[NDArray[Any]] = []

    def loader(self, name: str, work: int = 1) -> Callable[[], Run]:
        def run(values: NDArray[Any]) -> NDArray[Any]:
            self.given += [values] * work
            return values

        def load() -> Run:
            self.loaded.append(name)
            return run

        return load


def test_a_candidate_is_timed_over_several_loads_on_the_first_input() -> None:
    made = Loaders()
    old, new = made.loader("old"), made.loader("new")
    (found,) = time_candidates(old, [new], VALUES, tower="text", workload=SHORT)
    assert made.loaded.count("old") == made.loaded.count("new") == LOADS
    assert all(np.array_equal(values, VALUES[:1]) for values in made.given)
    assert len(found.load_ratios) == LOADS
    assert found.ratio == found.estimate.interval
    for interval in (found.ratio, found.ms, found.reference_ms):
        assert 0 < interval.low <= interval.value <= interval.high


def test_a_race_times_all_in_the_same_rounds_and_tells_them_in_their_order() -> None:
    made = Loaders()
    loaders = [made.loader("quick"), made.loader("slow", work=20_000)]
    quick, slow = time_candidates(
        made.loader("old"), loaders, VALUES, tower="image", workload=SHORT
    )
    assert made.loaded[:6] == ["old", "quick", "slow", "slow", "quick", "old"]
    assert slow.ratio.low > quick.ratio.high
    assert slow.ms.value > quick.ms.value
