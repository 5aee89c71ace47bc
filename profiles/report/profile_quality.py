"""Quality beside latency: from the gates of a bundle's manifest to the Pareto pictures."""

import math
from collections.abc import Sequence
from typing import get_args

from edgeclip.profiles.record.measurement import Part
from edgeclip.profiles.report.charts import ScatterChart, ScatterPoint, frontier
from edgeclip.profiles.report.drawing import bounds
from edgeclip.profiles.report.profile_data import (
    PART_NAMES,
    QualityUnit,
    Subject,
    SubjectQuality,
    by_part,
)
from edgeclip.profiles.report.sections import (
    Block,
    Cell,
    Figure,
    Heading,
    Note,
    Section,
    Table,
    columns,
)
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import digits, interval_ends, megabytes, percent
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

_LOSS = "R@1 loss "
_COSINES = ("mean cosine", "1st-percentile cosine")
_ENDS = {"share": (0.0, 1.0), "cosine": (-1.0, 1.0), "points": (-math.inf, math.inf)}
_LEAST_RANGE = {"share": 0.02, "cosine": 1e-6, "points": 0.2}  # that the axis shows
_FEWEST = 2  # points below which there is nothing to weigh


def quality_of_bundle(bundle: Bundle) -> tuple[SubjectQuality, ...]:
    """Read quality figures from a bundle's gates: R@1 against fp32, and cosines of each tower.

    Figures fit measurements of this very bundle only, told by the hash of its manifest.
    """
    sha256 = bundle.sha256
    found = []
    for gate in bundle.manifest.gates:
        name = gate.name.removeprefix(_LOSS)
        precision = next((p for p in get_args(Precision) if p == name), None)
        if gate.name.startswith(_LOSS) and precision is not None and gate.unit == "points":
            lost = Interval(-gate.value, -gate.high, -gate.low)
            found.append(_quality("R@1 against fp32", lost, "points", sha256, precision, None))
    if found and any("fp32" in tower.precisions for tower in bundle.manifest.towers):
        same = Interval(0.0, 0.0, 0.0)
        found.insert(0, _quality("R@1 against fp32", same, "points", sha256, "fp32", None))
    for tower in bundle.manifest.towers:
        for file in tower.files:
            for gate in file.gates:
                if gate.name in _COSINES and gate.unit == "cosine":
                    name, value = f"{gate.name} to torch", gate.interval
                    found.append(
                        _quality(name, value, "cosine", sha256, file.precision, tower.tower)
                    )
    return tuple(found)


def _quality(
    metric: str,
    value: Interval,
    unit: QualityUnit,
    sha256: str,
    precision: Precision,
    part: Part | None,
) -> SubjectQuality:
    return SubjectQuality(
        metric=metric, value=value, unit=unit, sha256=sha256, precision=precision, part=part
    )


def quality_of(subject: Subject, quality: Sequence[SubjectQuality]) -> list[SubjectQuality]:
    """The figures that are of this subject."""
    item = subject.item
    identity = item.identity
    return [
        one
        for one in quality
        if (one.subject is None or one.subject == item.name)
        and (one.part is None or one.part == item.part)
        and (one.sha256 is None or (identity is not None and identity.sha256 == one.sha256))
        and (
            one.precision is None or (identity is not None and identity.precision == one.precision)
        )
    ]


def quality_text(value: float, unit: QualityUnit) -> str:
    """A quality as printed: 92.1%, 0.99994, -0.05 points."""
    if unit == "share":
        return percent(value)
    if unit == "cosine":
        return f"{value:.5f}"
    rounded = round(value, 2)
    return f"{rounded:+.2f} points" if rounded else "0 points"


def quality_span(one: SubjectQuality) -> str:
    """The interval, in points without the word: "-0.10 to +0.20"; empty for a reference."""
    value = one.value
    if value.low == value.high:
        return ""
    return interval_ends(value, lambda end: quality_text(end, one.unit).removesuffix(" points"))


def quality_section(
    subjects: Sequence[Subject], quality: Sequence[SubjectQuality]
) -> Section | None:
    """A picture for each part with quality figures, and a table of all of them."""
    matched = {subject: found for subject in subjects if (found := quality_of(subject, quality))}
    if not matched:
        if not quality:
            return None
        words = (
            "Not available: none of the measurements is of a bundle that was given; its manifest "
            "has another hash."
        )
        return Section(anchor="quality", title="Quality against latency", blocks=(Note(words),))
    blocks: list[Block] = []
    runs = dict.fromkeys(subject.source.name for subject in matched)
    for part, group in by_part(matched).items():
        for run in runs:
            pairs = _weighed([s for s in group if s.source.name == run], matched)
            if pairs:
                name = PART_NAMES[part] if len(runs) == 1 else f"{PART_NAMES[part]} · {run}"
                caption = "" if blocks else _CAPTION
                blocks += [Heading(name), Figure(_tradeoff(pairs), caption)]
    return Section(
        anchor="quality",
        title="Quality against latency",
        blocks=(*blocks, _table(matched, bool(blocks))),
    )


