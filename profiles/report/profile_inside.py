"""Inside an answer: its steps, the layers of a tower, and the roofline, as sections."""

import math
from collections.abc import Sequence
from typing import get_args

from edgeclip.profiles.record.measurement import LayerProfile, LayerTime, Roofline, StageName
from edgeclip.profiles.report.charts import ScatterChart, ScatterPoint, StackBar, StackChart
from edgeclip.profiles.report.drawing import finite
from edgeclip.profiles.report.profile_data import PART_NAMES, Subject, full_name, missing_notes
from edgeclip.profiles.report.sections import (
    Block,
    Cell,
    Figure,
    Heading,
    Note,
    Section,
    Table,
    columns,
    count,
    interval_cell,
    section_of,
    with_interval,
)
from edgeclip.runtime.console import digits, percent
from edgeclip.runtime.stats.interval import Interval

STAGE_KEYS = ("stages",)
LAYER_KEYS = ("layers",)
_SHOWN_LAYERS = 12
_SHOWN_OPS = 10
_NAMED = 6  # points of the roofline
_LONGEST_NAME = 60


def stage_section(subjects: Sequence[Subject]) -> Section | None:
    """Where the time of one answer goes, step by step."""
    split = [subject for subject in subjects if subject.item.stages]
    absent = missing_notes(subjects, STAGE_KEYS)
    if not split:
        return section_of("stages", "Where an answer's time goes", absent)
    bars = tuple(
        StackBar(
            full_name(subject),
            tuple((stage.name, stage.ms.value) for stage in subject.item.stages),
            f"{digits(sum(stage.ms.value for stage in subject.item.stages))} ms",
        )
        for subject in split
    )
    names = _stage_names(split)
    chart = StackChart(bars=bars, axis_name="ms", title="Steps of an answer", names=tuple(names))
    return Section(
        anchor="stages",
        title="Where an answer's time goes",
        blocks=(Figure(chart, _STAGES), _stage_table(split, names), *absent),
    )


_STAGES = (
    "Medians of each step at batch 1; a sum of medians is not quite the median of the whole. "
    "The numbers are those of the table."
)


def _stage_names(subjects: Sequence[Subject]) -> list[StageName]:
    """The steps that any subject has, in the order of an answer."""
    found = {stage.name for subject in subjects for stage in subject.item.stages}
    every: tuple[StageName, ...] = get_args(StageName)
    return [name for name in every if name in found]


def _stage_table(subjects: Sequence[Subject], names: Sequence[StageName]) -> Table:
    rows = []
    for subject in subjects:
        times = {stage.name: stage.ms for stage in subject.item.stages}
        head = Cell(subject.label, PART_NAMES[subject.item.part])
        rows.append((head, *(interval_cell(times.get(name)) for name in names)))
    numbered = (f"{number} {name} ms" for number, name in enumerate(names, 1))
    return Table(name="Steps", columns=columns("<subject", *numbered), rows=tuple(rows))


def layer_section(subjects: Sequence[Subject]) -> Section | None:
    """The layers that take the time: by operator, the slowest by name, and on the roofline."""
    blocks: list[Block] = []
    for subject in subjects:
        if subject.item.layers is not None and subject.item.layers.layers:
            explained = any(isinstance(block, Figure) and block.caption for block in blocks)
            blocks += _layers(subject, subject.item.layers, not explained)
    return section_of("layers", "Layers", [*blocks, *missing_notes(subjects, LAYER_KEYS)])


def _layers(subject: Subject, profile: LayerProfile, explain: bool) -> list[Block]:
    name, roof = full_name(subject), subject.source.run.roofline
    chart = StackChart(bars=_operators(profile), axis_name="ms", title=f"Time by operator, {name}")
    words = (
        f"{profile.source}: medians of {count(profile.runs)} runs. All layers together take "
        f"{digits(profile.total_ms)} ms, the same runs without profiling "
        f"{digits(profile.plain_ms)} ms; the difference is what profiling and the engine itself "
        "cost."
    )
    return [
        Heading(name),
        Note(words),
        Figure(chart),
        _layer_table(profile, name),
        *_roofline(profile, roof, name, explain),
    ]


def _operators(profile: LayerProfile) -> tuple[StackBar, ...]:
    """Time by operator, the slowest first; what is beyond the tenth is put together."""
    groups: dict[str, list[LayerTime]] = {}
    for layer in profile.layers:
        groups.setdefault(layer.op, []).append(layer)
    order = sorted(groups.items(), key=lambda pair: -sum(layer.ms for layer in pair[1]))
    rest = [layer for _, layers in order[_SHOWN_OPS:] for layer in layers]
    shown = order[:_SHOWN_OPS] + ([("others", rest)] if rest else [])
    return tuple(
        StackBar(
            f"{op} ({len(layers)}×)",
            ((op, sum(layer.ms for layer in layers)),),
            f"{digits(sum(layer.ms for layer in layers))} ms, "
            f"{percent(sum(layer.share for layer in layers))}",
        )
        for op, layers in shown
    )


