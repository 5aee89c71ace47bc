"""Run MLPerf Inference scenarios (SingleStream, MultiStream, Server, Offline) by LoadGen.

LoadGen (the package mlcommons-loadgen) issues the queries, keeps the schedule and judges whether
its rules were kept; latencies and throughput are computed from its trace. "SUT" is MLPerf's word
for the system under test.
"""

import json
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    no_garbage_collection,
    warm_up,
)
from edgeclip.profiles.record.measurement import ScenarioResult
from edgeclip.profiles.record.timing_statistics import latency_of
from edgeclip.profiles.workload import Scenario, Workload
from edgeclip.runtime.console import Progress
from edgeclip.runtime.errors import EngineError, InputError, MissingExtraError
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import estimate_mean_ratio

_BOUND_PERCENTILE = 99.0  # LoadGen's default for Server, and MLPerf's for image models
_NO_BOUND_NS = 3600 * 10**9  # Server requires a latency bound: an hour
_OPEN_SECONDS = 3.0  # of queries may be open; a subject further behind does not keep up
_MIN_OPEN = 64
_PROBES = 3  # runs that estimate the time of a batch
_SPARE = 2.0  # LoadGen prepares queries ahead: prepare so many times more than expected
_OFFLINE_SPARE = 1.1
_BLOCKS = 10  # of consecutive answers
_one_test = threading.Lock()  # LoadGen's state is global to the process


@dataclass(frozen=True, slots=True)
class _TestPlan:
    """The batch to run, and LoadGen settings that differ from the defaults."""

    batch: NDArray[Any]
    settings: Mapping[str, int | float]


def run_scenario(
    scenario: Scenario,
    subject: BenchmarkTarget,
    workload: Workload,
    *,
    single_ms: float,
    folder: Path,
    progress: Progress | None = None,
) -> ScenarioResult:
    """Run one scenario.

    A test lasts `workload.scenario_seconds`, or longer until it has `workload.scenario_queries`
    queries. It ends early if a run fails or on Ctrl-C; Server then ends within the time in which
    three seconds' worth of queries arrive.

    Args:
        scenario: the scenario.
        subject: is warmed up first. Its `make_batch` is asked for 1 row (SingleStream, Server),
            for `workload.multi_stream` rows (MultiStream), or for each of
            `workload.batch_sizes`, of which the fastest is used (Offline).
        workload: duration, number of queries, load and latency bound.
        single_ms: approximate time of one run at batch 1, in milliseconds.
        folder: LoadGen's logs are left in a subfolder named like the scenario, without the
            trace, which is long.
        progress: called with the seconds passed, once a second, between two runs.

    Raises:
        MissingExtraError: mlcommons-loadgen is not installed.
        InputError: `single_ms` is not positive, or `folder` cannot be written to.
        EngineError: LoadGen's logs hold no result.
        KeyboardInterrupt: Ctrl-C was pressed.
        Exception: whatever the subject's `run` or `make_batch` raises.
    """
    loadgen = import_loadgen()
    if not 0 < single_ms < math.inf:
        raise InputError(f"single_ms must be the time of one run, got {single_ms}")
    logs = _make_folder(folder / scenario)
    with _one_test, no_garbage_collection():
        plan = _plan(scenario, subject, workload, single_ms)
        make_sut = QueueingSut if scenario == "Server" else AnsweringSut
        sut = make_sut(
            loadgen, subject, plan.batch, seconds=workload.scenario_seconds, progress=progress
        )
        try:
            with stopped_by_ctrl_c(sut):
                _run_test(loadgen, sut, scenario, plan, logs)
        finally:
            sut.close()
    sut.raise_failure()
    trace = logs / "mlperf_log_trace.json"
    times = read_trace(trace)
    trace.unlink()
    return _result(scenario, workload, plan, read_verdict(logs / "mlperf_log_detail.txt"), times)


def import_loadgen() -> Any:
    """Import mlperf_loadgen.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MissingExtraError(
            "MLPerf's scenarios need mlcommons-loadgen: pip install 'edgeclip[profile]'"
        ) from error
    return mlperf_loadgen


def _make_folder(folder: Path) -> Path:
    """Make sure that LoadGen can write its logs: after a failure it cannot be started again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("summary.txt", "detail.txt", "accuracy.json", "trace.json"):
            (folder / f"mlperf_log_{name}").write_bytes(b"")
    except OSError as error:
        raise InputError(f"LoadGen cannot write its logs into {folder}: {error}") from error
    return folder


