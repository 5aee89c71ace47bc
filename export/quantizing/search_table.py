"""A search as text: a line for each point, the choice, and what would not go."""

from edgeclip.export.quantizing.group_gains import Gains
from edgeclip.export.quantizing.point import Point
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.sensitivity import Sensitivity
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.reporting.report_format import digits
from edgeclip.runtime.text_columns import columns

_SHOWN = 8  # groups whose damage is printed
_HEAD = (
    *("", "config", "time/fp32", "95% interval", "ms", "MB"),
    *("mean cosine", "1st pct", "R@1 loss", "zero-shot loss", "gates"),
)


def search_table(result: SearchResult) -> str:
    """Everything that a terminal should see; gates of points are on the steering pairs."""
    points = ordered(result)
    rows = [_HEAD, *(_row(number, point, result) for number, point in enumerate(points, 1))]
    lines = [columns(rows, left=2), "", f"chosen: {result.chosen.name} ({result.why})"]
    for judgement in result.judged:
        name = next(point.name for point in points if point.key == judgement.config)
        lines.append(f"on the test pairs: {name}")
        lines += [f"  {_gate(record)}" for record in judgement.records]
    if result.damage is not None:
        lines += ["", *_damage_lines(result.damage, result.gains)]
    lines += [f"not possible here: {name}: {reason}" for name, reason in result.failed]
    if not result.complete:
        lines.append("time was up before all was tried: run it again to go on")
    return "\n".join(lines)


def ordered(result: SearchResult) -> tuple[Point, ...]:
    """All points: the fastest first, or the smallest where no time was measured."""
    return tuple(
        sorted(result.points, key=lambda point: (point.ratio or 0.0, point.bytes, point.key))
    )


def _row(number: int, point: Point, result: SearchResult) -> tuple[str, ...]:
    marks = ("*" if point.key == result.chosen.key else "") + str(number)
    time = ("", "", "")
    if point.latency is not None:
        ratio = point.latency.ratio
        span = f"{ratio.low:.3f} to {ratio.high:.3f}"
        time = (f"{ratio.value:.3f}", span, digits(point.latency.ms.value))
    return (
        marks,
        point.name,
        *time,
        digits(point.bytes / 1e6),
        _value(point.cosine, 5),
        _value(point.p1_cosine, 5),
        _value(point.r1_loss, 2),
        _value(point.zero_shot_loss, 2),
        "inside" if point.passed else "misses",
    )


def _value(value: Interval | None, places: int) -> str:
    return "" if value is None else f"{value.value:.{places}f}"


def _gate(record: GateRecord) -> str:
    outcome = "pass" if record.passed else "miss"
    return (
        f"{record.name}: {record.value:.5g} [{record.low:.5g}, {record.high:.5g}] "
        f"{record.direction} {record.bound:g} {record.unit}, {outcome}"
    )


def _damage_lines(damage: Sensitivity, gains: Gains | None) -> list[str]:
    shown = damage.groups[:_SHOWN]
    which = f", the worst {len(shown)} of {len(damage.groups)}" if damage.groups[_SHOWN:] else ""
    saved = "time saved" if gains is not None and gains.measured else "multiply-adds"
    rows = [
        (
            item.title,
            f"{item.divergence.value:.2e}",
            f"{item.cosine_loss.value:.2e}",
            "" if gains is None else f"{100 * gains.of(item.nodes):+.1f}%",
        )
        for item in shown
    ]
    return [
        f"damage of each group alone{which}, on {damage.inputs} inputs ({damage.rate:.0f}/s)",
        columns([("group", "divergence, nats", "1 - cosine", saved), *rows]),
    ]
