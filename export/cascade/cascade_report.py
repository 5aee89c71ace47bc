"""The curve of a cascade (quality, time, bytes for every threshold) as text and as an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from edgeclip.profiles.report.report_charts import Axis, axes, line, path, svg, text
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    ESCALATE_NONE,
    Certificate,
    PairedOutcomes,
)
from edgeclip.runtime.console import columns, digits, percent, percent_interval
from edgeclip.runtime.device.link import LinkProfile
from edgeclip.runtime.quality.intervals import Interval, bootstrap, bootstrap_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one query costs; the milliseconds were measured on one machine.

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
        """One round trip, and the time in which the query's bytes go up."""
        if self.link is None:
            return 0.0
        return self.link.rtt_ms + 8 * self.query_bytes / (1e3 * self.link.up_mbps)

    @property
    def always_ms(self) -> float:
        """One query where every query goes to the teacher straight away."""
        return self.link_ms + self.teacher_ms

    def mean_ms(self, share: float) -> float:
        """One query of a cascade that escalates a `share` of them: the student runs for all."""
        return self.student_ms + share * self.always_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A cascade with one threshold.

    Attributes:
        threshold: queries with a lower score are escalated.
        escalated: their share.
        quality: share of right answers, with its 95% interval.
        kept: quality divided by the teacher's, likewise, paired by query.
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
        costs: for time and bytes.
        rows: how many points to aim at, 2 or more.

    Raises:
        InputError: the teacher has too few right answers to compare with.
    """
    shares = [outcomes.escalated_share(threshold) for threshold in grid]
    wanted = [(step / (rows - 1)) ** 2 for step in range(rows)]
    near = {min(range(len(grid)), key=lambda at: abs(shares[at] - share)) for share in wanted}
    ends = {0, max(0, certified - 1), min(certified, len(grid) - 1), len(grid) - 1}
    return tuple(_point(outcomes, grid[at], at < certified, costs) for at in sorted(near | ends))


def curve_table(points: Sequence[CurvePoint], costs: Costs | None) -> str:
    """A line for each point, for a terminal."""
    head = ["escalated", "quality", "95% interval", "kept", "95% interval", "certified"]
    head += [] if costs is None else ["mean ms", "of teacher", "bytes up"]
    rows = [head, *(_row(point, costs) for point in points)]
    return columns(rows, left=0)


def _point(
    outcomes: PairedOutcomes, threshold: float, certified: bool, costs: Costs | None
) -> CurvePoint:
    right, share = outcomes.correct(threshold), outcomes.escalated_share(threshold)
    return CurvePoint(
        threshold=threshold,
        escalated=share,
        quality=bootstrap(right),
        kept=bootstrap_ratio(right, outcomes.teacher),
        certified=certified,
        mean_ms=None if costs is None else costs.mean_ms(share),
        mean_bytes=None if costs is None else share * costs.query_bytes,
    )


def _row(point: CurvePoint, costs: Costs | None) -> list[str]:
    row = [
        percent(point.escalated),
        percent(point.quality.value),
        percent_interval(point.quality),
        percent(point.kept.value),
        percent_interval(point.kept),
        "yes" if point.certified else "no",
    ]
    if costs is None or point.mean_ms is None or point.mean_bytes is None:
        return row
    share = percent(point.mean_ms / costs.always_ms)
    return [*row, digits(point.mean_ms), share, f"{point.mean_bytes:,.0f}"]


_FEWEST_POINTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadePage:
    """What the page shows.

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


def write_page(page: CascadePage, target: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(target) as temporary:
        temporary.write_bytes(render_page(page).encode("utf-8", "replace"))


def render_page(page: CascadePage) -> str:
    """The page as HTML text; whatever comes from outside is escaped."""
    style = (
        files("edgeclip.profiles.report").joinpath("report_style.css").read_text(encoding="utf-8")
    )
    mark = "miss" if page.certificate is None else "pass"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(page.title)}</title>\n<style>\n{style}</style>\n</head>",
            f"<body>\n<main>\n<h1>{escape(page.title)}</h1>",
            f'<p class="verdict {mark}">{escape(page.verdict)}</p>',
            "<h2>What a threshold buys</h2>",
            f"<figure>{chart(page, narrow=False)}{chart(page, narrow=True)}",
            f"<figcaption>{escape(_caption(page))}</figcaption></figure>",
            _table(page),
            _facts(page),
            "</main>\n</body>\n</html>\n",
        ]
    )


def chart(page: CascadePage, *, narrow: bool) -> str:
    """Quality kept against the share escalated: 358 pixels (`narrow`) or 760 wide."""
    points = page.points
    if len(points) < _FEWEST_POINTS:
        return ""
    width, height = (358, 338) if narrow else (760, 378)
    x = Axis(low=0.0, high=1.0, start=56, end=width - 14)
    seen = [v for p in points for v in (p.kept.low, p.kept.high)] + [page.bound]
    room = 0.08 * max(0.01, max(seen) - min(seen))
    y = Axis(low=min(seen) - room, high=max(seen) + room, start=height - 64, end=34)
    bar = y.at(page.bound)
    steps = 5 if narrow else 10
    parts = [
        text(2, 16, "share of the teacher's quality that is kept"),
        *axes(
            x,
            y,
            x_ticks=[(i / steps, f"{100 * i // steps}%") for i in range(steps + 1)],
            y_ticks=[(tick, percent(tick)) for tick in y.ticks(5)],
        ),
        *_time_ticks(page.costs, x, y.start + 35, steps),
        text(x.end, height - 4, _x_name(page.costs), anchor="end"),
        _band(points, x, y),
        path([(x.at(p.escalated), y.at(p.kept.value)) for p in points], "curve student"),
        line(x.start, bar, x.end, bar, "bar"),
        text(x.end, bar + 16, f"asked for: {percent(page.bound)}", css="barname", anchor="end"),
        *_chosen(page, x, y),
    ]
    label = f"Quality kept against the share escalated, {len(points)} thresholds; {page.verdict}"
    return svg(width, height, parts, label=label, css="narrow" if narrow else "wide")


