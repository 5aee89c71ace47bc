"""The report of a profile: a full page for HTML, and a short one in Markdown for a pull request."""

from collections.abc import Sequence
from pathlib import Path

from edgeclip.profiles.layers.advice import MEASURE_AGAIN, Advice, advise
from edgeclip.profiles.record.measurement import ColdStart
from edgeclip.profiles.report.charts import Dot, DotRow, RowChart, StackBar, StackChart
from edgeclip.profiles.report.profile_data import (
    PART_NAMES,
    NamedRun,
    Subject,
    SubjectQuality,
    full_name,
    missing_notes,
    subjects_of,
)
from edgeclip.profiles.report.profile_environment import (
    absent_section,
    environment_rows,
    environment_section,
    identity_section,
    repeat_section,
)
from edgeclip.profiles.report.profile_inside import (
    LAYER_KEYS,
    STAGE_KEYS,
    layer_section,
    stage_section,
)
from edgeclip.profiles.report.profile_quality import (
    quality_of,
    quality_section,
    quality_span,
    quality_text,
)
from edgeclip.profiles.report.profile_speed import (
    SCENARIO_KEYS,
    histogram_section,
    latency_section,
    ratio_section,
    scenario_section,
    spread_section,
    sweep_section,
)
from edgeclip.profiles.report.profile_summary import alarms_of, summary_of
from edgeclip.profiles.report.sections import (
    NOT_AVAILABLE,
    AdviceList,
    AdviceNote,
    Block,
    Cell,
    Commands,
    Figure,
    Note,
    Page,
    PageSummary,
    Section,
    Table,
    columns,
    interval_cell,
    ratio_span,
    section_of,
    sections,
    span,
    with_interval,
)
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.console import digits, megabytes
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval

MOST_ADVICE = 3
_MEMORY_KEYS = ("cold_start", "memory")
_ENERGY_KEYS = ("energy",)
_CLAIMED = (*_MEMORY_KEYS, *_ENERGY_KEYS, *STAGE_KEYS, *LAYER_KEYS, *SCENARIO_KEYS)