def _plan(
    scenario: Scenario, subject: BenchmarkTarget, workload: Workload, single_ms: float
) -> _TestPlan:
    """Choose batch and settings; warms up the subject."""
    settings: dict[str, int | float] = {
        "min_duration_ms": math.ceil(1e3 * workload.scenario_seconds),
        "min_query_count": workload.scenario_queries,
    }
    if scenario == "Offline":
        batch, seconds = min(
            (_warm(subject, workload, size) for size in workload.batch_sizes),
            key=lambda found: found[1] / len(found[0]),
        )
        settings["offline_expected_qps"] = _OFFLINE_SPARE * len(batch) / seconds
        return _TestPlan(batch, settings)
    count = workload.multi_stream if scenario == "MultiStream" else 1
    batch, seconds = _warm(subject, workload, count)
    if scenario == "MultiStream":
        settings["multi_stream_samples_per_query"] = count
        settings["multi_stream_expected_latency_ns"] = max(1, round(1e9 * seconds / _SPARE))
    elif scenario == "SingleStream":
        settings["single_stream_expected_latency_ns"] = max(1, round(1e6 * single_ms / _SPARE))
    else:
        rate = workload.server_load * 1e3 / single_ms
        bound = workload.server_bound_ms
        # Above the rate that can be answered, the queue grows during the whole test.
        behind = max(0.0, workload.server_load - 0.8) * workload.scenario_seconds
        open_queries = math.ceil(rate * (_OPEN_SECONDS + behind))
        settings["server_target_qps"] = rate
        settings["server_target_latency_ns"] = _NO_BOUND_NS if bound is None else round(1e6 * bound)
        settings["server_max_async_queries"] = max(_MIN_OPEN, open_queries)
    return _TestPlan(batch, settings)


def _warm(subject: BenchmarkTarget, workload: Workload, size: int) -> tuple[NDArray[Any], float]:
    """Warm up; return a batch of `size` and the seconds that it takes."""
    batch = subject.make_batch(size)
    warm_up(
        subject,
        batch,
        min_runs=workload.min_warmup_runs,
        max_seconds=workload.max_warmup_seconds,
    )
    times = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        subject.run(batch)
        times.append(time.perf_counter() - start)
    return batch, max(1e-9, float(np.median(times)))


def _run_test(
    loadgen: Any, sut: "AnsweringSut", scenario: Scenario, plan: _TestPlan, logs: Path
) -> None:
    """Run LoadGen; it returns when all queries that it issued are answered."""
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    for name, value in plan.settings.items():
        setattr(settings, name, value)
    log_settings = loadgen.LogSettings()
    log_settings.log_output.outdir = str(logs)
    log_settings.enable_trace = True
    system = loadgen.ConstructFastSUT(sut.issue, sut.flush)
    samples = max(1, settings.multi_stream_samples_per_query)
    library = loadgen.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    try:
        # A file audit.config in the current folder would change the settings.
        audit = str(logs / "no-audit.config")
        loadgen.StartTestWithLogSettings(system, library, settings, log_settings, audit)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroyFastSUT(system)


def _result(
    scenario: Scenario,
    workload: Workload,
    plan: _TestPlan,
    verdict: "LoadGenVerdict",
    times: "SampleTimes",
) -> ScenarioResult:
    latency_ms = times.query_latency_ms
    samples = len(times.query)
    offline, server = scenario == "Offline", scenario == "Server"
    bound_ms = workload.server_bound_ms if server else None
    settings = [(name, str(value)) for name, value in plan.settings.items()]
    if offline:
        settings.append(("batch", str(len(plan.batch))))
    return ScenarioResult(
        scenario=scenario,
        queries=len(latency_ms),
        samples_per_query=samples // len(latency_ms),
        seconds=times.seconds,
        latency=None if offline else latency_of([latency_ms]),
        samples_per_s=times.samples_per_s,
        target_qps=plan.settings["server_target_qps"] if server else None,
        bound_ms=bound_ms,
        bound_percentile=None if bound_ms is None else _BOUND_PERCENTILE,
        valid=verdict.valid,
        loadgen_p50_ms=None if offline else dict(verdict.percentiles_ns)[50.0] / 1e6,
        reasons=verdict.reasons,
        settings=tuple(settings),
    )


