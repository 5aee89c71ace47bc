"""The HTML page of a quantization search: trade-off, all candidates, gates on the test pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgeclip.export.quantizing.quantization_candidate import (
    MEAN_COSINE,
    P1_COSINE,
    R1_LOSS,
    ZERO_SHOT_LOSS,
    QuantizationCandidate,
    gate_interval,
)
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.search_table import key_points, ordered, short_name
from edgeclip.export.quantizing.search_task import MAX_TEST_JUDGEMENTS
from edgeclip.export.quantizing.sensitivity import GroupDamage
from edgeclip.profiles.report.charts import (
    Dot,
    DotRow,
    RowChart,
    ScatterChart,
    ScatterPoint,
    gate_name,
)
from edgeclip.profiles.report.sections import (
    Alarm,
    Block,
    Card,
    Cell,
    Commands,
    Figure,
    Heading,
    Note,
    Page,
    PageSummary,
    Section,
    Table,
    Tone,
    columns,
    interval_cell,
    ratio_cell,
    section_of,
    sections,
)
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.console import digits, megabytes, seconds
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.three_outcomes import Outcome

_CIRCLE, _TRIANGLE, _CROSS = 0, 3, 4  # in SHAPES
_DECADES = 6  # of a logarithmic axis, at most
_SHOWN = 20  # groups in the picture
_TONES: dict[Outcome, Tone] = {"passed": "pass", "failed": "miss", "undecided": "strong"}


def damage_section(result: SearchResult) -> Section | None:
    """The damage of each group alone; None where it was not measured."""
    if result.damage is None or not result.damage.groups:
        return None
    groups = result.damage.groups
    chart = RowChart(
        rows=tuple(_row(item) for item in groups[:_SHOWN] if item.divergence.value > 0),
        axis_name="divergence of a row of similarities, nats (log)",
        title="Damage of each group of products alone",
        log=True,
    )
    saved = "time saved, % of fp32" if _timed(result) else "multiply-adds, %"
    table = Table(
        name="All groups",
        columns=columns("group", "divergence, nats", "1 - cosine", saved, "in int8"),
        rows=tuple(_cells(item, result) for item in groups),
        folded=True,
    )
    blocks: list[Block] = [Figure(chart, _caption(result)), table]
    note = _measured_in(result)
    return section_of("damage", "What each group of products suffers", [*blocks, Note(note)])


def _caption(result: SearchResult) -> str:
    more = len(result.damage.groups) - _SHOWN if result.damage is not None else 0
    rest = f" The table has the other {more}." if more > 0 else ""
    return (
        "Each group quantized alone, all others in float, the most damaging first. Products that "
        f"read the same value are one group.{rest}"
    )


def _measured_in(result: SearchResult) -> str:
    damage = result.damage
    assert damage is not None
    return (
        f"Measured on {damage.inputs} steering inputs in {seconds(damage.seconds)}, "
        f"{damage.rate:.0f} inputs a second. A group goes back to float "
        "the earlier, the more it damages for the time that it saves."
    )


def _row(item: GroupDamage) -> DotRow:
    value = item.divergence
    return DotRow(item.title, (Dot(value),), f"{value.value:.1e}")


def _cells(item: GroupDamage, result: SearchResult) -> tuple[Cell, ...]:
    chosen = result.chosen.config
    kept = set(getattr(chosen, "kept", ()))
    float_only = not hasattr(chosen, "kept")
    inside = "no" if float_only or set(item.nodes) <= kept else "yes"
    loss = item.cosine_loss
    saved = "" if result.gains is None else f"{100 * result.gains.of(item.nodes):+.1f}"
    return (
        Cell(item.title, "\n".join(item.nodes)),
        Cell(f"{item.divergence.value:.2e}", _span(item.divergence.low, item.divergence.high)),
        Cell(f"{loss.value:.2e}", _span(loss.low, loss.high)),
        Cell(saved),
        Cell(inside),
    )


def _span(low: float, high: float) -> str:
    return f"{low:.2e} to {high:.2e}"


def _timed(result: SearchResult) -> bool:
    return result.gains is not None and result.gains.measured


# Of the table, by how the gates' names begin; what no config was judged by has none.
_GATES = {
    MEAN_COSINE: "mean cosine",
    P1_COSINE: "1st percentile",
    R1_LOSS: "R@1 lost, points",
    ZERO_SHOT_LOSS: "zero-shot lost, points",
}
_LEAST_LOSS = 1e-6  # of cosine: less is drawn at the foot of the picture
_MOST_GATES = 5.0  # times the R@1 that may be lost: more is drawn at the top


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedTower:
    """What was searched, in words.

    Attributes:
        title: such as "The image tower of student, for this-machine".
        command: what was typed.
        ranges, steering, test: the pairs that each was done on.
        here: where times were measured; None where this machine is not the device.
    """

    title: str
    command: str
    ranges: str
    steering: str
    test: str
    here: str | None


def front_section(result: SearchResult) -> Section | None:
    """Two charts: loss of cosine and of R@1, each against time, or bytes without any."""
    charts = (
        _chart(result, MEAN_COSINE, "1 - mean cosine with fp32 (log)"),
        _chart(result, R1_LOSS, "R@1 lost, points"),
    )
    cost = "bytes" if result.candidates[0].latency is None else "time"
    note = Note(
        "On the steering pairs, with 95% intervals. Circles are inside all gates, crosses are not, "
        "triangles lie beyond the picture. The dashed line is the gate, the loosest where "
        "precisions have different ones; the thin one joins what no other config beats in both "
        f"mean cosine and {cost}. Numbers are those of the table."
    )
    figures: list[Block] = [Figure(chart) for chart in charts if chart is not None]
    blocks = [*figures, note] if figures else []
    return section_of("front", "What each config loses, and what it takes", blocks)


def points_section(result: SearchResult) -> Section | None:
    """A table of every config that was tried."""
    timed = result.candidates[0].latency is not None
    gates = [
        gate
        for gate in _GATES
        if any(gate_interval(point.records, gate) is not None for point in result.candidates)
    ]
    names = columns(
        "config",
        *(("time / fp32", "ms") if timed else ()),
        "MB",
        *(_GATES[gate] for gate in gates),
        "<gates",
    )
    rows = [
        _candidate_row(number, point, result, gates)
        for number, point in enumerate(ordered(result), 1)
    ]
    table = Table(name="Every config", columns=names, rows=tuple(rows))
    note = "Gates as on the steering pairs, which decide what is tried; they prove nothing yet."
    return section_of("points", "Every config that was tried", [table, Note(note)])


def judged_section(result: SearchResult) -> Section | None:
    """The gates of what was held against the test pairs."""
    points = {point.key: point for point in result.candidates}
    blocks: list[Block] = []
    for judgement in result.judged:
        rows = tuple(
            (
                Cell(record.name),
                Cell(f"{record.value:.5g}", f"{record.low:.5g} to {record.high:.5g}"),
                Cell(f"{record.direction} {record.bound:g} {record.unit}"),
                Cell(record.outcome, tone=_TONES[record.outcome]),
            )
            for record in judgement.records
        )
        name = points[judgement.config].name
        head = columns("gate", "value", "bound", "")
        blocks += [Heading(name), Table(name=f"Gates of {name}", columns=head, rows=rows)]
    if not blocks:
        return None
    note = Note(
        "No config was tuned on these pairs: what was about to be shipped was held against them "
        f"once, and the next best only if it did not pass, {MAX_TEST_JUDGEMENTS} at most. Their "
        "intervals hold with 95% for all of these together."
    )
    return section_of("test", "Judged on the test pairs", [note, *blocks])


def failed_section(result: SearchResult) -> Section | None:
    """What could not be made or run, and why."""
    rows = tuple((Cell(name), Cell(reason)) for name, reason in result.failed)
    table = Table(name="Not possible here", columns=columns("config", "<reason"), rows=rows)
    return section_of("failed", "What was not possible here", [table] if rows else [])


def method_section(about: SearchedTower) -> Section | None:
    """The method, and the command that repeats the search."""
    notes = [
        Note(
            f"Ranges were found on {about.ranges}. What was tried next was decided on "
            f"{about.steering}, which are other pairs of the same split. The last judgement is on "
            f"{about.test}."
        )
    ]
    if about.here is not None:
        notes.append(
            Note(
                "Each time is the geometric mean of two measurements in turns with fp32, with "
                "engines loaded anew in both orders; its interval holds those of both. What is "
                "shipped must be faster than fp32 over the whole interval; of configs within 1% "
                "the most exact is taken."
            )
        )
    return section_of("method", "How it was searched", [*notes, Commands(lines=(about.command,))])


def _chart(result: SearchResult, gate: str, name: str) -> ScatterChart | None:
    """What each config loses against what it takes; None if none has such a figure.

    Circles are inside all gates, crosses are not, triangles are beyond the picture.
    """
    bound, log = _bound(result.candidates, gate), gate == MEAN_COSINE
    shown = [
        (number, point, loss)
        for number, point in enumerate(ordered(result), 1)
        if (loss := _loss(point, gate)) is not None
    ]
    if not shown or bound is None:
        return None
    timed = result.candidates[0].latency is not None
    costs = [_cost(point) for _, point, _ in shown]
    seen = [end for cost in costs for end in (cost.low, cost.value, cost.high)]
    seen += [1.0] if timed else []
    room = max((max(seen) - min(seen)) * 0.06, 0.02 * max(seen))
    low, high = _loss_limits([loss for _, _, loss in shown], bound, log=log)
    named, front = key_points(result), {point.key for point in result.front}
    points = []
    for (number, point, loss), cost in zip(shown, costs, strict=True):
        chosen = point.key == result.chosen.key
        words = f"{number}: {short_name(point.config)}" if point.key in named else str(number)
        points.append(
            ScatterPoint(
                name=f"{words}, chosen" if chosen else words,
                short=f"{number} chosen" if chosen else str(number),
                x=cost,
                y=loss,
                colour="green" if point.passed else "orange",
                shape=_TRIANGLE if loss.value > high else _CIRCLE if point.passed else _CROSS,
                chosen=chosen,
            )
        )
    order = sorted(range(len(shown)), key=lambda at: costs[at].value)
    return ScatterChart(
        title=f"{name} against {'time' if timed else 'bytes'}",
        points=tuple(points),
        x_name=("time at batch 1, fp32 is 1" if timed else "graph and weights, MB")
        + ", lower is better",
        y_name=f"{name}, lower is better",
        x_limits=(max(0.0, min(seen) - room), max(seen) + room),
        y_limits=(low, high),
        x_log=False,
        y_log=log,
        front=tuple(at for at in order if shown[at][1].key in front),
        bar=(bound, gate_name(bound)),
        reference=(1.0, "fp32") if timed else None,
    )


def _cost(point: QuantizationCandidate) -> Interval:
    """Time as a share of fp32's, or megabytes where no time was measured."""
    size = point.bytes / 1e6
    return Interval(size, size, size) if point.latency is None else point.latency.ratio


