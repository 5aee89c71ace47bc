"""Measurements as a table for a terminal."""

from collections.abc import Sequence

from edgeclip.runtime.measuring.measurement import Measurement, MeasurementRun
from edgeclip.runtime.planning.text_columns import columns
from edgeclip.runtime.reporting.report_format import MISSING, digits, megabytes

_HEADER = ("tower", "name", "p50 ms", "95% interval", "p90 ms", "p99 ms", "ratio", "95% interval")


def measurement_table(run: MeasurementRun) -> str:
    """Latency, throughput and cold start of every measurement, the machine, and warnings."""
    measured = run.measurements
    parts = [
        f"{run.machine.cpu}, {run.machine.cores} cores, {run.machine.os}; workload "
        f"{run.workload.name}: {run.workload.repeats} runs at batch 1",
        columns([_HEADER, *map(_latency_row, measured)], left=2),
        columns(
            [("tower", "items per second", *_batches(measured)), *map(_rate_row, measured)], left=2
        ),
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


def _batches(measured: Sequence[Measurement]) -> list[str]:
    return [f"batch {rate.batch}" for rate in measured[0].sweep] if measured else []


def _rate_row(item: Measurement) -> tuple[str, ...]:
    return (item.part, item.name, *(digits(r.items_per_s.value) for r in item.sweep))


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
