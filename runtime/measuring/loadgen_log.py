"""What MLPerf LoadGen wrote: its verdict, and when each query was due and answered.

The detail log (mlperf_log_detail.txt) has one JSON object a line and holds percentiles only. The
latencies behind them are in the trace (mlperf_log_trace.json, in Chrome's trace event format):
each answered sample has a "Sample" event whose `ts` is the time for which its query was
scheduled, and whose `complete_ns` counts from then.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.intervals import Interval, bootstrap_ratio

_MARK = ":::MLLOG "
_PERCENTILES = ("50.00", "90.00", "95.00", "99.00", "99.90")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """LoadGen's own result.

    Attributes:
        valid: whether its rules were kept.
        reasons: why not, and what went wrong, in its words.
        percentiles_ns: (percent, latency of a query in nanoseconds): of the n latencies in
            ascending order the one with the index n * percent / 100, rounded down.
    """

    valid: bool
    reasons: tuple[str, ...]
    percentiles_ns: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """The answered samples in the order in which they were asked for, each array int64 [N].

    Attributes:
        query: number of the query that a sample is of.
        scheduled_ns: when that query was due, on LoadGen's clock.
        latency_ns: from then to the answer.
    """

    query: NDArray[np.int64]
    scheduled_ns: NDArray[np.int64]
    latency_ns: NDArray[np.int64]

    @property
    def query_latency_ms(self) -> NDArray[np.float64]:
        """Of each query, in their order: of the last of its samples, from its scheduled time."""
        starts = np.flatnonzero(np.diff(self.query, prepend=-1))
        return np.maximum.reduceat(self.latency_ns, starts) / 1e6

    @property
    def seconds(self) -> float:
        """From the first query's scheduled time to the last answer."""
        return float(np.max(self._answered_ns) - self.scheduled_ns[0]) / 1e9

    @property
    def samples_per_s(self) -> Interval:
        """Answered samples a second over the whole time.

        The interval is of that ratio over blocks of answers that came one after the other:
        about as long as the cube root of their number, since neighbours are alike.
        """
        moments, samples = np.unique(self._answered_ns, return_counts=True)
        seconds = np.diff(moments, prepend=self.scheduled_ns[0]) / 1e9
        blocks = np.arange(0, len(moments), max(1, round(len(moments) ** (1 / 3))))
        return bootstrap_ratio(
            np.add.reduceat(samples, blocks), np.add.reduceat(seconds, blocks), draws=1000
        )

    @property
    def _answered_ns(self) -> NDArray[np.int64]:
        return self.scheduled_ns + self.latency_ns


def read_verdict(path: Path) -> Verdict:
    """Read a detail log.

    Raises:
        EngineError: it holds no result: LoadGen did not come to its end.
    """
    found: dict[str, Any] = {}
    errors = []
    for entry in _entries(path):
        found[entry["key"]] = entry["value"]
        if entry["metadata"]["is_error"]:
            errors.append(str(entry["value"]))
    if "result_validity" not in found:
        raise EngineError(f"LoadGen's log {path} holds no result: run it again")
    reasons = [str(found.get("result_invalid_reason", "")), *errors]
    if not found.get("early_stopping_met", True):
        reasons.append(str(found.get("early_stopping_result", "")))
    return Verdict(
        valid=found["result_validity"] == "VALID",
        reasons=tuple(" ".join(reason.split()) for reason in reasons if reason.strip()),
        percentiles_ns=tuple(_percentiles(found)),
    )


def read_answers(path: Path) -> Answers:
    """Read a trace.

    Raises:
        EngineError: no sample was answered.
    """
    rows = sorted(_samples(path))
    if not rows:
        raise EngineError(f"LoadGen's trace {path} holds no sample: run it again")
    _, query, scheduled, latency = np.array(rows, dtype=np.int64).T
    return Answers(query, scheduled, latency)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(_MARK):
            yield json.loads(line.removeprefix(_MARK))


def _percentiles(found: dict[str, Any]) -> Iterator[tuple[float, int]]:
    """Those of queries (MultiStream has them beside those of samples)."""
    for percent in _PERCENTILES:
        for key in ("percentile_per_query_latency_ns", "percentile_latency_ns"):
            value = found.get(f"result_{percent}_{key}")
            if value is not None:
                yield float(percent), int(value)
                break


def _samples(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Of each answered sample: its number, its query's, when that was due, and its latency."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            # Most lines are of LoadGen's own steps; parsing them all would take seconds.
            if '"complete_ns"' not in line:
                continue
            event = json.loads(line.rstrip().rstrip(","))
            facts = event["args"]
            due = round(1e3 * event["ts"])  # microseconds with three decimals
            yield facts["sample_seq"], facts["query_seq"], due, facts["complete_ns"]
