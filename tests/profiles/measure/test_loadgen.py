"""LoadGen's scenarios on fast fake subjects and a real tower, and its logs."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.profiles.measure import loadgen
from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, repeat_rows
from edgeclip.profiles.measure.loadgen import SampleTimes, read_trace, read_verdict, run_scenario
from edgeclip.profiles.record.measurement import ScenarioResult
from edgeclip.profiles.workload import Scenario
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import EngineError, InputError, MissingExtraError
from edgeclip.runtime.towers.tower_runner import TowerRunner
from tests.conftest import QUICK

pytestmark = pytest.mark.slow

pytest.importorskip("mlperf_loadgen")

SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
WORKLOAD = dataclasses.replace(
    QUICK,
    batch_sizes=(1, 3),
    repeats=3,
    scenario_seconds=0.2,
    scenario_queries=30,
    multi_stream=4,
)
SINGLE_MS = 2.0


class Sleeper:
    """A subject whose run takes 1 ms; `events` happen in the runs of these numbers."""

    def __init__(self, events: dict[int, Callable[[], object]] | None = None) -> None:
        self.runs = 0
        self.sizes: set[int] = set()
        self.threads: set[int] = set()
        self._events = events or {}

    @property
    def target(self) -> BenchmarkTarget:
        return BenchmarkTarget("sleeper", self.run, lambda size: np.zeros((size, 2)))

    def run(self, batch: NDArray[Any]) -> None:
        self.runs += 1
        self.sizes.add(len(batch))
        self.threads.add(threading.get_ident())
        self._events.get(self.runs, lambda: None)()
        time.sleep(0.001)


def run(
    scenario: Scenario, target: BenchmarkTarget, folder: Path, **changes: Any
) -> ScenarioResult:
    workload = dataclasses.replace(WORKLOAD, **changes)
    return run_scenario(scenario, target, workload, single_ms=SINGLE_MS, folder=folder)


def fail(error: BaseException) -> Callable[[], None]:
    def event() -> None:
        raise error

    return event


@pytest.fixture(scope="module", autouse=True)
def _frozen_garbage() -> Iterator[None]:
    """Each scenario collects garbage first, which takes long among all that pytest holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[SampleTimes]:
    """The answers of each scenario that was run."""
    found: list[SampleTimes] = []

    def read(path: Path) -> SampleTimes:
        found.append(read_trace(path))
        return found[-1]

    monkeypatch.setattr(loadgen, "read_trace", read)
    return found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoadGen gives up a Server test after 64 open queries."""
    monkeypatch.setattr(loadgen, "_OPEN_SECONDS", 0.0)


@every_scenario
def test_scenario_on_a_real_tower(
    scenario: Scenario, tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle)
    runner = TowerRunner(bundle, "image", "int8", cpu_device)
    tower = BenchmarkTarget("int8", runner.run, repeat_rows(bundle.golden().pixels))
    found = run(scenario, tower, tmp_path, scenario_seconds=0.1)
    assert found.scenario == scenario
    assert found.seconds > 0
    assert found.samples_per_s.value * found.seconds == pytest.approx(
        found.queries * found.samples_per_query
    )
    assert found.samples_per_s.low <= found.samples_per_s.value <= found.samples_per_s.high
    assert (found.latency is None) == (scenario == "Offline")
    assert found.bound_ms is None
    if found.latency:
        assert found.latency.runs == found.queries >= WORKLOAD.scenario_queries
        assert 0 <= found.latency.p50_ms.low <= found.latency.p50_ms.value
    if scenario == "Offline":
        assert (found.queries, found.loadgen_p50_ms) == (1, None)
        assert found.samples_per_query >= WORKLOAD.scenario_queries
    else:
        assert found.samples_per_query == (4 if scenario == "MultiStream" else 1)


@pytest.mark.parametrize("scenario", ["SingleStream", "MultiStream", "Server"])
def test_our_latencies_are_those_behind_loadgens_percentiles(
    scenario: Scenario, tmp_path: Path, seen: list[SampleTimes]
) -> None:
    rng = np.random.default_rng(0)
    uneven = BenchmarkTarget(
        "uneven",
        lambda _: time.sleep(rng.uniform(0.0001, 0.002)),
        lambda size: np.zeros((size, 2)),
    )
    found = run(scenario, uneven, tmp_path)
    values = np.sort(seen[0].query_latency_ms)
    verdict = read_verdict(tmp_path / scenario / "mlperf_log_detail.txt")
    assert len(verdict.percentiles_ns) == 5
    for percent, nanoseconds in verdict.percentiles_ns:
        assert values[int(len(values) * percent / 100)] == pytest.approx(nanoseconds / 1e6)
    assert found.latency is not None
    middle = len(values) // 2
    assert found.loadgen_p50_ms == pytest.approx(values[middle])
    assert values[middle - 1] <= found.latency.p50_ms.value <= values[middle]


def test_server_latency_counts_from_the_scheduled_time(
    tmp_path: Path, seen: list[SampleTimes]
) -> None:
    """While one run takes long, queries go on coming, and wait."""
    sleeper = Sleeper({20: lambda: time.sleep(0.1)})
    found = run("Server", sleeper.target, tmp_path, scenario_seconds=0.4)
    assert found.target_qps == 250
    answers = seen[0]
    assert np.count_nonzero(answers.query_latency_ms > 50) >= 5
    # The answers are late, the schedule is not: its gaps are those of a Poisson process.
    gaps = np.diff(answers.scheduled_ns) / 1e9
    assert gaps.max() < 0.05
    assert 0.5 / 250 < gaps.mean() < 2 / 250
    assert gaps.std() > 0.5 * gaps.mean()


@every_scenario
def test_only_server_runs_beside_the_asking_thread(scenario: Scenario, tmp_path: Path) -> None:
    sleeper = Sleeper()
    run(scenario, sleeper.target, tmp_path, scenario_seconds=0.05)
    own = threading.get_ident()
    assert len(sleeper.threads) == (2 if scenario == "Server" else 1)
    assert own in sleeper.threads  # the warm-up
    assert (
        sleeper.sizes
        == {
            "SingleStream": {1},
            "MultiStream": {4},
            "Server": {1},
            "Offline": {1, 3},
        }[scenario]
    )


@every_scenario
@pytest.mark.parametrize("error", [EngineError("broken"), KeyboardInterrupt()])
@pytest.mark.usefixtures("hasty")
def test_failure_of_a_run_ends_the_test_and_the_next_one_works(
    scenario: Scenario, error: BaseException, tmp_path: Path
) -> None:
    sleeper = Sleeper({40: fail(error)})
    with pytest.raises(type(error)) as caught:
        run(scenario, sleeper.target, tmp_path, scenario_seconds=1.0)
    assert caught.value is error
    assert sleeper.runs == 40  # nothing was run afterwards
    assert run(scenario, Sleeper().target, tmp_path, scenario_seconds=0.05).queries


@every_scenario
@pytest.mark.usefixtures("hasty")
def test_ctrl_c_ends_the_test_and_the_next_one_works(scenario: Scenario, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    sleeper = Sleeper({40: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        run(scenario, sleeper.target, tmp_path, scenario_seconds=1.0)
    assert signal.getsignal(signal.SIGINT) is before
    assert run(scenario, Sleeper().target, tmp_path, scenario_seconds=0.05).queries


def test_process_that_was_stopped_exits_as_python_does(tmp_path: Path) -> None:
    """LoadGen aborts a process that ends while its logger still runs."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.profiles.measure import test_loadgen as t
