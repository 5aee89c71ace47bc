"""The whole curve of a cascade: quality, time and bytes for every threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.profiles.link import LinkProfile
from edgeclip.runtime.cascade.trial import Trial
from edgeclip.runtime.intervals import Interval, bootstrap, bootstrap_ratio
from edgeclip.runtime.reporting.report_format import digits, percent, percent_interval
from edgeclip.runtime.text_columns import columns


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
    trial: Trial,
    grid: Sequence[float],
    *,
    certified: int,
    costs: Costs | None = None,
    rows: int = 21,
) -> tuple[CurvePoint, ...]:
    """About `rows` points, the one that escalates most first; denser where few are escalated.

    Both ends, the last certified threshold and the first one behind it are always among them.

    Args:
        trial: answers to the same queries by student and teacher.
        grid: thresholds, descending.
        certified: how many of them, from the first on, the certificate holds for.
        costs: for time and bytes.
        rows: how many points to aim at, 2 or more.

    Raises:
        InputError: the teacher has too few right answers to compare with.
    """
    shares = [trial.escalated_share(threshold) for threshold in grid]
    wanted = [(step / (rows - 1)) ** 2 for step in range(rows)]
    near = {min(range(len(grid)), key=lambda at: abs(shares[at] - share)) for share in wanted}
    ends = {0, max(0, certified - 1), min(certified, len(grid) - 1), len(grid) - 1}
    return tuple(_point(trial, grid[at], at < certified, costs) for at in sorted(near | ends))


def curve_table(points: Sequence[CurvePoint], costs: Costs | None) -> str:
    """A line for each point, for a terminal."""
    head = ["escalated", "quality", "95% interval", "kept", "95% interval", "certified"]
    head += [] if costs is None else ["mean ms", "of teacher", "bytes up"]
    rows = [head, *(_row(point, costs) for point in points)]
    return columns(rows, left=0)


def _point(trial: Trial, threshold: float, certified: bool, costs: Costs | None) -> CurvePoint:
    right, share = trial.right(threshold), trial.escalated_share(threshold)
    return CurvePoint(
        threshold=threshold,
        escalated=share,
        quality=bootstrap(right),
        kept=bootstrap_ratio(right, trial.teacher),
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