def write_profile_report(
    runs: Sequence[NamedRun],
    out: Path,
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> None:
    """Write the page to `out`, whole or not at all.

    Args:
        runs: at least one run; their subjects stand side by side.
        out: the HTML file.
        quality: quality of the subjects, for example from `quality_of_bundle`.
        advice: what is worth trying, the most promising first.

    Raises:
        InputError: no run, or the file cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(profile_page(runs, quality=quality, advice=advice), out)


def profile_page(
    runs: Sequence[NamedRun],
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> Page:
    """Everything that was measured, with pictures.

    Raises:
        InputError: no run.
    """
    if not runs:
        raise InputError("a report needs a measurement: give a file of `edgeclip profile --out`")
    subjects = subjects_of(runs)
    created = max(source.run.created for source in runs)
    return Page(
        title=_title(subjects),
        lead=_lead(runs),
        summary=summary_of(runs, subjects, quality),
        sections=sections(
            _advice_section(advice),
            quality_section(subjects, quality),
            latency_section(subjects),
            histogram_section(subjects),
            ratio_section(subjects),
            scenario_section(subjects),
            sweep_section(subjects),
            start_section(subjects),
            energy_section(subjects),
            stage_section(subjects),
            layer_section(subjects),
            spread_section(runs, subjects),
            absent_section(subjects, _CLAIMED),
            identity_section(subjects),
            environment_section(runs),
            repeat_section(runs),
        ),
        footer=(
            f"Written by EdgeCLIP from measurements of {created}. Times are wall time in "
            "milliseconds, MB are 10^6 bytes, small figures 95% intervals.",
        ),
    )


def profile_summary_page(
    runs: Sequence[NamedRun],
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> Page:
    """A short page for a pull request: warnings, one table, advice, the environment folded."""
    subjects = subjects_of(runs)
    head = columns("<", *(f"<{source.name}" for source in runs))
    environment = Table(
        name="Environment", columns=head, rows=tuple(environment_rows(runs)), folded=True
    )
    return Page(
        title=_title(subjects),
        lead=(),
        summary=PageSummary("", "", tuple(alarms_of(runs, subjects))),
        sections=sections(
            Section(
                anchor="figures",
                title="Figures",
                blocks=(
                    _short_table(subjects, quality),
                    Note("Small figures are 95% intervals."),
                ),
            ),
            _advice_section(advice),
            section_of("environment", "Environment", [environment]),
            section_of(
                "repeat",
                "How to repeat it",
                [Commands(tuple(source.run.command for source in runs))],
            ),
        ),
    )


def _title(subjects: Sequence[Subject]) -> str:
    """The title, with the names of the bundles that were measured."""
    bundles = dict.fromkeys(s.item.identity.bundle for s in subjects if s.item.identity is not None)
    return f"Profile of {', '.join(bundles)}" if bundles else "Profile"


def _lead(runs: Sequence[NamedRun]) -> tuple[str, ...]:
    """Machine and time of each run in a sentence."""
    return tuple(
        f"{source.name}: {source.run.machine.cpu or 'an unknown processor'}, "
        f"{source.run.machine.cores} cores, {source.run.machine.os}, measured {source.run.created}."
        for source in runs
    )


def _short_table(subjects: Sequence[Subject], quality: Sequence[SubjectQuality]) -> Table:
    """A row for each subject: two percentiles, the ratio, the highest throughput, quality."""
    graded = any(quality_of(subject, quality) for subject in subjects)
    rows = []
    for subject in subjects:
        item = subject.item
        ratio, best = item.ratio, max(item.sweep, key=lambda p: p.items_per_s.value, default=None)
        cells = [
            Cell(f"{subject.label} ⚠" if item.contended else subject.label),
            Cell(PART_NAMES[item.part]),
            interval_cell(item.latency.p50_ms),
            interval_cell(item.latency.p99_ms, absent="too few runs"),
            Cell("")
            if ratio is None
            else Cell(
                f"{ratio.ratio.value:.3f}",
                f"{ratio_span(ratio.ratio)} of {ratio.reference}",
            ),
            Cell("")
            if best is None
            else Cell(
                digits(best.items_per_s.value), f"{span(best.items_per_s)}, batch {best.batch}"
            ),
        ]
        if graded:
            found = quality_of(subject, quality)
            cells += [_quality_cell(found[0]) if found else Cell("")]
        rows.append(tuple(cells))
    names = ("<subject", "<part", "p50 ms", "p99 ms", "ratio", "most a second")
    head = columns(*names, *(["quality"] if graded else []))
    return Table(name="Figures", columns=head, rows=tuple(rows))


def _quality_cell(one: SubjectQuality) -> Cell:
    small = ", ".join(filter(None, (one.metric, quality_span(one))))
    return Cell(quality_text(one.value.value, one.unit), small)


def _advice_section(advice: Sequence[AdviceNote]) -> Section | None:
    return section_of(
        "advice", "What is worth trying", [AdviceList(tuple(advice))] if advice else []
    )


def advice_of(runs: Sequence[NamedRun]) -> tuple[AdviceNote, ...]:
    """At most three things to try for each run: of each topic the one that can gain most.

    Doubts about the figures come first. Nothing is said of a run without a device profile.
    """
    notes = []
    for source in runs:
        found: dict[str, list[tuple[Advice, Subject]]] = {}
        for subject in subjects_of([source]):
            for advice in advise(source.run, subject.item):
                found.setdefault(advice.topic, []).append((advice, subject))
        best = [max(same, key=lambda pair: pair[0].saves) for same in found.values()]
        best.sort(key=lambda pair: (pair[0].topic != MEASURE_AGAIN, -pair[0].saves))
        for advice, subject in best[:MOST_ADVICE]:
            others = len(found[advice.topic]) - 1
            whom = f"{full_name(subject)}, and {others} more" if others else full_name(subject)
            # To measure again is about the whole run.
            whom = "all subjects" if advice.topic == MEASURE_AGAIN else whom
            notes.append(
                AdviceNote(
                    subject=whom if len(runs) == 1 else f"{whom} · {source.name}",
                    title=advice.what,
                    evidence=(advice.evidence,),
                    gain=""
                    if advice.at_most is None
                    else f"{advice.gains}: at most {advice.at_most:.2f} ×",
                )
            )
    return tuple(notes)


def start_section(subjects: Sequence[Subject]) -> Section | None:
    """Cold start of a fresh process in its steps, and memory."""
    started = [s for s in subjects if s.item.cold_start is not None]
    told = [s for s in subjects if s in started or s.item.peak_memory_mb is not None]
    blocks: list[Block] = []
    if started:
        blocks.append(Figure(_start_chart(started), _START))
    if told:
        blocks.append(_memory_table(told))
    blocks += missing_notes(subjects, _MEMORY_KEYS)
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
    absent = missing_notes(subjects, _ENERGY_KEYS)
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
