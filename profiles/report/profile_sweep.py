"""Throughput and latency over batch sizes and threads, as a section."""

from collections.abc import Sequence

from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.report.chart_lines import BatchPoint, Series, batch_chart, shared_limits
from edgeclip.profiles.report.profile_blocks import (
    Block,
    Cell,
    Heading,
    Section,
    SmallCharts,
    Table,
    columns,
    span,
)
from edgeclip.profiles.report.profile_data import PART_NAMES, Subject, by_part
from edgeclip.runtime.console import digits

_MOST_LINES = 6


def sweep_section(subjects: Sequence[Subject]) -> Section | None:
    """Small charts of throughput against latency over batches, and a table of all points."""
    swept = [subject for subject in subjects if subject.item.sweep]
    if not swept:
        return None
    blocks: list[Block] = []
    for part, group in by_part(swept).items():
        pictures = tuple(picture for picture in _charts(group) if picture)
        if pictures:
            caption = "" if blocks else _CAPTION
            blocks += [Heading(PART_NAMES[part]), SmallCharts(pictures=pictures, caption=caption)]
    return Section(
        anchor="sweep", title="Batches and threads", blocks=(*blocks, _table(swept, bool(blocks)))
    )


_CAPTION = (
    "Items a second against the median time of one batch: up is more work, left is a sooner "
    "answer. A line is a number of the engine's threads, a point a batch size, named on one line; "
    "whiskers are 95% intervals. Charts of one part share their axes."
)


def _charts(subjects: Sequence[Subject]) -> list[str]:
    lines = [_series(subject.item) for subject in subjects]
    limits = shared_limits([one for series in lines for one in series])
    return [
        batch_chart(subject.label, series, limits)
        for subject, series in zip(subjects, lines, strict=True)
    ]


def _series(item: Measurement) -> list[Series]:
    """One line for each number of threads, at most six: fewest and most stay."""
    numbers = _threads(item)
    if len(numbers) > _MOST_LINES:
        numbers = [*numbers[: _MOST_LINES - 1], numbers[-1]]
    return [
        Series(
            threads_name(threads),
            tuple(
                BatchPoint(batch=point.batch, rate=point.items_per_s, ms=point.p50_ms)
                for point in sorted(item.sweep, key=lambda p: p.batch)
                if point.threads == threads
            ),
        )
        for threads in numbers
    ]


def _threads(item: Measurement) -> list[int | None]:
    return sorted({point.threads for point in item.sweep}, key=lambda number: number or 0)


def threads_name(threads: int | None) -> str:
    """ "1 thread", "4 threads"; of the device where they are not known."""
    if threads is None:
        return "device"
    return "1 thread" if threads == 1 else f"{threads} threads"


def _table(subjects: Sequence[Subject], folded: bool) -> Table:
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