def _loss_limits(losses: Sequence[Interval], gate: float, *, log: bool) -> tuple[float, float]:
    """Limits of the loss axis: at most six decades, or five times the gate on a linear axis."""
    values = [gate, *(loss.value for loss in losses)]
    if log:
        high = max(values) * 2
        least = max(_LEAST_LOSS, high / 10**_DECADES)
        return max(least, min(max(value, least) for value in values)) / 1.8, high
    ends = [end for loss in losses for end in (loss.low, loss.high)]
    low = min(0.0, *values, *ends)
    most = min(max(*values, *ends), _MOST_GATES * gate)
    room = 0.08 * (most - low)
    return low - room, most + room


def _loss(point: QuantizationCandidate, gate: str) -> Interval | None:
    cosine = point.cosine
    if gate != MEAN_COSINE or cosine is None:
        return point.r1_loss if gate == R1_LOSS else None
    return Interval(1 - cosine.value, 1 - cosine.high, 1 - cosine.low)


def _bound(points: Sequence[QuantizationCandidate], gate: str) -> float | None:
    """The most that configs other than fp32 may lose; the loosest, where they differ."""
    bounds = [
        1 - record.bound if gate == MEAN_COSINE else record.bound
        for point in points[1:]
        for record in point.records
        if record.name.startswith(gate)
    ]
    return max(bounds, default=None)


