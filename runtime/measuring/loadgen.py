"""The scenarios of MLPerf Inference, run by its own LoadGen: SingleStream to Offline.

LoadGen decides when each query comes and takes the time (Reddi et al., "MLPerf Inference
Benchmark", ISCA 2020; package mlcommons-loadgen). In SingleStream and MultiStream a query comes
when the last one is answered; in Server queries come at random times (a Poisson process) whether
or not the last is answered, and a latency counts from the time for which its query was
scheduled; Offline is one query of many samples.

Unlike a submission to MLPerf, a test may be short, and all queries get the same inputs: those
that `measure_interleaved` runs on too. LoadGen's random numbers keep their default seeds, so that
all subjects see the same arrivals.
"""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.workload import Scenario, Workload
from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.measuring.interleave import Candidate, no_garbage_collection, warm_up
from edgeclip.runtime.measuring.loadgen_log import Answers, Verdict, read_answers, read_verdict
from edgeclip.runtime.measuring.loadgen_sut import AnsweringSut, QueueingSut, stopped_by_ctrl_c
from edgeclip.runtime.measuring.measurement import ScenarioResult
from edgeclip.runtime.measuring.timing_statistics import latency_of
from edgeclip.runtime.progress import Progress

_BOUND_PERCENTILE = 99.0  # LoadGen's own for Server, as for MLPerf's image models
_NO_BOUND_NS = 3600 * 10**9  # Server must have a bound: an hour
_OPEN_SECONDS = 3.0  # of queries; a subject so far behind does not keep up
_FEWEST_OPEN = 64
_PROBES = 3
_SPARE = 2.0  # LoadGen prepares queries ahead: so many times more than it thinks it needs
_OFFLINE_SPARE = 1.1
_one_test = threading.Lock()  # LoadGen is global to the process


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is run, and the settings of LoadGen that differ from its defaults."""

    batch: NDArray[Any]
    settings: Mapping[str, int | float]


def run_scenario(
    scenario: Scenario,
    subject: Candidate,
    workload: Workload,
    *,
    single_ms: float,
    folder: Path,
    progress: Progress | None = None,
) -> ScenarioResult:
    """Run one scenario.

    A test lasts `workload.scenario_seconds`, or longer until it has `workload.scenario_queries`.
    One that fails, or that Ctrl-C stops, ends soon: under Server within the time that it takes
    for three seconds' worth of queries to come, at most.

    Args:
        scenario: which.
        subject: is warmed up first. Its `make_batch` is asked for 1 row (SingleStream, Server),
            for `workload.multi_stream` rows, or (Offline) for each of `workload.batch_sizes`,
            of which the fastest is taken.
        workload: see `Workload`.
        single_ms: about how long one run at batch 1 takes, in milliseconds.
        folder: LoadGen's logs are left in a folder named like the scenario in it, but for the
            trace, which is long.
        progress: told the seconds that went by, once a second, between two runs.

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
                _test(loadgen, sut, _test_settings(loadgen, scenario, plan), logs)
        finally:
            sut.close()
    sut.raise_failure()
    trace = logs / "mlperf_log_trace.json"
    answers = read_answers(trace)
    trace.unlink()
    return _result(scenario, workload, plan, read_verdict(logs / "mlperf_log_detail.txt"), answers)


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


def _plan(scenario: Scenario, subject: Candidate, workload: Workload, single_ms: float) -> _Plan:
    """Choose batch and settings; the subject is warm afterwards."""
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
        return _Plan(batch, settings)
    count = workload.multi_stream if scenario == "MultiStream" else 1
    batch, seconds = _warm(subject, workload, count)
    if scenario == "MultiStream":
        settings["multi_stream_samples_per_query"] = count
        settings["multi_stream_expected_latency_ns"] = max(1, round(1e9 * seconds / _SPARE))
    elif scenario == "SingleStream":
        settings["single_stream_expected_latency_ns"] = max(1, round(1e6 * single_ms / _SPARE))
    else:
        settings |= _server_settings(workload, single_ms)
    return _Plan(batch, settings)


def _server_settings(workload: Workload, single_ms: float) -> dict[str, int | float]:
    rate = workload.server_load * 1e3 / single_ms
    bound = workload.server_bound_ms
    # Where more comes than can be answered, the queue may grow all along.
    behind = max(0.0, workload.server_load - 0.8) * workload.scenario_seconds
    return {
        "server_target_qps": rate,
        "server_target_latency_ns": _NO_BOUND_NS if bound is None else round(1e6 * bound),
        "server_max_async_queries": max(_FEWEST_OPEN, math.ceil(rate * (_OPEN_SECONDS + behind))),
    }


def _warm(subject: Candidate, workload: Workload, size: int) -> tuple[NDArray[Any], float]:
    """A batch of `size`, and the seconds that it takes once the subject is warm."""
    batch = subject.make_batch(size)
    warm_up(subject, batch, workload)
    times = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        subject.run(batch)
        times.append(time.perf_counter() - start)
    return batch, max(1e-9, float(np.median(times)))


def _test_settings(loadgen: Any, scenario: Scenario, plan: _Plan) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    for name, value in plan.settings.items():
        setattr(settings, name, value)
    return settings


def _test(loadgen: Any, sut: AnsweringSut, settings: Any, logs: Path) -> None:
    """Let LoadGen run; it returns when all queries that it issued are answered."""
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
    scenario: Scenario, workload: Workload, plan: _Plan, verdict: Verdict, answers: Answers
) -> ScenarioResult:
    latency_ms = answers.query_latency_ms
    samples = len(answers.query)
    offline, server = scenario == "Offline", scenario == "Server"
    bound_ms = workload.server_bound_ms if server else None
    settings = [(name, str(value)) for name, value in plan.settings.items()]
    if offline:
        settings.append(("batch", str(len(plan.batch))))
    return ScenarioResult(
        scenario=scenario,
        queries=len(latency_ms),
        samples_per_query=samples // len(latency_ms),
        seconds=answers.seconds,
        latency=None if offline else latency_of([latency_ms]),
        samples_per_s=answers.samples_per_s,
        target_qps=plan.settings["server_target_qps"] if server else None,
        bound_ms=bound_ms,
        bound_percentile=None if bound_ms is None else _BOUND_PERCENTILE,
        valid=verdict.valid,
        loadgen_p50_ms=None if offline else dict(verdict.percentiles_ns)[50.0] / 1e6,
        reasons=verdict.reasons,
        settings=tuple(settings),
    )


def _make_folder(folder: Path) -> Path:
    """LoadGen cannot be started again after it failed to open its files: see to them first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("summary.txt", "detail.txt", "accuracy.json", "trace.json"):
            (folder / f"mlperf_log_{name}").write_bytes(b"")
    except OSError as error:
        raise InputError(f"LoadGen cannot write its logs into {folder}: {error}") from error
    return folder
