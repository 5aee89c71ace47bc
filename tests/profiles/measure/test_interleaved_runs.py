import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    round_order,
    warm_up,
)
from edgeclip.runtime.errors import EngineError, InputError
from tests.conftest import QUICK

WORKLOAD = dataclasses.replace(QUICK, batch_sizes=(1, 3))


class Clock:
    """A clock that moves only when a target runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def target(self, name: str, seconds: Callable[[int, int], float]) -> BenchmarkTarget:
        """One that takes `seconds(batch size, runs before)`."""
        runs = Counter[str]()

        def run(batch: NDArray[Any]) -> None:
            self.now += seconds(len(batch), runs[name])
            runs[name] += 1
            self.calls.append((name, len(batch)))

        return BenchmarkTarget(name, run, lambda size: np.zeros((size, 2)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake


def test_times_ratio_and_throughput_are_what_the_clock_says(clock: Clock) -> None:
    slow = clock.target("slow", lambda size, _: 0.010 * size)
    fast = clock.target("fast", lambda size, _: 0.002 * size)
    first, second = measure_interleaved([slow, fast], WORKLOAD, part="image", reference="slow")
    assert (first.name, second.name) == ("slow", "fast")
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio.reference == "slow"
    assert second.ratio.ratio.value == pytest.approx(0.2)
    latency = second.latency
    assert latency.runs == 12
    assert latency.p90_ms is None  # of 12 runs its interval cannot be known
    median = latency.p50_ms
    assert [median.low, median.value, median.high] == pytest.approx([2, 2, 2])
    assert [rate.batch for rate in second.sweep] == [1, 3]
    assert [r.items_per_s.value for r in second.sweep] == pytest.approx([500, 500])
    assert second.input_shape == (1, 2)
    assert second.cpu.wall_s == pytest.approx(12 * 0.002)


def test_ratio_stays_true_when_the_machine_slows_down_half_way(clock: Clock) -> None:
    def slowing(base: float) -> Callable[[int, int], float]:
        return lambda size, runs: base * size * (4 if runs > 20 else 1)

    few_warm = dataclasses.replace(WORKLOAD, min_warmup_runs=10, repeats=20)
    targets = [clock.target("a", slowing(0.01)), clock.target("b", slowing(0.005))]
    _, second = measure_interleaved(targets, few_warm, part="text", reference="a")
    assert second.ratio is not None
    assert second.ratio.ratio.value == pytest.approx(0.5)
    assert np.percentile(second.samples_ms[0], 90) == pytest.approx(20)


def test_each_target_takes_each_place_equally_often() -> None:
    for count in (1, 2, 3, 5):
        places = Counter(
            (target, place)
            for number in range(2 * count)
            for place, target in enumerate(round_order(count, number))
        )
        assert set(places.values()) == {2}
        assert len(places) == count * count


def test_targets_run_once_a_round_in_changing_order(clock: Clock) -> None:
    names = ["a", "b", "c"]
    targets = [clock.target(name, lambda size, _: 0.001) for name in names]
    warm = [m.warm_up.runs for m in measure_interleaved(targets, WORKLOAD, part="image")]
    timed = [name for name, size in clock.calls if size == 1][sum(warm) :]
    rounds = [timed[at : at + 3] for at in range(0, len(timed), 3)]
    assert len(rounds) == WORKLOAD.repeats
    assert all(sorted(turn) == names for turn in rounds)
    assert rounds[0] == rounds[1][::-1]


def test_warm_up_waits_until_the_median_settles(clock: Clock) -> None:
    cooling = clock.target("a", lambda _, runs: max(0.01, 0.05 - 0.003 * runs))
    result = warm_up(cooling, np.zeros((1, 2)), min_runs=2, max_seconds=100)
    assert result.settled
    assert 14 <= result.runs <= 30  # constant from run 14 on


def test_warm_up_gives_up_when_its_time_is_over(clock: Clock) -> None:
    restless = clock.target("a", lambda _, runs: 0.001 * 1.2**runs)
    result = warm_up(restless, np.zeros((1, 2)), min_runs=2, max_seconds=0.01)
    assert not result.settled
    assert result.runs >= WORKLOAD.min_warmup_runs


def test_progress_reaches_its_total(clock: Clock) -> None:
    seen: list[tuple[int, int]] = []
    one = clock.target("a", lambda size, _: 0.001)
    measure_interleaved([one], WORKLOAD, part="image", progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_garbage_collector_rests_and_comes_back() -> None:
    states: list[bool] = []

    def run(_: NDArray[Any]) -> None:
        states.append(gc.isenabled())
        if len(states) > 20:
            raise EngineError("broken")

    with pytest.raises(EngineError, match="broken"):
        measure_interleaved([BenchmarkTarget("a", run, np.zeros)], WORKLOAD, part="image")
    assert set(states) == {False}
    assert gc.isenabled()


def test_refuses_what_cannot_be_measured() -> None:
    one = BenchmarkTarget("a", lambda _: None, lambda size: np.zeros((size, 1)))
    wrong = BenchmarkTarget("b", lambda _: None, lambda size: np.zeros((size + 1, 1)))
    for targets, reference, message in (
        ([], None, "at least one"),
        ([one, one], None, "different names"),
        ([one], "z", "not a target"),
        ([wrong], None, "first axis must be 1"),
    ):
        with pytest.raises(InputError, match=message):
            measure_interleaved(targets, WORKLOAD, part="image", reference=reference)
