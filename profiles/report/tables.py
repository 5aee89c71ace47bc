"""Measurements as a table for the terminal, and as rows of a Parquet file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgeclip.profiles.record.measurement import Latency, Measurement, MeasurementRun
from edgeclip.profiles.report.profile_speed import threads_name
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.console import MISSING, columns, digits, interval_ends, megabytes
from edgeclip.runtime.errors import MissingExtraError
from edgeclip.runtime.stats.interval import Interval

_Place = tuple[int, int | None]  # batch and threads

_HEADER = ("tower", "name", "p50 ms", "95% interval", "p90 ms", "p99 ms", "ratio", "95% interval")


def measurement_table(run: MeasurementRun) -> str:
    """Latency, throughput and cold start of every measurement, the machine, and warnings."""
    measured = run.measurements
    places = _places(measured)
    rates = (_rate_row(item, places) for item in measured)
    parts = [
        f"{run.machine.cpu}, {run.machine.cores} cores, {run.machine.os}; workload "
        f"{run.workload.name}: {run.workload.timed_runs} at batch 1",
        columns([_HEADER, *map(_latency_row, measured)], left=2),
        columns([("tower", "items per second", *_heads(places)), *rates], left=2),
    ]
    started = [m for m in measured if m.cold_start is not None]
    if started:
        head = ("tower", "cold start", "import ms", "load ms", "first ms", "memory", "file")
        parts.append(columns([head, *map(_cold_row, started)], left=2))
    return "\n\n".join([*parts, *_warnings(measured)])


def _latency_row(item: Measurement) -> tuple[str, ...]:
    latency, ratio = item.latency, item.ratio
    p50 = latency.p50_ms
    return (
        item.part,
        item.name,
        digits(p50.value),
        interval_ends(p50, digits),
        MISSING if latency.p90_ms is None else digits(latency.p90_ms.value),
        MISSING if latency.p99_ms is None else digits(latency.p99_ms.value),
        "" if ratio is None else f"{ratio.ratio.value:.2f} of {ratio.reference}",
        "" if ratio is None else interval_ends(ratio.ratio, "{:.2f}".format),
    )


def _places(measured: Sequence[Measurement]) -> list[_Place]:
    """Where anything was measured; a graph for one batch size only is not measured everywhere."""
    found = {(point.batch, point.threads) for item in measured for point in item.sweep}
    return sorted(found, key=lambda place: (place[1] or 0, place[0]))


def _heads(places: Sequence[_Place]) -> list[str]:
    if len({threads for _, threads in places}) < 2:
        return [f"batch {batch}" for batch, _ in places]
    return [f"batch {batch}, {threads_name(threads)}" for batch, threads in places]


def _rate_row(item: Measurement, places: Sequence[_Place]) -> tuple[str, ...]:
    rates = {(point.batch, point.threads): point.items_per_s.value for point in item.sweep}
    cells = (digits(rates[place]) if place in rates else MISSING for place in places)
    return (item.part, item.name, *cells)


def _cold_row(item: Measurement) -> tuple[str, ...]:
    start = item.cold_start
    assert start is not None
    memory = start.peak_memory_mb
    return (
        item.part,
        item.name,
        digits(start.import_ms),
        digits(start.load_ms),
        digits(start.first_run_ms),
        MISSING if memory is None else f"{digits(memory)} MB",
        megabytes(start.file_bytes),
    )


def _warnings(measured: Sequence[Measurement]) -> list[str]:
    lines = []
    if any(item.contended for item in measured):
        lines.append(
            "CONTENDED: more than 10% of the CPU time was denied to these runs. Ratios hold better "
            "than times; measure again on a quiet machine."
        )
    if any(item.contended is None for item in measured):
        lines.append("This system does not tell whether other programs disturbed the runs.")
    restless = [f"{item.part} {item.name}" for item in measured if not item.warm_up.settled]
    if restless:
        lines.append(f"Not steady after warm-up: {', '.join(restless)}.")
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure with its interval, and the run, subject and metric that it belongs to.

    Attributes:
        created, command, workload, cpu, os, device: properties of the run; device "" where it has
            none.
        bundle, sha256, precision, engine, provider: properties of the subject; "" where unknown.
        name, part: name and part of the subject.
        threads: number of engine threads; 0 where unknown.
        scenario: "turns" for runs one after the other, "sweep", "cold start", or LoadGen's.
        batch: images or texts in one run, or in one query of LoadGen.
        metric: name of the metric, such as "p50" or "rate".
        unit: unit of the figure.
        value, low, high: the interval is the value itself where it has none, and an end is None
            where too little was measured to know it.
        disturbed: whether the run was disturbed; None if unknown.
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
    low: float | None
    high: float | None
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
        float | None: pyarrow.float64(),
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
        low=_known(figure.value.low),
        high=_known(figure.value.high),
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


def _known(end: float) -> float | None:
    return end if math.isfinite(end) else None


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)
