"""Report a cascade: quality, time and bytes for each threshold, as text and as an HTML page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeclip.profiles.report.charts import BandChart
from edgeclip.profiles.report.sections import (
    Cell,
    Facts,
    Figure,
    Page,
    PageSummary,
    Section,
    Table,
    Tone,
    columns,
    section_of,
    sections,
)
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    ESCALATE_NONE,
    Certificate,
    PairedOutcomes,
)
from edgeclip.runtime.console import columns as text_columns
from edgeclip.runtime.console import digits, percent, percent_interval
from edgeclip.runtime.device.link import LinkProfile
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The cost of one query in milliseconds and bytes, measured on one machine.

    Attributes:
        student_ms: from the query to the student's answer and its score.
        teacher_ms: from the query to the teacher's answer.
        query_bytes: mean size of a query as it is sent.
        link: the network between the two, from its profile; None if they share a machine.
    """

    student_ms: float
    teacher_ms: float
    query_bytes: float
    link: LinkProfile | None = None

    @property
    def link_ms(self) -> float:
        """Milliseconds of the link: one round trip, and the upload of the query."""
        if self.link is None:
            return 0.0
        return self.link.rtt_ms + 8 * self.query_bytes / (1e3 * self.link.up_mbps)

    @property
    def always_ms(self) -> float:
        """Milliseconds of a query that goes to the teacher directly."""
        return self.link_ms + self.teacher_ms

    def mean_ms(self, share: float) -> float:
        """Return the mean milliseconds of a query if a `share` of them is escalated."""
        return self.student_ms + share * self.always_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Share escalated, quality and cost of a cascade with one threshold.

    Attributes:
        threshold: queries with a lower score are escalated.
        escalated: their share.
        quality: share of right answers, with its 95% interval.
        kept: quality divided by the teacher's, likewise, paired by query. Its upper end is
            infinite where the teacher has too few right answers to compare with.
        certified: whether the certificate holds for this threshold.
        mean_ms: time of a query; None if nothing was measured.
        mean_bytes: bytes of a query that go up.
    """

    threshold: float
    escalated: float
    quality: Interval
    kept: Interval
    certified: bool
    mean_ms: float | None
    mean_bytes: float | None


def curve(
    outcomes: PairedOutcomes,
    grid: Sequence[float],
    *,
    certified: int,
    costs: Costs | None = None,
    rows: int = 21,
) -> tuple[CurvePoint, ...]:
    """Return about `rows` points of the curve, the highest threshold first; denser at low shares.

    Both ends, the last certified threshold and the first one behind it are always among them.

    Args:
        outcomes: answers to the same queries by student and teacher.
        grid: thresholds, descending.
        certified: how many of them, from the first on, the certificate holds for.
        costs: time and bytes of student and teacher.
        rows: how many points to aim at, 2 or more.

    Raises:
        InputError: the teacher has no right answer to compare with.
    """
    shares = [outcomes.escalated_share(threshold) for threshold in grid]
    wanted = [(step / (rows - 1)) ** 2 for step in range(rows)]
    near = {min(range(len(grid)), key=lambda at: abs(shares[at] - share)) for share in wanted}
    ends = {0, max(0, certified - 1), min(certified, len(grid) - 1), len(grid) - 1}
    return tuple(_point(outcomes, grid[at], at < certified, costs) for at in sorted(near | ends))


def curve_table(points: Sequence[CurvePoint], costs: Costs | None) -> str:
    """Return the curve as a text table with a line for each point."""
    head = ["escalated", "quality", "95% interval", "kept", "95% interval", "certified"]
    head += [] if costs is None else ["mean ms", "of teacher", "bytes up"]
    rows = [head, *(_row(point, costs) for point in points)]
    return text_columns(rows, left=0)


def _point(
    outcomes: PairedOutcomes, threshold: float, certified: bool, costs: Costs | None
) -> CurvePoint:
    right, share = outcomes.correct(threshold), outcomes.escalated_share(threshold)
    return CurvePoint(
        threshold=threshold,
        escalated=share,
        quality=estimate_share(right, outcomes.clusters).interval,
        kept=estimate_kept(right, outcomes.teacher, outcomes.clusters).interval,
        certified=certified,
        mean_ms=None if costs is None else costs.mean_ms(share),
        mean_bytes=None if costs is None else share * costs.query_bytes,
    )


def _span(kept: Interval) -> str:
    if math.isfinite(kept.high):
        return percent_interval(kept)
    return f"at least {percent(kept.low)}"


def _row(point: CurvePoint, costs: Costs | None) -> list[str]:
    row = [
        percent(point.escalated),
        percent(point.quality.value),
        percent_interval(point.quality),
        percent(point.kept.value),
        _span(point.kept),
        "yes" if point.certified else "no",
    ]
    if costs is None or point.mean_ms is None or point.mean_bytes is None:
        return row
    share = percent(point.mean_ms / costs.always_ms)
    return [*row, digits(point.mean_ms), share, f"{point.mean_bytes:,.0f}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeReport:
    """What is told of a cascade.

    Attributes:
        title: names student and teacher.
        verdict: one sentence, the certificate's promise or why there is none.
        bound: the share of the teacher's quality that was asked for.
        points: the curve, from the most cautious threshold to the boldest.
        costs: what was measured; None if nothing was.
        certificate: what was certified; None if nothing.
        machine: where the times were measured.
    """

    title: str
    verdict: str
    bound: float
    points: tuple[CurvePoint, ...]
    costs: Costs | None
    certificate: Certificate | None
    machine: str


def write_cascade_page(report: CascadeReport, target: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        InputError: the file cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(cascade_page(report), target)


def cascade_page(report: CascadeReport) -> Page:
    """The curve, the same in numbers, and the certificate."""
    tone: Tone = "miss" if report.certificate is None else "pass"
    return Page(
        title=report.title,
        lead=(),
        summary=PageSummary(report.verdict, tone),
        sections=sections(
            section_of("curve", "What a threshold buys", [Figure(_chart(report), _caption(report))])
            if len(report.points) > 1
            else None,
            section_of("numbers", "The same in numbers", [_table(report)]),
            _certificate(report.certificate),
        ),
    )


def _chart(report: CascadeReport) -> BandChart:
    """Quality kept against the share escalated, with the mean time below each share."""
    costs, chosen = report.costs, _chosen_point(report)
    name = "share sent to the teacher"
    shares = [step / 10 for step in range(11)]
    return BandChart(
        title="Quality kept against the share of queries escalated",
        x=tuple(point.escalated for point in report.points),
        y=tuple(map(_drawn, report.points)),
        x_name=name if costs is None else f"{name}, and mean ms",
        y_name="share of the teacher's quality that is kept",
        below={} if costs is None else {share: digits(costs.mean_ms(share)) for share in shares},
        bar=(report.bound, f"asked for: {percent(report.bound)}"),
        marked=None
        if chosen is None
        else (report.points.index(chosen), f"certified: {percent(chosen.escalated)} escalated"),
    )


def _drawn(point: CurvePoint) -> Interval:
    """The share kept, with an end that can be drawn: no more is kept than if all were right."""
    kept, most = point.kept, point.kept.value / max(point.quality.value, 1e-3)
    return kept if math.isfinite(kept.high) else Interval(kept.value, kept.low, most)


def _chosen_point(report: CascadeReport) -> CurvePoint | None:
    if report.certificate is None:
        return None
    return next(p for p in report.points if p.threshold == report.certificate.threshold)


def _caption(report: CascadeReport) -> str:
    words = (
        "Each point of the line is a threshold; the shade is its 95% interval, paired by query, "
        "one threshold at a time. The certificate holds for the marked point and for all "
        "thresholds tried that escalate more."
    )
    costs = report.costs
    if costs is None:
        return words
    link = costs.link
    sent = (
        "no network is counted"
        if link is None
        else f"the link is {link.name}: {digits(costs.link_ms)} ms a query, by its profile"
    )
    return (
        f"{words} One query takes the student with its score {digits(costs.student_ms)} ms on "
        f"{report.machine}, the teacher {digits(costs.teacher_ms)} ms; {sent}. The mean time of "
        "the cascade is the student's plus the escalated share of link and teacher."
    )


def _table(report: CascadeReport) -> Table:
    """A row for each threshold."""
    chosen, costs = _chosen_point(report), report.costs
    names = ["escalated", "threshold", "quality", "kept", "certified"]
    names += [] if costs is None else ["mean time", "of the teacher's", "bytes up"]
    rows = tuple(_point_cells(point, costs, point is chosen) for point in report.points)
    return Table(name="The curve", columns=columns(*names), rows=rows)


def _point_cells(point: CurvePoint, costs: Costs | None, chosen: bool) -> tuple[Cell, ...]:
    tone: Tone = "pass" if chosen else ""
    ends = {ESCALATE_ALL: "all", ESCALATE_NONE: "none"}
    cells = [
        Cell(percent(point.escalated), tone=tone),
        Cell(ends.get(point.threshold, f"{point.threshold:.4f}")),
        Cell(percent(point.quality.value), percent_interval(point.quality)),
        Cell(percent(point.kept.value), _span(point.kept)),
        Cell("chosen" if chosen else "yes" if point.certified else "no", tone=tone),
    ]
    if costs is not None and point.mean_ms is not None and point.mean_bytes is not None:
        share = percent(point.mean_ms / costs.always_ms)
        cells += [
            Cell(f"{digits(point.mean_ms)} ms"),
            Cell(share),
            Cell(f"{point.mean_bytes:,.0f}"),
        ]
    return tuple(cells)


def _certificate(found: Certificate | None) -> Section | None:
    """What was certified, on which queries, for which towers."""
    if found is None:
        return None
    tested = found.tested_on
    facts = {
        "bound": f"{percent(found.bound)} of the teacher's top-1 quality",
        "task": found.task,
        "confidence": f"{percent(1 - found.delta)} (p = {found.p_value:.2g}, where "
        f"{found.tested_at:.2g} was needed)",
        "tested on": f"{tested.data}: {tested.count:,} queries in {tested.clusters:,} groups of "
        f"{tested.largest:,} at most",
        "assumed": tested.assumed,
        "student": f"{found.student.name}, {found.query} tower in {found.student.precision}",
        "teacher": f"{found.teacher.name}, {found.query} tower in {found.teacher.precision}",
        "score": f"{found.score.kind}, escalated below {found.threshold:.6g}",
        "escalated": f"{percent(found.escalated.value)} of the queries "
        f"({percent_interval(found.escalated)})",
        "watched": "; ".join(
            f"{percent_interval(item.share)} of scores below {item.below:.4g}"
            for item in found.watched
        ),
        "audits": "none: no query is answered without the teacher"
        if found.disagreement is None
        else f"the teacher disagrees with {percent(found.disagreement.value)} of what the student "
        f"answers alone ({percent(found.disagreement.high)} at most)",
        "teacher not reached": f"the student's own answers, {percent(found.quality.student.value)} "
        f"right ({percent_interval(found.quality.student)}), without a promise",
        "space": found.space[:16],
        "made": f"{found.created} by {found.command}",
    }
    return section_of("certificate", "The certificate", [Facts(tuple(facts.items()))])
