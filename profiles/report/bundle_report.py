"""The report of a bundle or of a whole run: choices, quality, latency, gates, training, gallery.

Shares (R@1, retention) are between 0 and 1 here; the report prints percent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgeclip.profiles.record.measurement import ColdStart, Measurement, MeasurementRun
from edgeclip.profiles.report.charts import BoundChart, ScatterPoint, TrainingCurve
from edgeclip.profiles.report.profile_quality import tradeoff_chart
from edgeclip.profiles.report.sections import (
    Card,
    Cell,
    Commands,
    Facts,
    Figure,
    FigureGrid,
    Gallery,
    GalleryEntry,
    Heading,
    Note,
    Page,
    PageSummary,
    Section,
    Table,
    columns,
    interval_cell,
    ratio_cell,
    section_of,
    sections,
)
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.console import (
    MISSING,
    digits,
    interval_ends,
    megabytes,
    percent,
    percent_interval,
    seconds,
)
from edgeclip.runtime.device.machine import Machine, detect_machine
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.three_outcomes import Outcome

Role = Literal["teacher", "student"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One figure that decides: a share with its interval, and the bar it is held against."""

    name: str
    value: Interval
    bar: float
    direction: Literal[">=", "<="]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value itself (not its interval) meets the bar."""
        if self.direction == ">=":
            return self.value.value >= self.bar
        return self.value.value <= self.bar

    @property
    def certain(self) -> bool:
        """Whether the whole interval lies on the side of the bar where the value lies."""
        low, high = self.value.low >= self.bar, self.value.high >= self.bar
        return low == high


@dataclass(frozen=True, slots=True)
class ShippedPrecision:
    """The precision that a tower ships in, and why."""

    tower: Tower
    precision: Precision
    why: str


@dataclass(frozen=True, slots=True)
class RunStep:
    """A step of the run and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionQuality:
    """Retrieval in one direction: shares, and ranks counted from 1."""

    r1: Interval
    r5: float
    r10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuality:
    """Retrieval quality of one model in both directions."""

    name: str
    role: Role
    image_to_text: DirectionQuality
    text_to_image: DirectionQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One model: quality (a share) against latency in ms; the circle's area is its size."""

    name: str
    role: Role
    quality: Interval
    latency_ms: Interval
    bytes: int
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that one report shows. An empty part is left out of the page.

    Attributes:
        title: what was made, such as the bundle's name.
        summary: one or two sentences under the title.
        created: ISO 8601, UTC.
        machine: where it ran.
        commands: what to type to get it again, in order.
        credits: licences and attribution, one sentence each.
        headlines: the figures that decide, most important first.
        choices: the precision chosen for each tower.
        steps: steps of the run, in order.
        quality: one row per model.
        measurements: latency, throughput, cold start and memory, one row per candidate.
        pareto: points of quality against latency.
        quality_name: what the Pareto picture's quality axis shows.
        latency_name: what its latency axis shows.
        quality_bar: share of quality below which a student is not good enough, if any.
        losses: training curves.
        gates: bounds that were checked before the bundle was written, and what each is about,
            such as "image int8".
        gallery: test pictures with answers.
        failures: pictures that the student gets wrong.
    """

    title: str
    summary: str
    created: str
    machine: Machine
    commands: tuple[str, ...]
    credits: tuple[str, ...]
    headlines: tuple[Headline, ...] = ()
    choices: tuple[ShippedPrecision, ...] = ()
    steps: tuple[RunStep, ...] = ()
    quality: tuple[ModelQuality, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    quality_name: str = ""
    latency_name: str = ""
    quality_bar: float | None = None
    losses: tuple[TrainingCurve, ...] = ()
    gates: tuple[tuple[str, GateRecord], ...] = ()
    gallery: tuple[GalleryEntry, ...] = ()
    failures: tuple[GalleryEntry, ...] = ()


def bundle_report(bundle: Bundle, measured: MeasurementRun | None) -> ReportData:
    """A report of a bundle: choices, gates, provenance, and measurements if there are any.

    The machine is the one that was measured, else this one.
    """
    manifest = bundle.manifest
    origin = manifest.provenance
    why = "Chosen when the bundle was written."
    held = "The gates below held it" if manifest.held_to_teacher else "No gate held it"
    return ReportData(
        title=manifest.name,
        summary=f"A bundle of {origin.student}, distilled from {origin.teacher} on {origin.data}. "
        f"{held} to the teacher's embedding space.",
        created=origin.created,
        machine=detect_machine() if measured is None else measured.machine,
        commands=(origin.command,) if measured is None else (origin.command, measured.command),
        credits=(f"Licence of the bundle: {manifest.licence}.",),
        choices=tuple(ShippedPrecision(item.tower, item.chosen, why) for item in manifest.towers),
        measurements=() if measured is None else measured.measurements,
        gates=tuple(manifest.all_gates()),
    )


def bundle_page(data: ReportData) -> Page:
    """The report as sections."""
    return Page(
        title=data.title,
        lead=(data.summary,),
        summary=_summary(data),
        sections=sections(
            _choices(data.choices),
            _tradeoff(data),
            _quality(data.quality),
            _speed(data.measurements),
            _gates(data.gates),
            _training(data.losses),
            _gallery("gallery", "Gallery", data.gallery,
                     "Test pictures, and what each model answered, best first."),
            _gallery("failures", "Failures", data.failures,
                     "Pictures that the student gets wrong."),
            _repeat(data),
        ),
        footer=(*data.credits, f"Written by EdgeCLIP, {data.created}."),
    )  # fmt: skip


def _summary(data: ReportData) -> PageSummary:
    """Whether bars and gates are met, and a card for each figure that decides."""
    missed = [one.name for one in data.headlines if not one.passed]
    failed = sum(record.outcome == "failed" for _, record in data.gates)
    undecided = sum(record.outcome == "undecided" for _, record in data.gates)
    words = []
    if missed:
        words.append(f"Misses {len(missed)} of {len(data.headlines)} bars: {', '.join(missed)}.")
    elif data.headlines:
        number = len(data.headlines)
        which = {1: "its bar", 2: "both bars"}.get(number, f"all {number} bars")
        words.append(f"Meets {which}.")
    if failed:
        words.append(f"{failed} of {len(data.gates)} gates failed.")
    if undecided:
        words.append(f"{undecided} of {len(data.gates)} gates are undecided.")
    cards = tuple(_card(headline) for headline in data.headlines)
    return PageSummary(" ".join(words), "miss" if missed or failed else "pass", cards=cards)


def _card(headline: Headline) -> Card:
    verdict = "met" if headline.passed else "missed"
    if not headline.certain:
        verdict += ", but the interval reaches across the bar"
    return Card(
        name=headline.name,
        figure=percent(headline.value.value),
        interval=percent_interval(headline.value),
        note=headline.note,
        verdict=verdict,
        tone="pass" if headline.passed else "miss",
        chart=BoundChart(
            title=headline.name,
            value=headline.value,
            bound=headline.bar,
            at_least=headline.direction == ">=",
        ),
    )


def _choices(choices: Sequence[ShippedPrecision]) -> Section | None:
    rows = tuple(
        (Cell(f"{one.tower} tower"), Cell(one.precision, tone="strong"), Cell(one.why))
        for one in choices
    )
    table = Table(name="What ships", columns=columns("tower", "<precision", "<why"), rows=rows)
    return section_of("choices", "What ships", [table] if rows else [])


def _tradeoff(data: ReportData) -> Section | None:
    if not data.pareto:
        return None
    biggest = max(1, *(point.bytes for point in data.pareto))
    points = [
        ScatterPoint(
            name=f"{point.name} (ships)" if point.chosen else point.name,
            x=point.latency_ms,
            y=point.quality,
            facts=(
                percent(point.quality.value),
                f"{digits(point.latency_ms.value)} ms",
                megabytes(point.bytes),
            ),
            radius=math.sqrt(point.bytes / biggest),
            colour="grey" if point.role == "teacher" else "blue",
            chosen=point.chosen,
        )
        for point in data.pareto
    ]
    chart = tradeoff_chart(
        points,
        quality_name=data.quality_name,
        unit="share",
        latency_name=data.latency_name,
        bar=data.quality_bar,
    )
    caption = (
        "The area of a circle is the size of the model's files, its centre the measured point, the "
        "whiskers 95% intervals. The thin line joins the models that no other beats in both. Blue "
        "is the student, grey the teacher."
    )
    return section_of("tradeoff", "Quality against latency", [Figure(chart, caption)])


def _quality(models: Sequence[ModelQuality]) -> Section | None:
    if not models:
        return None
    rows = tuple(
        (
            Cell(model.name),
            Cell(direction),
            Cell(percent(one.r1.value), percent_interval(one.r1)),
            Cell(percent(one.r5)),
            Cell(percent(one.r10)),
            Cell(f"{one.median_rank:g}"),
            Cell(f"{one.mean_rank:.2f}"),
        )
        for model in models
        for direction, one in (
            ("image to text", model.image_to_text),
            ("text to image", model.text_to_image),
        )
    )
    names = ("model", "<direction", "R@1", "R@5", "R@10", "median rank", "mean rank")
    note = Note(
        "R@k is the share of queries whose partner is among the first k. Ranks count from 1. Small "
        "figures are 95% intervals."
    )
    table = Table(name="Retrieval quality", columns=columns(*names), rows=rows)
    return section_of("quality", "Retrieval quality", [note, table])


def _speed(measured: Sequence[Measurement]) -> Section | None:
    """Latency at batch 1, throughput by batch size, and cold start, each as a table."""
    if not measured:
        return None
    names = (
        "batch 1",
        "<tower",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "ratio",
        "<to",
        "runs",
        "<machine was",
    )
    latency = tuple(
        (
            Cell(item.name),
            Cell(item.part),
            interval_cell(item.latency.p50_ms),
            interval_cell(item.latency.p90_ms),
            interval_cell(item.latency.p99_ms),
            ratio_cell(None if item.ratio is None else item.ratio.ratio),
            Cell("" if item.ratio is None else item.ratio.reference),
            Cell(str(item.latency.runs)),
            _machine_cell(item.contended),
        )
        for item in measured
    )
    batches = sorted({point.batch for item in measured for point in item.sweep})
    rates = tuple(
        (
            Cell(item.name),
            Cell(item.part),
            *(
                next(
                    (interval_cell(p.items_per_s) for p in item.sweep if p.batch == batch), Cell("")
                )
                for batch in batches
            ),
        )
        for item in measured
    )
    head = columns("per second", "<tower", *(f"batch {batch}" for batch in batches))
    starts = tuple(
        _start_row(item, item.cold_start) for item in measured if item.cold_start is not None
    )
    start_head = columns(
        "cold start", "<tower", "import ms", "load ms", "first run ms", "peak memory", "file"
    )
    contended = any(item.contended for item in measured)
    return section_of(
        "speed",
        "Latency, throughput, memory",
        [
            Note(
                "All candidates of a tower took turns in one process. A ratio is the median over "
                "rounds of its time divided by the reference's. Small figures are 95% intervals."
            ),
            Table(name="Latency at batch 1", columns=columns(*names), rows=latency),
            *([Note(_CONTENDED)] if contended else []),
            *([Heading("Images or texts per second")] if batches else []),
            *(
                [Table(name="Throughput by batch size", columns=head, rows=rates)]
                if batches
                else []
            ),
            *([Heading("Cold start in a fresh process")] if starts else []),
            *([Table(name="Cold start", columns=start_head, rows=starts)] if starts else []),
        ],
    )


_CONTENDED = (
    "Contended: more than 10% of the CPU time that the runs asked for was taken by other "
    "programs, by too many threads, or by a hypervisor. Ratios hold better than times."
)


def _machine_cell(contended: bool | None) -> Cell:
    if contended is None:
        return Cell("unknown")
    return Cell("contended", tone="miss") if contended else Cell("quiet")


def _start_row(item: Measurement, start: ColdStart) -> tuple[Cell, ...]:
    known = start.intervals
    times = (
        [Cell(digits(ms)) for ms in (start.import_ms, start.load_ms, start.first_run_ms)]
        if known is None
        else [interval_cell(ms) for ms in (known.import_ms, known.load_ms, known.first_run_ms)]
    )
    memory = start.peak_memory_mb
    return (
        Cell(item.name),
        Cell(item.part),
        *times,
        Cell(MISSING if memory is None else f"{digits(memory)} MB"),
        Cell(megabytes(start.file_bytes)),
    )


def gate_number(value: float, unit: str) -> str:
    """A gate's value with its unit; five digits, so that 0.99998 does not become 1."""
    return f"{value:.5g} {unit}".strip()


