"""How much the processes of a run differ, with and without the yardstick, as a section."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.profiles.record.measurement import Yardstick
from edgeclip.profiles.report.chart_rows import Dot, Row, RowChart, row_picture
from edgeclip.profiles.report.profile_blocks import (
    Block,
    Cell,
    Figure,
    Heading,
    Note,
    Section,
    Table,
    columns,
)
from edgeclip.profiles.report.profile_data import (
    PART_NAMES,
    NamedRun,
    Subject,
    full_name,
)
from edgeclip.runtime.console import digits, percent
from edgeclip.runtime.quality.intervals import Interval

Samples = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Medians of the processes in ms, and by how much the largest exceeds the smallest."""

    medians: tuple[float, ...]
    plain: float
    by_yardstick: float | None


def process_medians(samples: Samples) -> tuple[float, ...]:
    """The median of each process that has runs."""
    return tuple(float(np.median(runs)) for runs in samples if runs)


def spread_of(samples: Samples, yardstick: Yardstick | None) -> Spread | None:
    """The spread between processes; None where fewer than two ran.

    Divided by the yardstick's median of the same process, the spread loses what the machine
    as a whole did, and keeps what is the subject's own.
    """
    medians = process_medians(samples)
    if len(medians) < 2 or min(medians) <= 0:
        return None
    scaled = None
    if yardstick is not None:
        theirs = process_medians(yardstick.samples_ms)
        if len(theirs) == len(medians) and min(theirs) > 0:
            scaled = _range([ours / other for ours, other in zip(medians, theirs, strict=True)])
    return Spread(medians, _range(medians), scaled)


def _range(values: Sequence[float]) -> float:
    return max(values) / min(values) - 1


def spread_section(runs: Sequence[NamedRun], subjects: Sequence[Subject]) -> Section | None:
    """Per-process medians of every subject and of the yardstick of each run."""
    found = {
        subject: spread
        for subject in subjects
        if (spread := spread_of(subject.item.samples_ms, subject.source.run.yardstick)) is not None
    }
    sticks = _yardsticks(runs)
    if not found and not sticks:
        return None
    blocks: list[Block] = [] if found else [Note(_ONE_PROCESS)]
    if found:
        blocks += [Figure(picture=_picture(found, sticks), caption=_CAPTION), _table(found)]
    if len(sticks) > 1:
        blocks += [Heading("The yardstick of each run"), Note(_YARDSTICK), _stick_table(sticks)]
    return Section(anchor="spread", title="From process to process", blocks=tuple(blocks))


_ONE_PROCESS = (
    "Each subject ran in one process only: how much processes differ is not known, and the "
    "intervals are too narrow for that."
)
_CAPTION = (
    "Each dot is the median of one fresh process, as a share of the middle one. Where processes "
    "differ more than the runs of one, how memory came to lie decides, and no number of runs in "
    "one process can tell. The yardstick is a small fixed graph that takes turns with the "
    "subjects: what it shows is the machine's own."
)
_YARDSTICK = "Where the yardstick is slower in one run than in another, so was the machine."


def _picture(found: dict[Subject, Spread], sticks: Sequence[tuple[NamedRun, Yardstick]]) -> str:
    rows = [_row(full_name(subject), spread) for subject, spread in found.items()]
    for source, stick in sticks:
        spread = spread_of(stick.samples_ms, None)
        if spread is not None:
            name = "yardstick" if len(sticks) == 1 else f"yardstick · {source.name}"
            rows.append(_row(name, spread))
    chart = RowChart(
        rows=tuple(rows),
        axis_name="median of a process, percent of the middle one",
        label="Medians of the processes",
        log=False,
        apart=False,
    )
    return row_picture(chart)


def _row(label: str, spread: Spread) -> Row:
    middle = float(np.median(spread.medians))
    shares = [100 * ms / middle for ms in spread.medians]
    dots = tuple(
        Dot(Interval(share, share, share), name=f"process {number}, percent")
        for number, share in enumerate(shares, 1)
    )
    return Row(label=label, dots=dots, figure=f"spread {percent(spread.plain)}")


def _table(found: dict[Subject, Spread]) -> Table:
    rows = tuple(
        (
            Cell(subject.label),
            Cell(PART_NAMES[subject.item.part]),
            Cell(", ".join(digits(ms) for ms in spread.medians)),
            Cell(percent(spread.plain)),
            Cell("no yardstick" if spread.by_yardstick is None else percent(spread.by_yardstick)),
        )
        for subject, spread in found.items()
    )
    head = columns("<subject", "<part", "<medians, ms", "spread", "spread by the yardstick")
    return Table(name="Spread between processes in numbers", columns=head, rows=rows, folded=True)


def _yardsticks(runs: Sequence[NamedRun]) -> list[tuple[NamedRun, Yardstick]]:
    return [
        (source, source.run.yardstick)
        for source in runs
        if source.run.yardstick is not None and any(source.run.yardstick.samples_ms)
    ]


def _stick_table(sticks: Sequence[tuple[NamedRun, Yardstick]]) -> Table:
    first = float(np.median(process_medians(sticks[0][1].samples_ms)))
    rows = []
    for source, stick in sticks:
        medians = process_medians(stick.samples_ms)
        middle = float(np.median(medians))
        same = stick.name == sticks[0][1].name
        rows.append(
            (
                Cell(source.name),
                Cell(stick.name),
                Cell(digits(middle), f"{digits(min(medians))} to {digits(max(medians))}"),
                Cell(f"{middle / first:.3f}" if same else "another yardstick"),
            )
        )
    head = columns("<run", "<yardstick", "median ms", f"of {sticks[0][0].name}")
    return Table(name="The yardstick of each run", columns=head, rows=tuple(rows))