def _layer_table(profile: LayerProfile, name: str) -> Table:
    rows = []
    several = len({layer.provider for layer in profile.layers}) > 1
    for number, layer in enumerate(profile.layers[:_SHOWN_LAYERS], 1):
        speed = _gflops(layer)
        rows.append(
            (
                Cell(f"{number} {_short(layer.name)}"),
                Cell(layer.op, layer.provider if several else ""),
                Cell(digits(layer.ms)),
                Cell(percent(layer.share)),
                Cell("" if layer.flops is None else digits(layer.flops / 1e6)),
                Cell("" if layer.bytes is None else digits(layer.bytes / 1e6)),
                Cell("" if speed is None else digits(speed)),
            )
        )
    head = columns(
        "<the slowest layers", "<operator", "ms", "share", "MFLOP", "MB moved", "GFLOP/s"
    )
    return Table(name=f"Slowest layers, {name}", columns=head, rows=tuple(rows))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _gflops(layer: LayerTime) -> float | None:
    if layer.flops is None or not finite(layer.ms):
        return None
    return layer.flops / layer.ms / 1e6


def _roofline(
    profile: LayerProfile, roof: Roofline | None, name: str, explain: bool
) -> list[Block]:
    points = drawable_layers(profile)
    if roof is None or not roof.peak_gflops:
        if not points:
            return []
        return [Note("Roofline: not available (the peaks of this machine were not measured)")]
    if not points:
        return [Note("Roofline: not available (no layer's operations can be told from shapes)")]
    drawn = sum(layer.share for _, layer in points)
    caption = f"{percent(drawn)} of the time is in layers that can be drawn."
    caption = f"{caption} {_explained(roof)}" if explain else caption
    return [*_disturbed(roof), Figure(roofline_chart(points, roof, title=name), caption)]


def roofline_chart(
    layers: Sequence[tuple[int, LayerTime]], roof: Roofline, *, title: str
) -> ScatterChart:
    """The roofs of a machine with layers below them (Williams et al., 2009), both axes logarithmic.

    Args:
        layers: with their numbers, the slowest first, as `drawable_layers` gives them.
        roof: peaks of the machine, at least one.
        title: what the layers are of.
    """
    wide = roof.bandwidth_gb_s.value
    points = []
    for at, (number, layer) in enumerate(layers):
        flops, moved = layer.flops or 0.0, layer.bytes or 1.0
        intensity, speed = flops / moved, flops / layer.ms / 1e6
        short = "/".join(layer.name.strip("/").split("/")[-2:])
        named = at < _NAMED
        points.append(
            ScatterPoint(
                name=f"{number} {short}" if named else "",
                short=str(number) if named else "",
                x=Interval(intensity, intensity, intensity),
                y=Interval(speed, speed, speed),
                radius=math.sqrt(min(1.0, layer.share)),
            )
        )
    peaks = [peak.value for _, peak in roof.peak_gflops]
    across = [*(point.x.value for point in points), *(peak / wide for peak in peaks)]
    up = [*(point.y.value for point in points), *peaks]
    disturbed = roof.interference is not None and roof.interference.disturbed
    return ScatterChart(
        title=f"Roofline of {title}{', disturbed' if disturbed else ''}",
        points=tuple(points),
        x_name="operations a byte (log)",
        y_name="10⁹ operations a second (log)",
        x_limits=(min(across) / 2, max(across) * 3),
        y_limits=(min(up) / 2, max(up) * 2),
        y_log=True,
        roofs=tuple((peak, f"{what} {digits(peak.value)}") for what, peak in roof.peak_gflops),
        slope=(wide, f"memory {digits(wide)} GB/s"),
        note="disturbed: may be too low" if disturbed else "",
        largest=(20.0, 14.0),
    )


def _disturbed(roof: Roofline) -> list[Note]:
    """A warning if the machine was disturbed while the peaks were measured."""
    found = roof.interference
    if found is None or not found.disturbed:
        return []
    reasons = "; ".join(found.reasons)
    words = f"DISTURBED while the peaks were measured: {reasons}. The roofs may be too low."
    return [Note(words, "miss")]


def _explained(roof: Roofline) -> str:
    peaks = "; ".join(f"{what} {with_interval(peak, 'GFLOP/s')}" for what, peak in roof.peak_gflops)
    return (
        "Each circle is a layer, its area its share of the time; numbers are those of the table. A "
        "layer on a roof cannot be faster here; one far below it can. Bytes are the least that "
        "must move, so caches can lift a layer above the slope. Peaks with "
        f"{roof.threads} threads: {peaks}; memory {with_interval(roof.bandwidth_gb_s, 'GB/s')}. "
        f"How they were measured: {roof.method.rstrip('.')}."
    )


def drawable_layers(profile: LayerProfile) -> list[tuple[int, LayerTime]]:
    """Layers with known operations and bytes, numbered as in the table, the slowest first."""
    return [
        (number, layer)
        for number, layer in enumerate(profile.layers, 1)
        if layer.flops is not None
        and layer.bytes is not None
        and finite(layer.flops)
        and finite(layer.bytes)
        and finite(layer.ms)
    ]
