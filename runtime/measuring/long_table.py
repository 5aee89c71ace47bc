"""Measurements as a long table: one row a figure, so that many runs make one data set.

`write_parquet` appends nothing: it writes the rows of all runs that it is given, and Parquet
files of equal columns can be read as one (pandas, DuckDB, Polars).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgeclip.runtime.errors import MissingExtraError
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.measurement import Latency, Measurement, MeasurementRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure with its interval, and all that says what it is of.

    Attributes:
        created, command, workload, cpu, os, device: of the run; device "" where it has none.
        bundle, sha256, precision, engine, provider: of the subject; "" where unknown.
        name, part: of the subject.
        threads: of the engine; 0 where unknown.
        scenario: "turns" for runs one after the other, "sweep", "cold start", or LoadGen's.
        batch: images or texts in one run, or in one query of LoadGen.
        metric: such as "p50" or "rate".
        unit: of the figure.
        value, low, high: the interval is the value itself where none is known.
        disturbed: whether the run was; None where it cannot be told.
    """

    created: str
    command: str
    workload: str
    cpu: str
    os: str
    device: str
    bundle: str
    sha256: str
    precision: str
    engine: str
    provider: str
    name: str
    part: str
    threads: int
    scenario: str
    batch: int
    metric: str
    unit: str
    value: float
    low: float
    high: float
    disturbed: bool | None


@dataclass(frozen=True, slots=True)
class _Figure:
    scenario: str
    metric: str
    unit: str
    value: Interval
    batch: int = 1
    threads: int | None = None


def long_table(runs: Sequence[MeasurementRun]) -> list[Row]:
    """All figures of all runs, in their order."""
    return [
        _row(run, item, figure)
        for run in runs
        for item in run.measurements
        for figure in _figures(item)
    ]


def write_parquet(runs: Sequence[MeasurementRun], path: Path) -> None:
    """Write the long table as a Parquet file, whole or not at all.

    Raises:
        MissingExtraError: pyarrow is not installed.
        InputError: the file cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"writing Parquet needs pyarrow ({error}): pip install 'edgeclip[profile]'"
        ) from None
    kinds: dict[object, Any] = {
        str: pyarrow.string(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
    }
    schema = pyarrow.schema(
        [(field.name, kinds.get(field.type, pyarrow.bool_())) for field in fields(Row)]
    )
    rows = long_table(runs)
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Row)}
    with atomic_file(path) as temporary:
        parquet.write_table(pyarrow.table(columns, schema=schema), temporary)


def _row(run: MeasurementRun, item: Measurement, figure: _Figure) -> Row:
    identity = item.identity
    threads = figure.threads or (identity.threads if identity else 0)
    return Row(
        created=run.created,
        command=run.command,
        workload=run.workload.name,
        cpu=run.machine.cpu,
        os=run.machine.os,
        device=run.device.name if run.device else "",
        bundle=identity.bundle if identity else "",
        sha256=identity.sha256 if identity else "",
        precision=(identity.precision or "") if identity else "",
        engine=identity.engine if identity else "",
        provider=identity.provider if identity else "",
        name=item.name,
        part=item.part,
        threads=threads,
        scenario=figure.scenario,
        batch=figure.batch,
        metric=figure.metric,
        unit=figure.unit,
        value=figure.value.value,
        low=figure.value.low,
        high=figure.value.high,
        disturbed=run.interference.disturbed if run.interference else item.contended,
    )


def _figures(item: Measurement) -> Iterator[_Figure]:
    yield from _latencies("turns", item.latency, 1)
    if item.ratio is not None:
        yield _Figure("turns", f"ratio to {item.ratio.reference}", "", item.ratio.ratio)
    for point in item.sweep:
        at = point.batch, point.threads
        yield _Figure("sweep", "rate", "items/s", point.items_per_s, *at)
        yield _Figure("sweep", "p50", "ms", point.p50_ms, *at)
    for result in item.scenarios:
        batch = result.samples_per_query
        yield _Figure(result.scenario, "rate", "items/s", result.samples_per_s, batch)
        if result.latency is not None:
            yield from _latencies(result.scenario, result.latency, batch)
    if item.cold_start is not None:
        start = item.cold_start
        for metric in ("import", "load", "first_run"):
            ms = getattr(start.intervals or start, f"{metric}_ms")
            ms = ms if isinstance(ms, Interval) else _exactly(ms)
            yield _Figure("cold start", metric, "ms", ms)
    if item.energy is not None:
        yield _Figure("turns", "energy", "J", item.energy.joules)
    if item.peak_memory_mb is not None:
        yield _Figure("turns", "peak memory", "MB", _exactly(item.peak_memory_mb))
    if item.identity is not None:
        size = float(item.identity.bytes_on_disk)
        yield _Figure("turns", "size on disk", "B", _exactly(size))
    for stage in item.stages:
        yield _Figure("turns", f"stage {stage.name}", "ms", stage.ms)


def _latencies(scenario: str, latency: Latency, batch: int) -> Iterator[_Figure]:
    for metric in ("p50", "p90", "p95", "p99", "p99_9"):
        value = getattr(latency, f"{metric}_ms")
        if value is not None:
            yield _Figure(scenario, metric.replace("_", "."), "ms", value, batch)


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)