t.loadgen._OPEN_SECONDS = 0.1
events = {{10: lambda: print("running", flush=True)}}
t.run("Server", t.Sleeper(events).target, Path("logs"), scenario_seconds=60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


def test_scenarios_run_in_other_threads_than_the_main_one(tmp_path: Path) -> None:
    found: list[ScenarioResult] = []
    target = Sleeper().target
    threads = [
        threading.Thread(target=lambda name=name: found.append(run(name, target, tmp_path)))
        for name in SCENARIOS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item.scenario for item in found) == sorted(SCENARIOS)


def test_nothing_is_left_in_the_current_folder_or_taken_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "audit.config").write_text("*.*.max_query_count = 3\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for scenario in SCENARIOS:
        found = run(scenario, Sleeper().target, tmp_path / "logs", scenario_seconds=0.05)
        assert found.queries * found.samples_per_query >= WORKLOAD.scenario_queries
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.config", "logs"]
    left = {path.name for path in (tmp_path / "logs").rglob("*") if path.is_file()}
    assert left == {
        "mlperf_log_accuracy.json",
        "mlperf_log_detail.txt",
        "mlperf_log_summary.txt",
    }


def test_verdict_and_bound_of_server(tmp_path: Path) -> None:
    missed = run("Server", Sleeper().target, tmp_path, server_bound_ms=0.5)
    assert not missed.valid
    assert missed.reasons[0] == "Reduce target QPS to improve latency."
    assert (missed.bound_ms, missed.bound_percentile) == (0.5, 99)
    at_once = BenchmarkTarget("at once", lambda _: None, lambda size: np.zeros((size, 2)))
    kept = run("Server", at_once, tmp_path, server_load=5.0, server_bound_ms=60_000.0)
    assert (kept.valid, kept.reasons) == (True, ())
    assert dict(kept.settings)["server_target_latency_ns"] == "60000000000"


def test_too_few_queries_are_not_valid(tmp_path: Path) -> None:
    found = run("SingleStream", Sleeper().target, tmp_path, scenario_seconds=0.01)
    assert not found.valid
    assert "Need to process at least 64 queries for early stopping." in found.reasons[0]
    assert dict(found.settings) == {
        "min_duration_ms": "10",
        "min_query_count": "30",
        "single_stream_expected_latency_ns": "1000000",
    }


def test_offline_runs_full_batches_of_the_fastest_size(tmp_path: Path) -> None:
    """A run takes about as long for any size; 100 samples are no multiple of 48."""
    sleeper = Sleeper()
    found = run(
        "Offline",
        sleeper.target,
        tmp_path,
        batch_sizes=(1, 48),
        scenario_seconds=0.001,
        scenario_queries=100,
    )
    assert found.samples_per_query == 100
    assert dict(found.settings)["batch"] == "48"
    assert sleeper.sizes == {1, 48}


def test_subject_that_takes_one_row_only(tmp_path: Path) -> None:
    def run_one(batch: NDArray[Any]) -> None:
        if len(batch) != 1:
            raise EngineError("made for batch 1")
        time.sleep(0.001)

    one = BenchmarkTarget("one", run_one, lambda size: np.zeros((size, 2)))
    for scenario in ("MultiStream", "Offline"):
        with pytest.raises(EngineError, match="made for batch 1"):
            run(scenario, one, tmp_path)
    assert run("Offline", one, tmp_path, batch_sizes=(1,), scenario_seconds=0.01).valid


def test_progress_counts_the_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 2)
    told: list[tuple[int, int]] = []
    run_scenario(
        "SingleStream",
        Sleeper().target,
        dataclasses.replace(WORKLOAD, scenario_seconds=0.02),
        single_ms=SINGLE_MS,
        folder=tmp_path,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 1)]
    tick = loadgen._ticker(lambda done, total: told.append((done, total)), 2.5)
    told.clear()
    for _ in range(20):
        tick()
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_failure_of_progress_ends_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    def refuse(done: int, total: int) -> None:
        raise InputError("the bar broke")

    with pytest.raises(InputError, match="the bar broke"):
        run_scenario(
            "SingleStream",
            Sleeper().target,
            WORKLOAD,
            single_ms=SINGLE_MS,
            folder=tmp_path,
            progress=refuse,
        )