def _candidate_row(
    number: int, point: QuantizationCandidate, result: SearchResult, gates: Sequence[str]
) -> tuple[Cell, ...]:
    chosen = point.key == result.chosen.key
    tone: Tone = "strong" if chosen else ""
    name = f"{number}: {short_name(point.config)}{', chosen' if chosen else ''}"
    latency = point.latency
    times = () if latency is None else (ratio_cell(latency.ratio), interval_cell(latency.ms))
    return (
        Cell(name, tone=tone),
        *times,
        Cell(digits(point.bytes / 1e6)),
        *(_gate_cell(point, gate) for gate in gates),
        Cell("inside", tone="pass") if point.passed else Cell("misses", tone="miss"),
    )


def _gate_cell(point: QuantizationCandidate, gate: str) -> Cell:
    """A gate's value and interval; one that is missed shows it."""
    found = [record for record in point.records if record.name.startswith(gate)]
    if not found:
        return Cell("")
    record, places = found[0], 2 if gate in (R1_LOSS, ZERO_SHOT_LOSS) else 5
    span = f"{record.low:.{places}f} to {record.high:.{places}f}"
    return Cell(f"{record.value:.{places}f}", span, "" if record.is_inside else "miss")


def write_search_page(result: SearchResult, path: Path, about: SearchedTower) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(search_page(result, about), path)


