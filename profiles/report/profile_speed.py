"""Latency, histograms, paired ratios, scenarios and sweeps of a profile as sections."""

from collections.abc import Sequence

import numpy as np

from edgeclip.profiles.record.measurement import Latency, Measurement
from edgeclip.profiles.report.chart_histogram import histogram
from edgeclip.profiles.report.chart_rows import Dot, Row, RowChart, row_picture
from edgeclip.profiles.report.profile_blocks import (
    Block,
    Cell,
    Figure,
    Heading,
    Note,
    Section,
    SmallCharts,
    Table,
    columns,
    count,
    interval_cell,
    missing_notes,
    ratio_cell,
    section_of,
)
from edgeclip.profiles.report.profile_data import PART_NAMES, Subject, by_part
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.intervals import Interval

SCENARIO_KEYS = ("scenarios",)
_NOT_KNOWN = "too few runs"
_PERCENTILES = ("p50", "p90", "p95", "p99", "p99.9")


def percentiles(latency: Latency) -> tuple[tuple[str, Interval | None], ...]:
    """Names and values in milliseconds, from the median up."""
    values = (
        latency.p50_ms,
        latency.p90_ms,
        latency.p95_ms,
        latency.p99_ms,
        latency.p99_9_ms,
    )
    return tuple(zip(_PERCENTILES, values, strict=True))


def latency_section(subjects: Sequence[Subject]) -> Section | None:
    """Percentiles with intervals, a picture and a table for each part."""
    blocks: list[Block] = []
    for part, group in by_part(subjects).items():
        name = PART_NAMES[part]
        caption = "" if blocks else _LADDER
        table = Table(
            name=f"Latency, {name}",
            columns=columns("<ms at batch 1", *_PERCENTILES, "ratio", "runs", "<machine was"),
            rows=tuple(_latency_row(subject) for subject in group),
        )
        blocks += [Heading(name), Figure(picture=_ladder(name, group), caption=caption), table]
    return section_of("latency", "Latency", blocks)


_LADDER = (
    "One run after the other at batch 1, all subjects taking turns. Whiskers and small figures "
    "are 95% intervals; a whisker without an end goes on beyond the picture. A percentile is left "
    "out where too few runs lie beyond it. Ratios are to the reference of the run, see below. "
    "Contended: more than 10% of the CPU time that the runs asked for was denied."
)


def _ladder(name: str, subjects: Sequence[Subject]) -> str:
    rows = tuple(
        Row(
            label=subject.label,
            dots=tuple(
                Dot(value, shape, which)
                for shape, (which, value) in enumerate(percentiles(subject.item.latency))
                if value is not None
            ),
            figure=_two_percentiles(subject.item.latency),
        )
        for subject in subjects
    )
    chart = RowChart(
        rows=rows,
        axis_name="ms",
        label=f"Latency, {name}",
        legend=tuple(
            (shape, name)
            for shape, name in enumerate(_PERCENTILES)
            if any(dot.shape == shape for row in rows for dot in row.dots)
        ),
    )
    return row_picture(chart)


def _two_percentiles(latency: Latency) -> str:
    tail = "" if latency.p99_ms is None else f", p99 {digits(latency.p99_ms.value)}"
    return f"p50 {digits(latency.p50_ms.value)}{tail} ms"


def _latency_row(subject: Subject) -> tuple[Cell, ...]:
    item = subject.item
    known = (interval_cell(value, absent=_NOT_KNOWN) for _, value in percentiles(item.latency))
    return (
        Cell(subject.label),
        *known,
        ratio_cell(None if item.ratio is None else item.ratio.ratio),
        Cell(count(item.latency.runs), _processes(item)),
        machine_cell(item),
    )


def _processes(item: Measurement) -> str:
    many = len(item.samples_ms)
    return f"{many} processes" if many > 1 else "1 process"


def machine_cell(item: Measurement) -> Cell:
    """Whether the machine was disturbed during this measurement, and warm-up unfinished."""
    still = "" if item.warm_up.settled else "still warming up"
    if item.contended is None:
        return Cell("unknown", still)
    return Cell("⚠ contended", still, "miss") if item.contended else Cell("quiet", still)


def histogram_section(subjects: Sequence[Subject]) -> Section | None:
    """A small histogram of all runs of each subject."""
    blocks: list[Block] = []
    for part, group in by_part(s for s in subjects if any(s.item.samples_ms)).items():
        pictures = tuple(picture for subject in group if (picture := _histogram(subject)))
        if pictures:
            caption = "" if blocks else _HISTOGRAM
            blocks += [Heading(PART_NAMES[part]), SmallCharts(pictures=pictures, caption=caption)]
    return section_of("histograms", "How the times are distributed", blocks)