def _weighed(
    subjects: Sequence[Subject], matched: dict[Subject, list[SubjectQuality]]
) -> list[tuple[Subject, SubjectQuality]]:
    """Subjects with the first metric that at least two of them have."""
    for metric in dict.fromkeys(one.metric for subject in subjects for one in matched[subject]):
        pairs = [(s, one) for s in subjects for one in matched[s] if one.metric == metric]
        pairs = [pair for pair in pairs if pair[0].item.latency.p50_ms.value > 0]
        if len(pairs) >= _FEWEST:
            return pairs
    return []


def _tradeoff(pairs: Sequence[tuple[Subject, SubjectQuality]]) -> ScatterChart:
    metric, unit = pairs[0][1].metric, pairs[0][1].unit
    sizes = [0 if s.item.identity is None else s.item.identity.bytes_on_disk for s, _ in pairs]
    points = [
        _point(subject, one, size / max(1, *sizes))
        for (subject, one), size in zip(pairs, sizes, strict=True)
    ]
    return tradeoff_chart(
        points,
        quality_name=f"{metric}, points" if unit == "points" else metric,
        unit=unit,
        latency_name="p50 at batch 1",
    )


def tradeoff_chart(
    points: Sequence[ScatterPoint],
    *,
    quality_name: str,
    unit: QualityUnit,
    latency_name: str,
    bar: float | None = None,
) -> ScatterChart:
    """Quality against latency: a thin line joins the points that no other beats in both.

    Args:
        points: their radii are the roots of the shares of bytes, so that areas are bytes.
        quality_name, latency_name: names of the axes.
        unit: unit of the quality.
        bar: a share of quality to reach.
    """
    low, high = bounds(point.x for point in points)
    room = max((high / low) ** 0.12, 1.15)  # so that the circles stay inside
    seen = [point.y for point in points]
    seen += [] if bar is None else [Interval(bar, bar, bar)]
    worst, best = bounds(seen)
    least = _LEAST_RANGE[unit]
    if best - worst < least:
        worst, best = worst - least / 2, best + least / 2
    above = (best - worst) * 0.15
    ends = _ENDS[unit]
    return ScatterChart(
        title=f"{quality_name} against {latency_name}",
        points=tuple(points),
        x_name=f"{latency_name}, ms (log), lower is better",
        y_name=f"{quality_name}, higher is better",
        x_limits=(low / room, high * room),
        y_limits=(
            max(worst - above, min(worst, ends[0]) - above / 2),
            min(best + above, max(best, ends[1]) + above / 2),
        ),
        y_percent=unit == "share",
        front=frontier(points),
        bar=None if bar is None else (bar, f"bar {percent(bar)}"),
    )


_CAPTION = (
    "The area of a circle is what must be stored, its centre the measured point, the whiskers "
    "95% intervals. The thin line joins what nothing else beats in both. R@1 is of both towers "
    "in that precision; a cosine is of this tower alone."
)


def _point(subject: Subject, one: SubjectQuality, share: float) -> ScatterPoint:
    item = subject.item
    ms = item.latency.p50_ms
    facts = [f"{digits(ms.value)} ms"]
    facts += [] if item.identity is None else [megabytes(item.identity.bytes_on_disk)]
    if item.energy is not None:
        facts.append(f"{digits(1e3 * item.energy.joules.value)} mJ")
    return ScatterPoint(
        name=item.name, x=ms, y=one.value, facts=tuple(facts), radius=math.sqrt(share)
    )


def _table(matched: dict[Subject, list[SubjectQuality]], folded: bool) -> Table:
    rows = []
    for subject, found in matched.items():
        for one in found:
            rows.append(
                (
                    Cell(subject.label),
                    Cell(PART_NAMES[subject.item.part]),
                    Cell(one.metric),
                    Cell(quality_text(one.value.value, one.unit), quality_span(one)),
                )
            )
    head = columns("<subject", "<part", "<metric", "value")
    return Table(name="Quality in numbers", columns=head, rows=tuple(rows), folded=folded)
