"""Cold start, memory and energy of a profile as sections."""

from collections.abc import Sequence

from edgeclip.profiles.record.measurement import ColdStart
from edgeclip.profiles.report.charts import Dot, DotRow, RowChart, StackBar, StackChart
from edgeclip.profiles.report.profile_data import PART_NAMES, Subject, full_name, missing_notes
from edgeclip.profiles.report.sections import (
    NOT_AVAILABLE,
    Block,
    Cell,
    Figure,
    Section,
    Table,
    columns,
    interval_cell,
    section_of,
    with_interval,
)
from edgeclip.runtime.console import digits, megabytes
from edgeclip.runtime.quality.intervals import Interval

MEMORY_KEYS = ("cold_start", "memory")
ENERGY_KEYS = ("energy",)


def start_section(subjects: Sequence[Subject]) -> Section | None:
    """Cold start of a fresh process in its steps, and memory."""
    started = [s for s in subjects if s.item.cold_start is not None]
    told = [s for s in subjects if s in started or s.item.peak_memory_mb is not None]
    blocks: list[Block] = []
    if started:
        blocks.append(Figure(_start_chart(started), _START))
    if told:
        blocks.append(_memory_table(told))
    blocks += missing_notes(subjects, MEMORY_KEYS)
    if not blocks:
        return None
    return Section(anchor="start", title="Cold start and memory", blocks=tuple(blocks))


_START = (
    "A fresh process imports the runtime, loads one model and runs it once; Python's own start is "
    "not counted, and the file may lie in the system's cache. Means over processes with 95% "
    "intervals, which are wide where there are few; a single process has none."
)


def _start_chart(subjects: Sequence[Subject]) -> StackChart:
    bars = []
    for subject in subjects:
        start = subject.item.cold_start
        assert start is not None
        parts = (
            ("import", start.import_ms),
            ("load", start.load_ms),
            ("first run", start.first_run_ms),
        )
        bars.append(StackBar(full_name(subject), parts, f"{digits(start.total_ms)} ms"))
    return StackChart(bars=tuple(bars), axis_name="ms", title="Cold start")


def _memory_table(subjects: Sequence[Subject]) -> Table:
    rows = []
    for subject in subjects:
        item, start = subject.item, subject.item.cold_start
        identity = item.identity
        empty = Cell("")
        times = (
            (empty,) * 6
            if start is None
            else (
                *_steps(start),
                Cell(str(start.processes)),
                Cell(_memory(start.peak_memory_mb)),
            )
        )
        stored = None if start is None else start.file_bytes
        size = stored if identity is None else identity.bytes_on_disk
        head = Cell(subject.label, PART_NAMES[item.part])
        rows.append((head, *times, Cell(_memory(item.peak_memory_mb)), Cell(megabytes(size))))
    head_row = columns(
        "<subject", "import ms", "load ms", "first run ms", "all three ms", "processes",
        "peak memory, one run", "peak memory, all runs", "on disk",
    )  # fmt: skip
    return Table(name="Cold start and memory", columns=head_row, rows=tuple(rows))


def _steps(start: ColdStart) -> tuple[Cell, ...]:
    """Import, load, first run and all three, with their intervals where there are some."""
    of = start if start.intervals is None else start.intervals
    steps = (of.import_ms, of.load_ms, of.first_run_ms, of.total_ms)
    return tuple(
        interval_cell(ms) if isinstance(ms, Interval) else Cell(digits(ms)) for ms in steps
    )


def _memory(megabyte: float | None) -> str:
    return NOT_AVAILABLE if megabyte is None else f"{digits(megabyte)} MB"


def energy_section(subjects: Sequence[Subject]) -> Section | None:
    """Energy of one item with its interval, by what sensor, and where there was none."""
    measured = [s for s in subjects if s.item.energy is not None]
    absent = missing_notes(subjects, ENERGY_KEYS)
    if not measured:
        return Section(anchor="energy", title="Energy", blocks=tuple(absent)) if absent else None
    rows, cells = [], []
    for subject in measured:
        energy = subject.item.energy
        assert energy is not None
        joules = energy.joules
        scaled = Interval(1e3 * joules.value, 1e3 * joules.low, 1e3 * joules.high)
        figure = with_interval(scaled, "mJ")
        rows.append(DotRow(full_name(subject), (Dot(scaled),), figure))
        idle = NOT_AVAILABLE if energy.idle_watts is None else f"{digits(energy.idle_watts)} W"
        cells.append(
            (
                Cell(subject.label, PART_NAMES[subject.item.part]),
                interval_cell(scaled),
                Cell(idle),
                Cell(energy.sensor),
                Cell(energy.covers),
            )
        )
    chart = RowChart(rows=tuple(rows), axis_name="mJ an image or text", title="Energy of one item")
    head = columns("<subject", "mJ an item", "idle before", "<sensor", "<covers")
    table = Table(name="Energy in numbers", columns=head, rows=tuple(cells))
    return section_of("energy", "Energy", [Figure(chart, _ENERGY), table, *absent])


_ENERGY = (
    "Energy of one image or text while it runs again and again at batch 1, idle power included, "
    "with 95% intervals. Only what the sensor covers is counted."
)
