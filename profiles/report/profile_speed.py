"""The sections on speed: percentiles, histograms, ratios, scenarios, sweeps, processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.profiles.record.measurement import Latency, Measurement, Yardstick
from edgeclip.profiles.report.charts import (
    Dot,
    DotRow,
    HistogramChart,
    RowChart,
    Series,
    SweepChart,
)
from edgeclip.profiles.report.drawing import bounds
from edgeclip.profiles.report.profile_data import (
    PART_NAMES,
    NamedRun,
    Subject,
    by_part,
    full_name,
    missing_notes,
)
from edgeclip.profiles.report.sections import (
    Block,
    Cell,
    Figure,
    FigureGrid,
    Heading,
    Note,
    Section,
    Table,
    columns,
    count,
    interval_cell,
    ratio_cell,
    ratio_span,
    section_of,
    span,
)
from edgeclip.runtime.console import digits, percent
from edgeclip.runtime.stats.interval import Interval

SCENARIO_KEYS = ("scenarios",)
_NOT_KNOWN = "too few independent runs"
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
        caption = "" if blocks else _LATENCY
        table = Table(
            name=f"Latency, {name}",
            columns=columns("<ms at batch 1", *_PERCENTILES, "ratio", "runs", "<machine was"),
            rows=tuple(_latency_row(subject) for subject in group),
        )
        blocks += [Heading(name), Figure(_percentile_chart(name, group), caption), table]
    return section_of("latency", "Latency", blocks)


_LATENCY = (
    "One run after the other at batch 1, all subjects taking turns. Whiskers and small figures "
    "are 95% intervals; a whisker without an end goes on beyond the picture. Of a single process "
    "they are of that process alone. A percentile is left out where too few runs, of those that "
    "are not like their neighbours, tell its interval. Ratios are to the run's reference, below. "
    "Contended: more than 10% of the CPU time that the runs asked for was denied."
)


def _percentile_chart(name: str, subjects: Sequence[Subject]) -> RowChart:
    rows = tuple(
        DotRow(
            label=subject.label,
            dots=tuple(
                Dot(value, shape)
                for shape, (_, value) in enumerate(percentiles(subject.item.latency))
                if value is not None
            ),
            figure=_two_percentiles(subject.item.latency),
        )
        for subject in subjects
    )
    return RowChart(
        rows=rows,
        axis_name="ms",
        title=f"Latency, {name}",
        legend=tuple(
            (shape, name)
            for shape, name in enumerate(_PERCENTILES)
            if any(dot.shape == shape for row in rows for dot in row.dots)
        ),
    )


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
        charts = tuple(_histogram(subject) for subject in group)
        blocks += [Heading(PART_NAMES[part]), FigureGrid(charts, "" if blocks else _HISTOGRAM)]
    return section_of("histograms", "How the times are distributed", blocks)


_HISTOGRAM = (
    "Each chart has its own axis, to a little beyond the 99th percentile; slower runs are counted "
    "at its right end. Two humps are two states of the machine: a median then says little."
)


def _histogram(subject: Subject) -> HistogramChart:
    item = subject.item
    high = [(name, value) for name, value in percentiles(item.latency)[1:4] if value is not None]
    return HistogramChart(
        title=subject.label,
        samples=tuple(ms for process in item.samples_ms for ms in process),
        median=item.latency.p50_ms,
        tail=high[-1] if high else None,
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
            title=f"Paired ratios, {PART_NAMES[part]}",
            reference=(1.0, f"as slow as {name}"),
            log=False,
        )
        blocks += [Heading(PART_NAMES[part]), Figure(chart, "" if blocks else _RATIO)]
    return section_of("ratios", "Against the reference", blocks)


_RATIO = (
    "The median over rounds of a subject's time divided by the reference's in the same round. "
    "What disturbs a round disturbs both, so ratios hold where times do not. An interval that "
    "crosses the dashed line shows no difference; that of a single process shows none at all."
)


def _ratio_row(subject: Subject) -> DotRow:
    assert subject.item.ratio is not None
    value = subject.item.ratio.ratio
    figure = f"{value.value:.3f} ({ratio_span(value)})"
    return DotRow(subject.label, (Dot(value),), figure)


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


_MOST_LINES = 6


def sweep_section(subjects: Sequence[Subject]) -> Section | None:
    """Small charts of throughput against latency over batches, and a table of all points."""
    swept = [subject for subject in subjects if subject.item.sweep]
    if not swept:
        return None
    blocks: list[Block] = []
    for part, group in by_part(swept).items():
        charts = _sweep_charts(group)
        if charts:
            blocks += [Heading(PART_NAMES[part]), FigureGrid(charts, "" if blocks else _SWEEP)]
    return Section(
        anchor="sweep",
        title="Batches and threads",
        blocks=(*blocks, _sweep_table(swept, bool(blocks))),
    )


_SWEEP = (
    "Items a second against the median time of one batch: up is more work, left is a sooner "
    "answer. A line is a number of the engine's threads, a point a batch size, named on one line; "
    "whiskers are 95% intervals. Charts of one part share their axes."
)


def _sweep_charts(subjects: Sequence[Subject]) -> tuple[SweepChart, ...]:
    """A chart of each subject that has a line of two points, all over the same axes."""
    points = [point for subject in subjects for point in subject.item.sweep]
    x_limits, y_limits = bounds(p.p50_ms for p in points), bounds(p.items_per_s for p in points)
    lines = [(subject.label, _series(subject.item)) for subject in subjects]
    return tuple(
        SweepChart(title=label, series=series, x_limits=x_limits, y_limits=y_limits)
        for label, series in lines
        if any(len(one.x) > 1 for one in series)
    )


def _series(item: Measurement) -> tuple[Series, ...]:
    """One line for each number of threads, at most six: fewest and most stay."""
    numbers = _threads(item)
    if len(numbers) > _MOST_LINES:
        numbers = [*numbers[: _MOST_LINES - 1], numbers[-1]]
    lines = []
    for threads in numbers:
        points = sorted(
            (point for point in item.sweep if point.threads == threads), key=lambda p: p.batch
        )
        lines.append(
            Series(
                threads_name(threads),
                tuple(point.p50_ms for point in points),
                tuple(point.items_per_s for point in points),
                tuple(str(point.batch) for point in points),
            )
        )
    return tuple(lines)


def _threads(item: Measurement) -> list[int | None]:
    return sorted({point.threads for point in item.sweep}, key=lambda number: number or 0)


def threads_name(threads: int | None) -> str:
    """ "1 thread", "4 threads"; of the device where they are not known."""
    if threads is None:
        return "device"
    return "1 thread" if threads == 1 else f"{threads} threads"


def _sweep_table(subjects: Sequence[Subject], folded: bool) -> Table:
    batches = sorted({point.batch for subject in subjects for point in subject.item.sweep})
    rows = []
    for subject in subjects:
        item = subject.item
        for threads in _threads(item):
            cells = [_point_cell(item, batch, threads) for batch in batches]
            head = (Cell(subject.label, PART_NAMES[item.part]), Cell(threads_name(threads)))
            rows.append((*head, *cells))
    names = columns("<per second", "<threads", *(f"batch {batch}" for batch in batches))
    return Table(
        name="Every point in numbers: items a second, median of a batch",
        columns=names,
        rows=tuple(rows),
        folded=folded,
    )


def _point_cell(item: Measurement, batch: int, threads: int | None) -> Cell:
    for point in item.sweep:
        if point.batch == batch and point.threads == threads:
            ms = f"{digits(point.p50_ms.value)} ms ({span(point.p50_ms)})"
            return Cell(digits(point.items_per_s.value), f"{span(point.items_per_s)}\n{ms}")
    return Cell("")


@dataclass(frozen=True, slots=True)
class Spread:
    """Medians of the processes in ms, and by how much the largest exceeds the smallest."""

    medians: tuple[float, ...]
    plain: float
    by_yardstick: float | None


def process_medians(samples: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """The median of each process that has runs."""
    return tuple(float(np.median(runs)) for runs in samples if runs)


def spread_of(samples: tuple[tuple[float, ...], ...], yardstick: Yardstick | None) -> Spread | None:
    """The spread between processes; None where fewer than two ran.

    Divided by the yardstick's median of the same process, the spread loses what the machine
    as a whole did, and keeps what is the subject's own.
    """
    medians = process_medians(samples)
    if len(medians) < 2 or min(medians) <= 0:
        return None
    scaled = None
    if yardstick is not None:
        theirs = process_medians(yardstick.samples_ms)
        if len(theirs) == len(medians) and min(theirs) > 0:
            scaled = _excess([ours / other for ours, other in zip(medians, theirs, strict=True)])
    return Spread(medians, _excess(medians), scaled)


def _excess(values: Sequence[float]) -> float:
    return max(values) / min(values) - 1


def spread_section(runs: Sequence[NamedRun], subjects: Sequence[Subject]) -> Section | None:
    """Per-process medians of every subject and of the yardstick of each run."""
    found = {
        subject: spread
        for subject in subjects
        if (spread := spread_of(subject.item.samples_ms, subject.source.run.yardstick)) is not None
    }
    sticks = _yardsticks(runs)
    if not found and not sticks:
        return None
    blocks: list[Block] = [] if found else [Note(_ONE_PROCESS)]
    if found:
        blocks += [Figure(_spread_chart(found, sticks), _SPREAD), _spread_table(found)]
    if len(sticks) > 1:
        blocks += [Heading("The yardstick of each run"), Note(_YARDSTICK), _stick_table(sticks)]
    return Section(anchor="spread", title="From process to process", blocks=tuple(blocks))


_ONE_PROCESS = (
    "Each subject ran in one process only: how much processes differ is not known, and the "
    "intervals are too narrow for that."
)
_SPREAD = (
    "Each dot is the median of one fresh process, as a share of the middle one. Where processes "
    "differ more than the runs of one, how memory came to lie decides, and no number of runs in "
    "one process can tell. The yardstick is a small fixed graph that takes turns with the "
    "subjects: what it shows is the machine's own."
)
_YARDSTICK = "Where the yardstick is slower in one run than in another, so was the machine."


def _spread_chart(
    found: dict[Subject, Spread], sticks: Sequence[tuple[NamedRun, Yardstick]]
) -> RowChart:
    rows = [_spread_row(full_name(subject), spread) for subject, spread in found.items()]
    for source, stick in sticks:
        spread = spread_of(stick.samples_ms, None)
        if spread is not None:
            name = "yardstick" if len(sticks) == 1 else f"yardstick · {source.name}"
            rows.append(_spread_row(name, spread))
    return RowChart(
        rows=tuple(rows),
        axis_name="median of a process, percent of the middle one",
        title="Medians of the processes",
        log=False,
        apart=False,
    )


def _spread_row(label: str, spread: Spread) -> DotRow:
    middle = float(np.median(spread.medians))
    shares = [100 * ms / middle for ms in spread.medians]
    dots = tuple(Dot(Interval(share, share, share)) for share in shares)
    return DotRow(label, dots, f"spread {percent(spread.plain)}")


def _spread_table(found: dict[Subject, Spread]) -> Table:
    rows = tuple(
        (
            Cell(subject.label),
            Cell(PART_NAMES[subject.item.part]),
            Cell(", ".join(digits(ms) for ms in spread.medians)),
            Cell(percent(spread.plain)),
            Cell("no yardstick" if spread.by_yardstick is None else percent(spread.by_yardstick)),
        )
        for subject, spread in found.items()
    )
    head = columns("<subject", "<part", "<medians, ms", "spread", "spread by the yardstick")
    return Table(name="Spread between processes in numbers", columns=head, rows=rows, folded=True)


def _yardsticks(runs: Sequence[NamedRun]) -> list[tuple[NamedRun, Yardstick]]:
    return [
        (source, source.run.yardstick)
        for source in runs
        if source.run.yardstick is not None and any(source.run.yardstick.samples_ms)
    ]


def _stick_table(sticks: Sequence[tuple[NamedRun, Yardstick]]) -> Table:
    first = float(np.median(process_medians(sticks[0][1].samples_ms)))
    rows = []
    for source, stick in sticks:
        medians = process_medians(stick.samples_ms)
        middle = float(np.median(medians))
        same = stick.name == sticks[0][1].name
        rows.append(
            (
                Cell(source.name),
                Cell(stick.name),
                Cell(digits(middle), f"{digits(min(medians))} to {digits(max(medians))}"),
                Cell(f"{middle / first:.3f}" if same else "another yardstick"),
            )
        )
    head = columns("<run", "<yardstick", "median ms", f"of {sticks[0][0].name}")
    return Table(name="The yardstick of each run", columns=head, rows=tuple(rows))
