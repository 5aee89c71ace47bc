"""The table of throughput: every subject's rates under the head of their place."""

import re

import numpy as np

from edgeclip.profiles.record.measurement import SweepPoint, WarmUp
from edgeclip.profiles.report.tables import measurement_table
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.run_cases import measurement, processes, run_of

SAMPLES = processes(np.random.default_rng(0), 1.0)
NONE = "unavailable"


def point(batch: int, rate: float, threads: int = 2) -> SweepPoint:
    exactly = Interval(rate, rate, rate)
    return SweepPoint(batch=batch, threads=threads, items_per_s=exactly, p50_ms=exactly)


def cells(**sweeps: tuple[SweepPoint, ...]) -> list[list[str]]:
    """The table of throughput, its head first, without part and name."""
    run = run_of(*(measurement(name, SAMPLES, sweep=sweep) for name, sweep in sweeps.items()))
    (part,) = (item for item in measurement_table(run).split("\n\n") if "items per second" in item)
    return [re.split(r" {2,}", line)[2:] for line in part.splitlines()]


def test_a_rate_stands_under_its_own_batch() -> None:
    """A peer that takes one batch only has fewer of them, or others."""
    found = cells(
        peer=(point(1, 11.0),),
        ours=(point(1, 21.0), point(8, 28.0)),
        fixed=(point(8, 38.0), point(64, 364.0)),
        none=(),
    )
    assert found == [
        ["batch 1", "batch 8", "batch 64"],
        ["11.0", NONE, NONE],
        ["21.0", "28.0", NONE],
        [NONE, "38.0", "364"],
        [NONE, NONE, NONE],
    ]


def test_threads_are_named_where_they_differ() -> None:
    points = (point(1, 11.0, 1), point(8, 18.0, 1), point(1, 21.0, 2), point(8, 28.0, 2))
    assert cells(a=points, b=points[2:]) == [
        ["batch 1, 1 thread", "batch 8, 1 thread", "batch 1, 2 threads", "batch 8, 2 threads"],
        ["11.0", "18.0", "21.0", "28.0"],
        [NONE, NONE, "21.0", "28.0"],
    ]
    assert cells(a=points[2:])[0] == ["batch 1", "batch 8"]


def test_table_warns_of_contention_and_restless_runs() -> None:
    item = measurement("a", SAMPLES, contended=True, warm_up=WarmUp(runs=10, settled=False))
    loud_text = measurement_table(run_of(item))
    quiet_text = measurement_table(run_of(measurement("a", SAMPLES)))
    assert "CONTENDED" in loud_text
    assert "Not steady after warm-up: image a." in loud_text
    assert "CONTENDED" not in quiet_text
    assert "steady" not in quiet_text