_OUTCOMES: dict[Outcome, Cell] = {
    "passed": Cell("✓ passed", tone="pass"),
    "failed": Cell("✗ failed", tone="miss"),
    "undecided": Cell("? undecided", tone="strong"),
}


def _gates(gates: Sequence[tuple[str, GateRecord]]) -> Section | None:
    if not gates:
        return None
    rows = tuple(
        (
            Cell(subject),
            Cell(one.name),
            Cell(
                gate_number(one.value, one.unit),
                ""
                if one.low == one.high
                else interval_ends(one.interval, lambda end: gate_number(end, "")),
            ),
            Cell(f"{'≥' if one.direction == '>=' else '≤'} {gate_number(one.bound, one.unit)}"),
            _OUTCOMES[one.outcome],
        )
        for subject, one in gates
    )
    head = columns("what", "<gate", "value", "bound", "<result")
    note = Note("Bounds that must hold before a bundle is written.")
    return section_of("gates", "Gates", [note, Table(name="Gates", columns=head, rows=rows)])


def _training(losses: Sequence[TrainingCurve]) -> Section | None:
    drawn = tuple(curve for curve in losses if any(map(math.isfinite, curve.values)))
    note = Note(
        "Each point is the mean of neighbouring steps; the horizontal axis is the training step."
    )
    return section_of("training", "Training", [note, FigureGrid(drawn)] if drawn else [])


def _gallery(
    anchor: str, title: str, entries: tuple[GalleryEntry, ...], note: str
) -> Section | None:
    return section_of(anchor, title, [Note(note), Gallery(entries)] if entries else [])


def _repeat(data: ReportData) -> Section | None:
    """The commands, how long each step took, and the machine."""
    rows = [(Cell(step.name), Cell(seconds(step.seconds))) for step in data.steps]
    rows.append((Cell("together"), Cell(seconds(math.fsum(step.seconds for step in data.steps)))))
    table = Table(name="Steps", columns=columns("step", "time"), rows=tuple(rows))
    machine = data.machine
    facts = [
        ("Machine", f"{machine.cpu or 'unknown processor'}, {machine.cores} cores"),
        ("Instructions", " ".join(machine.flags)),
        ("Memory", f"{digits(machine.memory_mb)} MB" if machine.memory_mb else MISSING),
        ("System", f"{machine.os}, {machine.python}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in machine.packages)),
    ]
    return section_of(
        "repeat",
        "How to repeat it",
        [
            *([Commands(data.commands)] if data.commands else []),
            *([table] if data.steps else []),
            Facts(tuple((name, value) for name, value in facts if value)),
        ],
    )
