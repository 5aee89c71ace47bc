import dataclasses

import pytest

from edgeclip.profiles.record.measurement import (
    Measurement,
    SweepPoint,
)
from edgeclip.profiles.workload import load_workload
from tests.profiles.layers.advice_cases import (
    CPU,
    advice,
    cpu_time,
    in_precision,
    measurement,
    only,
    point,
)
from tests.profiles.measure.run_cases import identity, run_of


def test_more_threads_that_are_faster() -> None:
    item = measurement(sweep=(point(1, 2, 10.0), point(1, 4, 6.0)))
    found = only(advice(item))
    assert (found.topic, found.gains) == ("threads", "latency")
    assert "`threads: 4`" in found.what
    assert found.at_most == pytest.approx(10 / 6)


def test_fewer_threads_that_are_faster_still() -> None:
    found = only(advice(measurement(sweep=(point(1, 1, 5.0), point(1, 2, 10.0)))))
    assert "`threads: 1`" in found.what
    assert found.gains == "latency"
    assert "with 1 thread," in found.evidence


def test_fewer_threads_that_are_as_fast() -> None:
    item = measurement(sweep=(point(1, 1, 10.1), point(1, 2, 10.0)))
    found = only(advice(item))
    assert (found.topic, found.gains) == ("threads", "processor time")
    assert found.at_most == 2


@pytest.mark.parametrize(
    "sweep",
    [
        (point(1, 1, 19.0), point(1, 2, 10.0)),
        (point(1, 1, 19.0), point(1, 2, 10.0), point(1, 4, 9.7)),  # less than 5%
        (point(1, 2, 10.0, by=0.3), point(1, 4, 8.0, by=0.3)),  # the intervals meet
        (point(1, 1, 10.2, by=0.2), point(1, 2, 10.0)),  # as fast perhaps, not for certain
        (point(1, None, 10.0),),
        (point(1, 4, 5.0),),  # nothing to compare it with
    ],
)
def test_threads_that_do_not_differ_for_certain(sweep: tuple[SweepPoint, ...]) -> None:
    assert advice(measurement(sweep=sweep)) == ()


def test_threads_that_spin() -> None:
    """Two threads take 20 ms of processor time a run, for work that takes one thread 12."""
    sweep = (point(1, 1, 12.0), point(1, 2, 10.0))
    found = only(advice(measurement(sweep=sweep, cpu=cpu_time(process_s=2.0))))
    assert (found.topic, found.gains) == ("threads", "processor time")
    assert found.at_most == pytest.approx(20 / 12)
    assert "latency would be 12" in found.evidence
    assert advice(measurement(sweep=sweep, cpu=cpu_time(process_s=1.4))) == ()
    assert advice(measurement(sweep=sweep[1:], cpu=cpu_time(process_s=2.0))) == ()


def test_batches_that_raise_throughput() -> None:
    item = measurement(
        sweep=(point(1, 2, 10.0), point(4, 2, 20.0), point(8, 2, 38.0), point(16, 2, 80.0))
    )
    found = only(advice(item))
    assert (found.topic, found.gains) == ("batch", "throughput")
    assert "`edgeclip serve --max-batch 4`" in found.what  # 95% of the best of all
    assert found.at_most == pytest.approx(2)


def test_a_batch_must_keep_the_latency_bound() -> None:
    sweep = (point(1, 2, 10.0), point(4, 2, 30.0), point(8, 2, 40.0))
    hurried = dataclasses.replace(CPU, latency_budget_ms=35.0)
    found = only(advice(measurement(sweep=sweep), device=hurried))
    assert "--batch-size 4" in found.what
    assert "35 ms" in found.what
    never = dataclasses.replace(CPU, latency_budget_ms=5.0)
    assert advice(measurement(sweep=sweep), device=never) == ()
    bounded = dataclasses.replace(load_workload("quick"), server_bound_ms=35.0)
    item = measurement(sweep=sweep)
    assert only(advice(item, run=run_of(item, workload=bounded))).what == found.what


def test_batches_that_lower_throughput() -> None:
    found = only(advice(measurement(sweep=(point(1, 2, 10.0), point(8, 2, 100.0)))))
    assert "--batch-size 1" in found.what
    assert found.at_most == pytest.approx(1.25)


@pytest.mark.parametrize("ms", [78.0, 80.0, 82.0])
def test_batches_that_change_nothing(ms: float) -> None:
    assert advice(measurement(sweep=(point(1, 2, 10.0), point(8, 2, ms)))) == ()


def test_a_sweep_over_batches_is_one_of_the_same_threads() -> None:
    assert advice(measurement(sweep=(point(1, 2, 10.0), point(8, 4, 20.0)))) == ()
    unknown = measurement(sweep=(point(1, None, 10.0), point(8, None, 20.0)))
    assert only(advice(unknown)).topic == "batch"


def test_a_faster_precision_of_the_same_run() -> None:
    slow, fast = in_precision("fp32", 10.0), in_precision("int8", 5.0)
    found = only(advice(slow, fast))
    assert found.topic == "precision"
    assert "`--precision int8`" in found.what
    assert found.at_most == pytest.approx(2, rel=0.05)
    assert advice(fast, slow) == ()


def test_int8_that_is_slower() -> None:
    found = only(advice(in_precision("int8", 12.0), in_precision("fp32", 10.0)))
    assert "Run fp32 in place of int8" in found.what


def test_precisions_are_compared_by_medians_where_rounds_differ() -> None:
    slow = dataclasses.replace(in_precision("fp32", 10.0), samples_ms=())
    found = only(advice(slow, in_precision("int8", 5.0)))
    assert found.at_most == pytest.approx(2)


@pytest.mark.parametrize(
    "other",
    [
        in_precision("int8", 9.9),
        in_precision("int8", 5.0, sha256="b" * 64),
        in_precision("int8", 5.0, engine="onnxruntime-openvino"),
        in_precision("int8", 5.0, threads=4),
        dataclasses.replace(in_precision("int8", 5.0), part="text"),
        dataclasses.replace(in_precision("int8", 5.0), identity=None),
        dataclasses.replace(in_precision("int8", 5.0), identity=identity(precision=None)),
    ],
)
def test_what_is_not_comparable_is_not_compared(other: Measurement) -> None:
    assert advice(in_precision("fp32", 10.0), other) == ()