def search_page(result: SearchResult, about: SearchedTower) -> Page:
    """The choice, the trade-off, every config, the proof on the test pairs, and the method."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Page(
        title=about.title,
        lead=_lead(result, about),
        summary=_summary(result),
        sections=sections(
            front_section(result),
            points_section(result),
            judged_section(result),
            damage_section(result),
            failed_section(result),
            method_section(about),
        ),
        footer=(
            f"Written by EdgeCLIP on {created}. Times are wall time in milliseconds, MB are 10^6 "
            "bytes, small figures 95% intervals.",
        ),
    )


def _lead(result: SearchResult, about: SearchedTower) -> tuple[str, ...]:
    spent = seconds(sum(point.seconds for point in result.candidates))
    where = f"Times are from {about.here}." if about.here else "No time was measured."
    return (f"{len(result.candidates)} configs were made and judged in {spent}. {where}",)


def _summary(result: SearchResult) -> PageSummary:
    chosen, fp32 = result.chosen, result.candidates[0]
    if chosen.key == fp32.key:
        return PageSummary(f"Only fp32 is to be shipped: {result.why}.", "", _alarms(result), ())
    cards = [Card("Size", megabytes(chosen.bytes), f"fp32 {megabytes(fp32.bytes)}", chosen.name)]
    if chosen.latency is not None:
        ratio, latency = chosen.latency.ratio, chosen.latency
        note = f"{digits(latency.ms.value)} ms, fp32 {digits(latency.reference_ms.value)} ms"
        cards.insert(0, _card("Time, fp32 is 1", ratio, 3, note))
    last = result.judged[-1].records
    for gate, title, places in (
        (MEAN_COSINE, "Mean cosine with fp32", 5),
        (R1_LOSS, "R@1 lost, points", 2),
    ):
        value = gate_interval(last, gate)
        if value is not None:
            cards.append(_card(title, value, places, "on the test pairs"))
    verdict = f"{chosen.name}: {result.why}. On the test pairs: {_test_words(last)}."
    return PageSummary(verdict, "pass", _alarms(result), tuple(cards))


def _test_words(records: Sequence[GateRecord]) -> str:
    undecided = [record.name for record in records if not record.passed]
    if not undecided:
        return "all gates passed"
    return f"inside them, but undecided by so few pairs: {', '.join(undecided)}"


def _card(name: str, value: Interval, places: int, note: str) -> Card:
    span = f"{value.low:.{places}f} to {value.high:.{places}f}"
    return Card(name, f"{value.value:.{places}f}", span, note)


def _alarms(result: SearchResult) -> tuple[Alarm, ...]:
    alarms = []
    if not result.complete:
        alarms.append(Alarm("Time was up before all was tried: run it again to go on.", "miss"))
    disturbed = [point for point in result.candidates if point.latency and point.latency.contended]
    if disturbed:
        alarms.append(
            Alarm(
                f"{len(disturbed)} of {len(result.candidates)} configs were timed while other "
                "programs took the processor: their intervals are wide.",
                "miss",
            )
        )
    if len(result.judged) > 1:
        words = f"{len(result.judged)} configs were held against the test pairs, each once."
        alarms.append(Alarm(words, ""))
    return tuple(alarms)