def test_what_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Sleeper().target
    with pytest.raises(InputError, match="single_ms"):
        run_scenario("Server", target, WORKLOAD, single_ms=0, folder=tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write its logs"):
        run("Server", target, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingExtraError, match=r"edgeclip\[profile\]"):
        run("Server", target, tmp_path)


def entry(key: str, value: Any, *, error: bool = False) -> str:
    metadata = {"is_error": error, "is_warning": False, "file": "results.cc", "line_no": 1}
    return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": metadata})


def answers(*rows: tuple[int, int, int]) -> SampleTimes:
    return SampleTimes(*np.array(rows, dtype=np.int64).T)


def test_verdict_of_a_valid_test(tmp_path: Path) -> None:
    lines = [
        "LoadGen says something else",
        entry("result_validity", "VALID"),
        entry("early_stopping_met", True),
        entry("early_stopping_result", " * Run successful."),
        entry("result_50.00_percentile_latency_ns", 1_500_000),
        entry("result_99.00_percentile_latency_ns", 2_500_000),
    ]
    path = tmp_path / "detail.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    verdict = read_verdict(path)
    assert verdict.valid
    assert verdict.reasons == ()
    assert dict(verdict.percentiles_ns) == {50.0: 1_500_000, 99.0: 2_500_000}


def test_verdict_gives_all_reasons_in_loadgens_words(tmp_path: Path) -> None:
    lines = [
        entry("error_runtime", "Ending early: Too many outstanding queries.", error=True),
        entry("result_validity", "INVALID"),
        entry("early_stopping_met", False),
        entry("result_invalid_reason", "Reduce target QPS to improve latency. "),
        entry("early_stopping_result", " * Only processed 26 queries.  * Need 662."),
        entry("result_50.00_percentile_latency_ns", 1),
        entry("result_50.00_percentile_per_query_latency_ns", 8),
    ]
    path = tmp_path / "detail.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    verdict = read_verdict(path)
    assert not verdict.valid
    assert verdict.reasons == (
        "Reduce target QPS to improve latency.",
        "Ending early: Too many outstanding queries.",
        "* Only processed 26 queries. * Need 662.",
    )
    assert dict(verdict.percentiles_ns) == {50.0: 8}  # a query's, not a sample's


def test_logs_without_a_result_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(entry("test_datetime", "now"), encoding="utf-8")
    with pytest.raises(EngineError, match="holds no result"):
        read_verdict(path)
    with pytest.raises(EngineError, match="holds no sample"):
        read_trace(path)


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(
        '{"traceEvents":[\n'
        '{"name":"IssueQuery","ph":"X","pid":1,"tid":1,"ts":63.915,"dur":16.074,"args":{}},\n'
        '{"name":"Sample","cat":"default","ph":"b","pid":1,"id":1,"ts":1000.500,"args":'
        '{"sample_seq":1,"query_seq":1,"sample_idx":1,"issue_start_ns":7,"complete_ns":300}},\n'
        '{"name":"Sample","cat":"default","ph":"e", "pid":1,"id":1,"ts":1000.800},\n'
        '{"name":"Sample","cat":"default","ph":"b","pid":1,"id":0,"ts":0.001,"args":'
        '{"sample_seq":0,"query_seq":0,"sample_idx":7,"issue_start_ns":190,"complete_ns":200}},\n'
        '{"name":"LastTrace"}\n],\n"displayTimeUnit":"ns"}\n',
        encoding="utf-8",
    )
    found = read_trace(path)
    assert found.query.tolist() == [0, 1]
    assert found.scheduled_ns.tolist() == [1, 1_000_500]
    assert found.latency_ns.tolist() == [200, 300]


def test_a_query_takes_as_long_as_its_last_sample() -> None:
    found = answers((0, 0, 5_000_000), (0, 0, 7_000_000), (1, 10**7, 9_000_000), (1, 10**7, 1))
    assert found.query_latency_ms.tolist() == [7, 9]


def test_samples_a_second_are_those_of_the_whole_time() -> None:
    """Two samples at 1 s, one at 2 s, three at 4 s."""
    second = 10**9
    found = answers(*[(0, 0, at * second) for at in (1, 1, 2, 4, 4, 4)])
    assert found.seconds == 4
    rate = found.samples_per_s
    assert rate.value == pytest.approx(6 / 4)
    assert 0 <= rate.low < 1.5 < rate.high  # three moments tell little
    alone = answers((0, 0, second)).samples_per_s
    assert (alone.value, alone.low, alone.high) == (1, 0, np.inf)


def test_the_interval_of_the_rate_covers_the_true_one() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        gaps = rng.exponential(np.repeat(rng.uniform(5, 15, 50), 20))  # 10 ms, in changing minutes
        count = np.arange(len(gaps))
        times = np.cumsum(1e6 * gaps).astype(np.int64)
        rate = SampleTimes(count, np.zeros_like(count), times).samples_per_s
        hits += rate.low <= 100 <= rate.high
    assert hits >= 180  # 190 expected; fewer than 180 has a chance of one in four hundred


def test_interval_of_the_rate_counts_neighbours_together() -> None:
    gaps = np.repeat(np.random.default_rng(0).normal(10, 1, 100), 10)
    mixed = np.random.default_rng(0).permutation(gaps)

    def rate(seconds: Any) -> Any:
        times = np.cumsum(1e6 * seconds).astype(np.int64)
        count = np.arange(len(times))
        return SampleTimes(count, np.zeros_like(count), times).samples_per_s

    wide, narrow = rate(gaps), rate(mixed)
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
