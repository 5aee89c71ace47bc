import dataclasses
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import (
    Candidate,
    measure_interleaved,
    round_order,
    warm_up,
)
from edgeclip.profiles.measure.subject import (
    bundle_candidates,
    example_feed,
    measurement_run,
)
from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.profiles.record.timing_statistics import (
    paired_ratio,
    percentile_interval,
    rate_interval,
)
from edgeclip.profiles.report.tables import measurement_table
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.errors import ConfigError, EngineError, InputError
from tests.conftest import QUICK

WORKLOAD = dataclasses.replace(QUICK, batch_sizes=(1, 3))


class Clock:
    """A clock that moves only when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def candidate(self, name: str, seconds: Callable[[int, int], float]) -> Candidate:
        """One that takes `seconds(batch size, runs before)`."""
        runs = Counter[str]()

        def run(batch: NDArray[Any]) -> None:
            self.now += seconds(len(batch), runs[name])
            runs[name] += 1
            self.calls.append((name, len(batch)))

        return Candidate(name, run, lambda size: np.zeros((size, 2)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake


def test_times_ratio_and_throughput_are_what_the_clock_says(clock: Clock) -> None:
    slow = clock.candidate("slow", lambda size, _: 0.010 * size)
    fast = clock.candidate("fast", lambda size, _: 0.002 * size)
    first, second = measure_interleaved([slow, fast], WORKLOAD, part="image", reference="slow")
    assert (first.name, second.name) == ("slow", "fast")
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio.reference == "slow"
    assert second.ratio.ratio.value == pytest.approx(0.2)
    latency = second.latency
    assert latency.runs == 12
    assert latency.p99_ms is None  # nothing lies beyond it
    for part in (latency.p50_ms, latency.p90_ms, latency.p95_ms):
        assert [part.low, part.value, part.high] == pytest.approx([2, 2, 2])
    assert [rate.batch for rate in second.sweep] == [1, 3]
    assert [r.items_per_s.value for r in second.sweep] == pytest.approx([500, 500])
    assert second.input_shape == (1, 2)
    assert second.cpu.wall_s == pytest.approx(12 * 0.002)


def test_ratio_stays_true_when_the_machine_slows_down_half_way(clock: Clock) -> None:
    def slowing(base: float) -> Callable[[int, int], float]:
        return lambda size, runs: base * size * (4 if runs > 20 else 1)

    few_warm = dataclasses.replace(WORKLOAD, min_warmup_runs=10, repeats=20)
    candidates = [clock.candidate("a", slowing(0.01)), clock.candidate("b", slowing(0.005))]
    _, second = measure_interleaved(candidates, few_warm, part="text", reference="a")
    assert second.ratio is not None
    assert second.ratio.ratio.value == pytest.approx(0.5)
    assert second.latency.p90_ms.value == pytest.approx(20)


def test_each_candidate_takes_each_place_equally_often() -> None:
    for count in (1, 2, 3, 5):
        places = Counter(
            (candidate, place)
            for number in range(2 * count)
            for place, candidate in enumerate(round_order(count, number))
        )
        assert set(places.values()) == {2}
        assert len(places) == count * count


def test_candidates_take_turns(clock: Clock) -> None:
    names = ["a", "b", "c"]
    candidates = [clock.candidate(name, lambda size, _: 0.001) for name in names]
    warm = [m.warm_up.runs for m in measure_interleaved(candidates, WORKLOAD, part="image")]
    timed = [name for name, size in clock.calls if size == 1][sum(warm) :]
    rounds = [timed[at : at + 3] for at in range(0, len(timed), 3)]
    assert len(rounds) == WORKLOAD.repeats
    assert all(sorted(turn) == names for turn in rounds)
    assert rounds[0] == rounds[1][::-1]


def test_warm_up_waits_until_the_median_settles(clock: Clock) -> None:
    patient = dataclasses.replace(WORKLOAD, max_warmup_seconds=100)
    cooling = clock.candidate("a", lambda _, runs: max(0.01, 0.05 - 0.003 * runs))
    result = warm_up(cooling, np.zeros((1, 2)), patient)
    assert result.settled
    assert 14 <= result.runs <= 30  # constant from run 14 on


def test_warm_up_gives_up_when_its_time_is_over(clock: Clock) -> None:
    restless = clock.candidate("a", lambda _, runs: 0.001 * 1.2**runs)
    result = warm_up(restless, np.zeros((1, 2)), WORKLOAD)
    assert not result.settled
    assert result.runs >= WORKLOAD.min_warmup_runs


def test_progress_reaches_its_total(clock: Clock) -> None:
    seen: list[tuple[int, int]] = []
    one = clock.candidate("a", lambda size, _: 0.001)
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
        measure_interleaved([Candidate("a", run, np.zeros)], WORKLOAD, part="image")
    assert set(states) == {False}
    assert gc.isenabled()


def test_refuses_what_cannot_be_measured() -> None:
    one = Candidate("a", lambda _: None, lambda size: np.zeros((size, 1)))
    wrong = Candidate("b", lambda _: None, lambda size: np.zeros((size + 1, 1)))
    for candidates, reference, message in (
        ([], None, "at least one"),
        ([one, one], None, "different names"),
        ([one], "z", "not a candidate"),
        ([wrong], None, "first axis must be 1"),
    ):
        with pytest.raises(InputError, match=message):
            measure_interleaved(candidates, WORKLOAD, part="image", reference=reference)


def test_percentile_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        interval = percentile_interval(rng.exponential(1.0, 80), 50)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= np.log(2) <= interval.high
    assert 50 <= hits <= 60  # 57 expected; fewer than 50 has a chance of one in a thousand


def test_interval_is_wider_for_runs_that_resemble_their_neighbours() -> None:
    rng = np.random.default_rng(2)
    drifting = np.repeat(rng.normal(10, 1, 25), 8)
    wide = percentile_interval(drifting, 50)
    narrow = percentile_interval(rng.permutation(drifting), 50)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_paired_ratio_and_rate() -> None:
    reference = np.array([1.0, 2.0, 4.0])
    assert paired_ratio(reference / 4, reference).value == 0.25
    rate = rate_interval(np.array([0.5, 0.5, 0.5]), 8)
    assert (rate.low, rate.value, rate.high) == (16, 16, 16)


def real_run(clock: Clock) -> MeasurementRun:
    one = clock.candidate("a", lambda size, _: 0.001)
    measurements = measure_interleaved([one], WORKLOAD, part="image")
    return measurement_run(measurements, workload=WORKLOAD, command="edgeclip profile x")


def test_json_round_trip(clock: Clock, tmp_path: Path) -> None:
    run = real_run(clock)
    run.save(tmp_path / "m.json")
    assert MeasurementRun.load(tmp_path / "m.json") == run


def test_json_of_another_kind_is_refused(clock: Clock, tmp_path: Path) -> None:
    data = json.loads(real_run(clock).to_json())
    for change, message in (
        ({"schema_version": 1}, "measure again"),
        ({"surprise": 1}, "surprise: unknown key"),
        ({"machine": 3}, "machine"),
    ):
        with pytest.raises(ConfigError, match=message):
            MeasurementRun.from_json(json.dumps({**data, **change}), source="m.json")
    for text in ("{", "[]", "3"):
        with pytest.raises(ConfigError, match=r"m\.json"):
            MeasurementRun.from_json(text, source="m.json")
    with pytest.raises(ConfigError, match="cannot read"):
        MeasurementRun.load(tmp_path / "missing.json")


def test_table_warns_of_contention_and_restless_runs(clock: Clock) -> None:
    run = real_run(clock)
    item = dataclasses.replace(
        run.measurements[0],
        contended=True,
        warm_up=dataclasses.replace(run.measurements[0].warm_up, settled=False),
    )
    quiet = dataclasses.replace(
        item, contended=False, warm_up=dataclasses.replace(item.warm_up, settled=True)
    )
    loud_text = measurement_table(dataclasses.replace(run, measurements=(item,)))
    quiet_text = measurement_table(dataclasses.replace(run, measurements=(quiet,)))
    assert "CONTENDED" in loud_text
    assert "Not steady after warm-up: image a." in loud_text
    assert "CONTENDED" not in quiet_text
    assert "steady" not in quiet_text


@pytest.mark.parametrize("tower", ["image", "text"])
def test_towers_of_a_bundle(tiny_bundle: Path, cpu_device: DeviceProfile, tower: Any) -> None:
    candidates = bundle_candidates(Bundle.open(tiny_bundle), tower, cpu_device)
    measured = measure_interleaved(candidates, WORKLOAD, part=tower, reference="fp32")
    assert [item.name for item in measured] == ["fp32", "int8"]
    assert [item.ratio is None for item in measured] == [True, False]
    for item in measured:
        latency = item.latency
        assert 0 < latency.p50_ms.value <= latency.p90_ms.value <= latency.p95_ms.value
        assert item.cpu.process_s >= 0
        assert [(point.batch, point.threads) for point in item.sweep] == [(1, 1), (3, 1)]
    run = measurement_run(measured, workload=WORKLOAD, command="measure")
    assert MeasurementRun.from_json(run.to_json(), source="x") == run


def test_batches_repeat_the_golden_inputs(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    bundle = Bundle.open(tiny_bundle)
    candidate = bundle_candidates(bundle, "image", cpu_device, prefix="student ")[1]
    assert candidate.name == "student int8"
    pixels = bundle.golden().pixels
    batch = candidate.make_batch(len(pixels) + 1)
    assert np.array_equal(batch[-1], pixels[0])


def test_a_graph_of_one_batch_size_is_fed_such_a_batch(
    own_bundle: Path, edit_manifest: Callable[[Path, Callable[[dict[str, Any]], None]], None]
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["towers"][0]["files"][0]["batch"] = 3

    edit_manifest(own_bundle, change)
    bundle = Bundle.open(own_bundle)
    assert example_feed(bundle, "image", "fp32")["pixel_values"].shape == (3, 3, 8, 8)
    assert example_feed(bundle, "image", "int8")["pixels"].shape == (1, 8, 8, 3)


def test_a_device_that_allows_nothing_the_bundle_holds(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp16",))
    with pytest.raises(InputError, match="can run none of fp32, int8, which the bundle holds"):
        bundle_candidates(Bundle.open(tiny_bundle), "image", device)


def test_verb_device_prints_what_load_device_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["device", "jetson-orin-nano"]) == 0
    path = tmp_path / "jetson.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_device(path) == load_device("jetson-orin-nano")
    assert main(["device", "--out", str(tmp_path / "here.yaml")]) == 0
    assert load_device(tmp_path / "here.yaml") == load_device("this-machine")
    capsys.readouterr()
    assert main(["device", "--list"]) == 0
    assert "rtx-4000-ada" in capsys.readouterr().out
