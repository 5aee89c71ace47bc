"""Measurements as a table for a terminal."""

from collections.abc import Sequence

from edgeclip.runtime.measuring.measurement import Measurement, MeasurementRun
from edgeclip.runtime.reporting.profile_sweep import threads_name
from edgeclip.runtime.reporting.report_format import MISSING, digits, megabytes
from edgeclip.runtime.text_columns import columns

_Place = tuple[int, int | None]  # batch and threads

_HEADER = ("tower", "name", "p50 ms", "95% interval", "p90 ms", "p99 ms", "ratio", "95% interval")


def measurement_table(run: MeasurementRun) -> str:
    """Latency, throughput and cold start of every measurement, the machine, and warnings."""
    measured = run.measurements
    places = _places(measured)
    rates = (_rate_row(item, places) for item in measured)
    parts = [
        f"{run.machine.cpu}, {run.machine.cores} cores, {run.machine.os}; workload "
        f"{run.workload.name}: {run.workload.turns} at batch 1",
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
        f"{digits(p50.low)} to {digits(p50.high)}",
        digits(latency.p90_ms.value),
        MISSING if latency.p99_ms is None else digits(latency.p99_ms.value),
        "" if ratio is None else f"{ratio.ratio.value:.2f} of {ratio.reference}",
        "" if ratio is None else f"{ratio.ratio.low:.2f} to {ratio.ratio.high:.2f}",
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