SampleIds = Sequence[int]  # as LoadGen numbers them


class AnsweringSut:
    """Answers each query in the thread that issues it.

    Exceptions must not reach LoadGen's C++ code. After the first one, or Ctrl-C, queries are
    completed without running anything, so that the test ends soon.

    Args:
        loadgen: the module mlperf_loadgen.
        subject: what runs.
        batch: its input [n, ...], used for every query. A query of more than n samples takes
            several runs, of which the last may be for fewer than n.
        seconds: duration of the test, for `progress`.
        progress: called once a second at most, between two runs.

    Attributes:
        failure: the exception that the subject, or `progress`, raised.
        stopped: whether Ctrl-C was pressed.
    """

    def __init__(
        self,
        loadgen: Any,
        subject: BenchmarkTarget,
        batch: NDArray[Any],
        *,
        seconds: float,
        progress: Progress | None = None,
    ) -> None:
        self.failure: BaseException | None = None
        self.stopped = False
        self._loadgen = loadgen
        self._run = subject.run
        self._batch = batch
        self._tick = _ticker(progress, seconds)

    def issue(self, ids: SampleIds, _samples: Sequence[int]) -> None:
        """Run a query; called by LoadGen."""
        for at in range(0, len(ids), len(self._batch)):
            self._attempt(self._run, self._batch)
            self._complete(ids[at : at + len(self._batch)])
            self._attempt(self._tick)

    def flush(self) -> None:
        """Note that no more queries come; called by LoadGen."""

    def close(self) -> None:
        """Wait until the last query is answered."""

    @property
    def given_up(self) -> bool:
        """Whether a failure or Ctrl-C ended the test."""
        return self.stopped or self.failure is not None

    def raise_failure(self) -> None:
        """Raise the exception that ended the test early, if any."""
        if self.failure is not None:
            raise self.failure
        if self.stopped:
            raise KeyboardInterrupt

    def _attempt(self, work: Callable[..., object], *args: object) -> None:
        """Call `work` unless the test was given up; keep its exception."""
        if self.given_up:
            return
        try:
            work(*args)
        except BaseException as error:  # a KeyboardInterrupt too must not reach LoadGen
            self.failure = error

    def _complete(self, ids: SampleIds) -> None:
        response = self._loadgen.QuerySampleResponse
        self._loadgen.QuerySamplesComplete([response(number, 0, 0) for number in ids])


class QueueingSut(AnsweringSut):
    """Answers queries in order in a thread of its own.

    LoadGen can then issue each query when it is due, however late the subject is.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting: queue.SimpleQueue[SampleIds | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="loadgen-worker", daemon=True)
        self._worker.start()

    def issue(self, ids: SampleIds, _samples: Sequence[int]) -> None:
        """Queue a query; called by LoadGen."""
        self._waiting.put(ids)

    def flush(self) -> None:
        """Note that no more queries come; called by LoadGen."""
        self._waiting.put(None)

    def close(self) -> None:
        """Wait until the last query is answered."""
        self._waiting.put(None)
        self._worker.join()

    def _work(self) -> None:
        held: list[int] = []
        while (ids := self._waiting.get()) is not None:
            self._attempt(self._run, self._batch)
            if self.given_up:  # LoadGen stops early only while queries stay open
                held += ids
            else:
                self._complete(ids)
                self._attempt(self._tick)
        if held:
            self._complete(held)


@contextmanager
def stopped_by_ctrl_c(sut: AnsweringSut) -> Iterator[None]:
    """Let Ctrl-C stop `sut` in place of raising KeyboardInterrupt at any point of the code.

    Does nothing outside the main thread, which no signal reaches.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        sut.stopped = True

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ticker(progress: Progress | None, seconds: float) -> Callable[[], None]:
    """Return a function that reports the whole seconds since its first call to `progress`."""
    if progress is None:
        return lambda: None
    total = max(1, math.ceil(seconds))
    began: list[float] = []
    reported = 0

    def tick() -> None:
        nonlocal reported
        now = time.monotonic()
        began[:] = began or [now]
        done = min(total, int(now - began[0]))
        if done > reported:
            reported = done
            progress(done, total)

    return tick


