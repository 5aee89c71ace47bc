"""The text table of a quantization search: candidates, the choice, failures."""

from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    Float32,
    StaticInt8,
    WeightOnly,
)
from edgeclip.export.quantizing.node_groups import Gains
from edgeclip.export.quantizing.quantization_candidate import QuantizationCandidate
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.sensitivity import Sensitivity
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.console import columns, digits
from edgeclip.runtime.stats.interval import Interval


def key_points(result: SearchResult) -> set[str]:
    """Keys of the candidates that a chart names; others have only their number.

    They are fp32, the plain recipe, what was chosen, the front, and all that is not static
    int8.
    """
    shown = {point.key for point in (*result.front, result.chosen, *result.candidates[:2])}
    others = {p.key for p in result.candidates if not isinstance(p.config, StaticInt8)}
    return shown | others


def short_name(config: Config) -> str:
    """A short name of a config: only what differs between those of one search."""
    match config:
        case Float32():
            return "fp32"
        case Float16():
            return f"fp16, {len(config.islands)} in fp32" if config.islands else "fp16"
        case Float8():
            return "fp8" + _kept(len(config.kept))
        case DynamicInt8():
            return "dynamic int8" + _kept(len(config.kept))
        case WeightOnly():
            return f"{config.bits}-bit weights" + _kept(len(config.kept))
        case StaticInt8():
            words = [
                "all int8" if not config.kept else f"{len(config.kept)} in float",
                "" if config.ranging.method == "minmax" else config.ranging.method,
                "smoothed" if config.smoothing else "",
                "" if config.per_channel else "one scale",
                "7-bit" if config.reduce_range else "",
                "int8 tables" if config.int8_tables else "",
            ]
            return ", ".join(filter(None, words))


def _kept(count: int) -> str:
    return f", {count} in float" if count else ""


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


def ordered(result: SearchResult) -> tuple[QuantizationCandidate, ...]:
    """All points: the fastest first, or the smallest where no time was measured."""
    return tuple(
        sorted(result.candidates, key=lambda point: (point.ratio or 0.0, point.bytes, point.key))
    )


def _row(number: int, point: QuantizationCandidate, result: SearchResult) -> tuple[str, ...]:
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
    return (
        f"{record.name}: {record.value:.5g} [{record.low:.5g}, {record.high:.5g}] "
        f"{record.direction} {record.bound:g} {record.unit}, {record.outcome}"
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