def _x_name(costs: Costs | None) -> str:
    name = "share of queries that go to the teacher"
    return name if costs is None else f"{name}, and mean ms"


def _time_ticks(costs: Costs | None, x: Axis, height: float, steps: int) -> list[str]:
    """The mean time below each share: it grows with the share in a straight line."""
    if costs is None:
        return []
    shares = [step / steps for step in range(steps + 1)]
    return [text(x.at(s), height, digits(costs.mean_ms(s)), anchor="middle") for s in shares]


def _band(points: Sequence[CurvePoint], x: Axis, y: Axis) -> str:
    """The 95% intervals of all points, as one area."""
    upper = [(x.at(p.escalated), y.at(p.kept.high)) for p in points]
    lower = [(x.at(p.escalated), y.at(p.kept.low)) for p in reversed(points)]
    outline = " L".join(f"{across:.1f},{up:.1f}" for across, up in (*upper, *lower))
    return f'<g class="student"><path d="M{outline} Z" class="area" style="stroke:none"/></g>'


def _chosen(page: CascadePage, x: Axis, y: Axis) -> list[str]:
    """The certified point of the lowest threshold, with its name."""
    point = _chosen_point(page)
    if point is None:
        return []
    across, up = x.at(point.escalated), y.at(point.kept.value)
    name = f"certified: {percent(point.escalated)} escalated"
    right = across > (x.start + x.end) / 2
    return [
        f'<g class="student"><circle cx="{across:.1f}" cy="{up:.1f}" r="5" class="dot"/>',
        text(
            across - 10 if right else across + 10,
            up + 22,
            name,
            css="name",
            anchor="end" if right else "start",
        ),
        "</g>",
    ]


def _chosen_point(page: CascadePage) -> CurvePoint | None:
    if page.certificate is None:
        return None
    return next(p for p in page.points if p.threshold == page.certificate.threshold)


def _caption(page: CascadePage) -> str:
    words = (
        "Each point of the line is a threshold; the shade is its 95% bootstrap interval, paired by "
        "query, one threshold at a time. The certificate holds for the marked point and for all "
        "thresholds tried that escalate more."
    )
    if page.costs is None:
        return words
    link = page.costs.link
    sent = (
        "no network is counted"
        if link is None
        else f"the link is {link.name}: {digits(page.costs.link_ms)} ms a query, by its profile"
    )
    return (
        f"{words} One query takes the student with its score {digits(page.costs.student_ms)} ms on "
        f"{page.machine}, the teacher {digits(page.costs.teacher_ms)} ms; {sent}. The mean time of "
        "the cascade is the student's plus the escalated share of link and teacher."
    )


def _table(page: CascadePage) -> str:
    head = ["escalated", "threshold", "quality", "kept", "certified"]
    head += [] if page.costs is None else ["mean time", "of the teacher's", "bytes up"]
    chosen = _chosen_point(page)
    rows = "\n".join(_html_row(point, page.costs, point is chosen) for point in page.points)
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        "<h2>The same in numbers</h2>\n"
        '<div class="scroll" role="region" aria-label="The curve" tabindex="0">\n'
        f"<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _html_row(point: CurvePoint, costs: Costs | None, chosen: bool) -> str:
    cells = [
        _threshold(point.threshold),
        f"{percent(point.quality.value)}<small>{percent_interval(point.quality)}</small>",
        f"{percent(point.kept.value)}<small>{percent_interval(point.kept)}</small>",
        "chosen" if chosen else "yes" if point.certified else "no",
    ]
    if costs is not None and point.mean_ms is not None and point.mean_bytes is not None:
        share = percent(point.mean_ms / costs.always_ms)
        cells += [f"{digits(point.mean_ms)} ms", share, f"{point.mean_bytes:,.0f}"]
    name = percent(point.escalated)
    head = f'<th scope="row"{" class=pass" if chosen else ""}>{name}</th>'
    return f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _threshold(value: float) -> str:
    return {ESCALATE_ALL: "all", ESCALATE_NONE: "none"}.get(value, f"{value:.4f}")


def _facts(page: CascadePage) -> str:
    found = page.certificate
    if found is None:
        return ""
    tested = found.tested_on
    facts = {
        "bound": f"{percent(found.bound)} of the teacher's top-1 quality",
        "confidence": f"{percent(1 - found.delta)} (p = {found.p_value:.2g})",
        "tested on": f"{tested.data}: {tested.count:,} queries, {tested.entries:,} entries each, "
        f"embedded by the {tested.index_by}",
        "student": f"{found.student.name}, {found.query} tower in {found.student.precision}",
        "teacher": f"{found.teacher.name}, {found.query} tower in {found.teacher.precision}",
        "score": f"{found.score.kind}, escalated below {found.threshold:.6g}",
        "escalated": f"{percent(found.escalated.value)} of the queries "
        f"({percent_interval(found.escalated)})",
        "space": found.space[:16],
        "made": f"{found.created} by {found.command}",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<h2>The certificate</h2>\n<dl>{items}</dl>"