_LOG_MARK = ":::MLLOG "
_LOG_PERCENTILES = ("50.00", "90.00", "95.00", "99.00", "99.90")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadGenVerdict:
    """LoadGen's own result.

    Attributes:
        valid: whether its rules were kept.
        reasons: why not, and its errors, in LoadGen's words.
        percentiles_ns: (percent, latency of a query in nanoseconds): of n sorted latencies the
            one with index floor(n * percent / 100).
    """

    valid: bool
    reasons: tuple[str, ...]
    percentiles_ns: tuple[tuple[float, int], ...]


def read_verdict(path: Path) -> LoadGenVerdict:
    """Read LoadGen's detail log.

    Raises:
        EngineError: it holds no result, because LoadGen did not finish.
    """
    found: dict[str, Any] = {}
    errors = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(_LOG_MARK):
            continue
        entry = json.loads(line.removeprefix(_LOG_MARK))
        found[entry["key"]] = entry["value"]
        if entry["metadata"]["is_error"]:
            errors.append(str(entry["value"]))
    if "result_validity" not in found:
        raise EngineError(f"LoadGen's log {path} holds no result: run it again")
    reasons = [str(found.get("result_invalid_reason", "")), *errors]
    if not found.get("early_stopping_met", True):
        reasons.append(str(found.get("early_stopping_result", "")))
    return LoadGenVerdict(
        valid=found["result_validity"] == "VALID",
        reasons=tuple(" ".join(reason.split()) for reason in reasons if reason.strip()),
        percentiles_ns=tuple(_percentiles(found)),
    )


def _percentiles(found: dict[str, Any]) -> Iterator[tuple[float, int]]:
    """Yield the percentiles of queries; MultiStream logs those of samples beside them."""
    for percent in _LOG_PERCENTILES:
        for key in ("percentile_per_query_latency_ns", "percentile_latency_ns"):
            value = found.get(f"result_{percent}_{key}")
            if value is not None:
                yield float(percent), int(value)
                break


@dataclass(frozen=True, slots=True)
class SampleTimes:
    """Times of the answered samples in the order of their issue, each array int64 [N].

    Attributes:
        query: number of the sample's query.
        scheduled_ns: when the query was due, on LoadGen's clock.
        latency_ns: from then to the answer.
    """

    query: NDArray[np.int64]
    scheduled_ns: NDArray[np.int64]
    latency_ns: NDArray[np.int64]

    @property
    def query_latency_ms(self) -> NDArray[np.float64]:
        """Latency of each query: that of its last sample, from the scheduled time."""
        starts = np.flatnonzero(np.diff(self.query, prepend=-1))
        return np.maximum.reduceat(self.latency_ns, starts) / 1e6

    @property
    def seconds(self) -> float:
        """From the first query's scheduled time to the last answer."""
        return float(np.max(self._answered_ns) - self.scheduled_ns[0]) / 1e9

    @property
    def samples_per_s(self) -> Interval:
        """Answered samples per second over the whole time.

        The interval is that of the ratio of samples to seconds (Fieller's, with Student's t) over
        ten blocks of consecutive answers, which are long enough to differ independently.
        """
        moments, samples = np.unique(self._answered_ns, return_counts=True)
        seconds = np.diff(moments, prepend=self.scheduled_ns[0]) / 1e9
        count = min(_BLOCKS, len(moments))
        blocks = np.arange(count) * len(moments) // count  # where each begins
        return estimate_mean_ratio(
            np.add.reduceat(samples, blocks), np.add.reduceat(seconds, blocks)
        ).interval

    @property
    def _answered_ns(self) -> NDArray[np.int64]:
        return self.scheduled_ns + self.latency_ns


def read_trace(path: Path) -> SampleTimes:
    """Read the times of all samples from LoadGen's trace.

    Raises:
        EngineError: no sample was answered.
    """
    rows = sorted(_samples(path))
    if not rows:
        raise EngineError(f"LoadGen's trace {path} holds no sample: run it again")
    _, query, scheduled, latency = np.array(rows, dtype=np.int64).T
    return SampleTimes(query, scheduled, latency)


def _samples(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Yield sample number, query number, scheduled time and latency of each answered sample."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            # Most lines are of LoadGen's own steps; parsing them all would take seconds.
            if '"complete_ns"' not in line:
                continue
            event = json.loads(line.rstrip().rstrip(","))
            facts = event["args"]
            due = round(1e3 * event["ts"])  # microseconds with three decimals
            yield facts["sample_seq"], facts["query_seq"], due, facts["complete_ns"]