_HISTOGRAM = (
    "Each chart has its own axis, to a little beyond the 99th percentile; slower runs are counted "
    "at its right end. Two humps are two states of the machine: a median then says little."
)


def _histogram(subject: Subject) -> str:
    item = subject.item
    samples = np.array([ms for process in item.samples_ms for ms in process], dtype=np.float64)
    high = [(name, value) for name, value in percentiles(item.latency)[1:4] if value is not None]
    return histogram(
        subject.label, samples, median=item.latency.p50_ms, tail=high[-1] if high else None
    )


def ratio_section(subjects: Sequence[Subject]) -> Section | None:
    """Paired ratios to the reference of each run, with intervals."""
    blocks: list[Block] = []
    for part, group in by_part(s for s in subjects if s.item.ratio is not None).items():
        rows = tuple(_ratio_row(subject) for subject in group)
        references = {s.item.ratio.reference for s in group if s.item.ratio is not None}
        name = " or ".join(sorted(references))
        chart = RowChart(
            rows=rows,
            axis_name=f"{name} = 1, lower is better",
            label=f"Paired ratios, {PART_NAMES[part]}",
            reference=(1.0, f"as slow as {name}"),
            log=False,
        )
        picture = row_picture(chart)
        caption = "" if blocks else _RATIO
        blocks += [Heading(PART_NAMES[part]), Figure(picture=picture, caption=caption)]
    return section_of("ratios", "Against the reference", blocks)


_RATIO = (
    "The median over rounds of a subject's time divided by the reference's in the same round. "
    "What disturbs a round disturbs both, so ratios hold where times do not. An interval that "
    "crosses the dashed line shows no difference."
)


def _ratio_row(subject: Subject) -> Row:
    assert subject.item.ratio is not None
    value = subject.item.ratio.ratio
    figure = f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
    return Row(label=subject.label, dots=(Dot(value),), figure=figure)


def scenario_section(subjects: Sequence[Subject]) -> Section | None:
    """MLPerf's scenarios as LoadGen ran them, with its verdict."""
    rows = [row for subject in subjects for row in _scenario_rows(subject)]
    absent = missing_notes(subjects, SCENARIO_KEYS)
    if not rows:
        return section_of("scenarios", "MLPerf scenarios", absent)
    table = Table(
        name="MLPerf scenarios",
        columns=columns(
            "<subject",
            "<scenario",
            "<verdict",
            "samples/s",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "queries",
            "<asked for",
        ),
        rows=tuple(rows),
    )
    reasons = [
        Note(f"✗ INVALID: {subject.label}, {PART_NAMES[subject.item.part]}, {result.scenario}: "
             f"{'; '.join(result.reasons) or 'LoadGen gave no reason'}", "miss")
        for subject in subjects
        for result in subject.item.scenarios
        if not result.valid
    ]  # fmt: skip
    note = Note(
        "Issued and judged by MLPerf LoadGen; these are not submissions to MLPerf. Latency is "
        "of a query, in Server from its scheduled time. Small figures are 95% intervals."
    )
    return Section(
        anchor="scenarios", title="MLPerf scenarios", blocks=(note, table, *reasons, *absent)
    )


def _scenario_rows(subject: Subject) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for result in subject.item.scenarios:
        latency = result.latency
        theirs = result.loadgen_p50_ms
        median = interval_cell(None if latency is None else latency.p50_ms)
        if theirs is not None and latency is not None:
            median = Cell(median.text, f"{median.small}\nLoadGen {digits(theirs)}")
        rows.append(
            (
                Cell(subject.label, PART_NAMES[subject.item.part]),
                Cell(result.scenario, _samples_each(result.samples_per_query)),
                Cell("✓ VALID", "", "pass") if result.valid else Cell("✗ INVALID", "", "miss"),
                interval_cell(result.samples_per_s),
                median,
                interval_cell(None if latency is None else latency.p90_ms),
                interval_cell(
                    None if latency is None else latency.p99_ms,
                    absent="" if latency is None else _NOT_KNOWN,
                ),
                Cell(count(result.queries), f"in {digits(result.seconds)} s"),
                _asked(result.target_qps, result.bound_ms, result.bound_percentile),
            )
        )
    return rows


def _samples_each(number: int) -> str:
    return "" if number == 1 else f"{count(number)} a query"


def _asked(qps: float | None, bound: float | None, percentile: float | None) -> Cell:
    limit = "" if bound is None else f"{percentile or 99:g}% within {digits(bound)} ms"
    return Cell("" if qps is None else f"{digits(qps)} queries/s", limit)
