import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.profiles.measure.loadgen import Answers, read_answers, read_verdict
from edgeclip.runtime.errors import EngineError


def entry(key: str, value: Any, *, error: bool = False) -> str:
    metadata = {"is_error": error, "is_warning": False, "file": "results.cc", "line_no": 1}
    return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": metadata})


def answers(*rows: tuple[int, int, int]) -> Answers:
    return Answers(*np.array(rows, dtype=np.int64).T)


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
        read_answers(path)


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
    found = read_answers(path)
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
    assert rate.low == pytest.approx(1)
    assert rate.high == pytest.approx(2)


def test_interval_of_the_rate_counts_neighbours_together() -> None:
    gaps = np.repeat(np.random.default_rng(0).normal(10, 1, 100), 10)
    mixed = np.random.default_rng(0).permutation(gaps)

    def rate(seconds: Any) -> Any:
        times = np.cumsum(1e6 * seconds).astype(np.int64)
        count = np.arange(len(times))
        return Answers(count, np.zeros_like(count), times).samples_per_s

    wide, narrow = rate(gaps), rate(mixed)
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
