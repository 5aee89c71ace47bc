"""The page of a data report: what is left out, the worst pictures and pairs, and the method."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.data.data_report import (
    EXACT,
    NEAR,
    CaptionAgreement,
    CaptionStatistics,
    Judgement,
    KeepRules,
)
from edgeclip.compress.data.picture_groups import Groups
from edgeclip.compress.data.picture_statistics import PictureStatistics
from edgeclip.compress.data.sources import Source
from edgeclip.profiles.report.charts import DistributionChart, distribution
from edgeclip.profiles.report.sections import (
    Alarm,
    Block,
    Card,
    Cell,
    Commands,
    Facts,
    FigureGrid,
    Heading,
    Note,
    Page,
    PageSummary,
    Pictures,
    Section,
    ShownPicture,
    Table,
    columns,
    count,
    section_of,
    sections,
)
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.console import digits, percent, percent_interval
from edgeclip.runtime.errors import InputError

_WORST = 8  # pictures of each kind
_PAIRS = 8  # of duplicates
_SIDE = 256  # px: no larger a picture is kept while the page is made
_GROUPS = 30  # rows that are shown at once
_REPEATED = 15
_CUT = 110  # characters of a caption


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedData:
    """All that a data report is about.

    Attributes:
        source: the pairs.
        side: pixels of a side that the teacher sees.
        statistics, captions, agreed: what was measured; captions and agreement may be None.
        judgement: what is left out, and why.
        rules: by which rules.
        threshold: the least cosine of near duplicates.
        threshold_from: where that comes from, in words.
        groups: None without any.
        command: what was typed.
        next_command: what to type next.
        teacher: its name.
    """

    source: Source
    side: int
    statistics: PictureStatistics
    captions: CaptionStatistics | None
    agreed: CaptionAgreement | None
    judgement: Judgement
    rules: KeepRules
    threshold: float
    threshold_from: str
    groups: Groups | None
    command: str
    next_command: str
    teacher: str


def write_data_report(data: ReportedData, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(data_report_page(data), path)


def data_report_page(data: ReportedData) -> Page:
    """The verdict, what is left out, duplicates, agreement, captions, pictures, and the method."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    captions = "no captions" if data.captions is None else f"{count(len(data.captions))} captions"
    return Page(
        title=f"Data: {data.source.name}",
        lead=(
            f"{count(len(data.statistics))} pictures, {captions}, as {data.teacher} sees them "
            f"({data.side} pixels a side).",
        ),
        summary=_summary(data),
        sections=sections(
            left_out_section(data),
            duplicates_section(data),
            agreement_section(data),
            captions_section(data),
            pictures_section(data),
            groups_section(data),
            method_section(data),
        ),
        footer=(f"Written by EdgeCLIP on {created}.",),
    )


def _summary(data: ReportedData) -> PageSummary:
    total, kept = len(data.statistics), len(data.judgement.kept)
    verdict = f"{count(kept)} of {count(total)} pictures are kept"
    return PageSummary(verdict, "", tuple(_alarms(data)), tuple(_cards(data)))


def _alarms(data: ReportedData) -> Iterable[Alarm]:
    statistics, near, total = data.statistics, data.judgement.near, len(data.statistics)
    bad = int((~statistics.readable).sum())
    if bad > 0.01 * total:
        yield Alarm(f"{count(bad)} pictures cannot be read, {percent(bad / total)} of all.", "miss")
    if data.agreed is not None and data.agreed.own_wins is not None and not data.agreed.is_known:
        yield Alarm(
            "The teacher hardly tells the captions of these pictures from those of others: of "
            f"{percent(data.agreed.own_wins.value)} the own caption fits better, where chance is "
            "50%. So its judgement of pairs leaves nothing out, and a student can learn little of "
            "these pairs from it.",
            "miss",
        )
    if data.captions is not None:
        cut = float((data.captions.tokens > data.captions.limit).mean())
        if cut > 0.01:
            yield Alarm(
                f"{percent(cut)} of the captions are longer than the {data.captions.limit} tokens "
                "that the teacher reads: their ends are cut off.",
                "",
            )
    small = float((statistics.short_side[statistics.readable] < data.side).mean())
    if small > 0.05:
        yield Alarm(
            f"{percent(small)} of the pictures are smaller than the {data.side} pixels a side that "
            "the teacher sees: they are scaled up.",
            "",
        )
    if not near.is_exact:
        yield Alarm(f"Not every two pictures were compared: {_not_compared(data)}", "")


def _cards(data: ReportedData) -> Iterable[Card]:
    total, judgement = len(data.statistics), data.judgement
    kept = len(judgement.kept)
    yield Card("Kept", percent(kept / total), f"{count(kept)} pictures", "on the list keep.txt")
    same, near = len(judgement.those(EXACT)), len(judgement.those(NEAR))
    yield Card(
        "Duplicates",
        percent((same + near) / total),
        f"{count(same)} the same, {count(near)} nearly the same",
        "one of each set is kept",
    )
    agreed = data.agreed
    if agreed is not None and agreed.own_wins is not None:
        yield Card(
            "Own caption fits better than another's",
            percent(agreed.own_wins.value),
            percent_interval(agreed.own_wins),
            "of the pictures, as the teacher sees it; chance is 50%",
        )


def left_out_section(data: ReportedData) -> Section | None:
    """How many pictures are left out for which reason."""
    total, judgement = len(data.statistics), data.judgement
    rows = [
        (Cell(name), Cell(count(number)), Cell(percent(number / total)))
        for name in judgement.reasons
        for number in [len(judgement.those(name))]
    ]
    kept = len(judgement.kept)
    rows.append(
        (
            Cell("kept", tone="strong"),
            Cell(count(kept), tone="strong"),
            Cell(percent(kept / total), tone="strong"),
        )
    )
    name = "What is left out"
    blocks: list[Block] = [
        Note("A picture that several reasons hold for is counted for the first of them."),
        Table(name=name, columns=columns("reason", "pictures", "share"), rows=tuple(rows)),
    ]
    if data.statistics.reasons:
        bad = int((~data.statistics.readable).sum())
        shown = len(data.statistics.reasons)
        more = f"; the first {shown} of {count(bad)}" if bad > shown else ""
        blocks.append(
            Table(
                name=f"Pictures that cannot be read{more}",
                columns=columns("number", "<reason"),
                rows=tuple(
                    (Cell(count(index)), Cell(reason))
                    for index, reason in sorted(data.statistics.reasons.items())
                ),
                folded=True,
            )
        )
    return section_of("left-out", name, blocks)


def duplicates_section(data: ReportedData) -> Section | None:
    """Pairs of near duplicates, the least alike first, and what was compared."""
    judgement = data.judgement
    near = judgement.those(NEAR)
    blocks: list[Block] = [
        Note(
            f"Two pictures are nearly the same from a cosine of {data.threshold:.4f} on between "
            f"the teacher's embeddings of them: {data.threshold_from}. Thumbnails of 16 by 16 "
            "pixels must look alike too, since a teacher finds pictures alike that it does not "
            f"know. {_not_compared(data)}"
        )
    ]
    cosine = judgement.near.cosine
    if len(near):
        sets = np.bincount(np.unique(judgement.same_as[near], return_inverse=True)[1]) + 1
        many = f"{count(len(sets))} sets" if len(sets) > 1 else "1 set"
        blocks += [
            Note(
                f"{many}, the largest of {count(int(sets.max()))} pictures. These are the pairs "
                "that are least alike: where they differ in what matters, give a higher "
                "--duplicate-cosine. The left one is kept."
            ),
            _shown(
                data,
                near[np.argsort(cosine[near], kind="stable")][:_PAIRS],
                lambda index: f"cosine {cosine[index]:.4f}",
                beside=judgement.same_as,
            ),
        ]
    return section_of("duplicates", "Nearly the same pictures", blocks)


def _not_compared(data: ReportedData) -> str:
    near = data.judgement.near
    if near.is_exact:
        return "Every two pictures were compared that nothing else leaves out."
    words = (
        f"{percent(near.compared)} of all pairs were compared, those of pictures in the same of "
        "about sqrt(N) cells around pictures drawn by chance, twice"
    )
    if near.found is None:
        return f"{words}; among some pictures that were compared with all, no duplicate was missed."
    return (
        f"{words}; so {percent(near.found.value)} of the duplicates were found "
        f"({percent_interval(near.found)}), by the count of some pictures that were compared with "
        "all."
    )


def agreement_section(data: ReportedData) -> Section | None:
    """How well pictures and captions agree, and the pairs that agree worst."""
    agreed = data.agreed
    if agreed is None or agreed.own_wins is None:
        return None
    deviations = data.rules.agreement_deviations
    floor = -np.inf if deviations is None else agreed.floor(deviations)
    marks = (("left out below", floor),) if np.isfinite(floor) and agreed.is_known else ()
    chart = distribution(
        "Agreement of pairs",
        agreed.own,
        "cosine of picture and caption",
        other=(agreed.other, "caption of another picture"),
        marks=marks,
    )
    words = (
        f"Of {percent(agreed.own_wins.value)} of the pictures "
        f"({percent_interval(agreed.own_wins)}) the own caption agrees better than that of another "
        "picture."
    )
    if marks:
        words += (
            f" Far below the rest is what lies {deviations:g} robust standard deviations below "
            "the median, and agrees no better than 95% of pairs drawn by chance."
        )
    order = _ends(agreed.own)[0]
    return section_of(
        "agreement",
        "Pictures and captions that agree",
        [
            Note(words),
            *_grid([chart]),
            Heading("The pairs that agree worst"),
            _shown(data, order, lambda index: f"cosine {agreed.own[index]:.3f}"),
        ],
    )


def captions_section(data: ReportedData) -> Section | None:
    """Lengths of captions, and those that many pictures have."""
    captions = data.captions
    if captions is None or not len(captions):
        return None
    number = np.bincount(captions.owner, minlength=len(data.statistics))
    charts = [
        distribution(
            "Length of captions",
            captions.tokens,
            "tokens, with start and end",
            marks=(("cut beyond", float(captions.limit)),)
            if captions.tokens.max() > captions.limit
            else (),
            whole=True,
        )
    ]
    if number.max() > 1:
        charts.append(distribution("Captions of a picture", number, "captions", whole=True))
    blocks = _grid(charts)
    repeated = captions.most_repeated(_REPEATED)
    if repeated:
        several = captions.repeated(len(data.statistics)) > 1
        first = np.searchsorted(captions.owner, captions.owner, side="left")
        rows = []
        for place, times in repeated:
            owner = int(captions.owner[place])
            text = data.source.captions(owner)[place - int(first[place])]
            rows.append((Cell(_cut(text)), Cell(count(times))))
        blocks += [
            Heading("Captions of several pictures"),
            Note(
                f"{percent(float(several.mean()))} of the pictures share a caption with another, "
                "case and spaces aside."
            ),
            Table(
                name="Captions of several pictures",
                columns=columns("<caption", "pictures"),
                rows=tuple(rows),
            ),
        ]
    without = int((number == 0).sum())
    if without:
        blocks.append(Note(f"{count(without)} pictures have no caption."))
    return section_of("captions", "Captions", blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """Something that was measured of every picture.

    Attributes:
        name, unit: of the chart.
        values: float32 [N].
        least, most: what is asked for.
        lowest, highest: headings of the pictures that have least and most of it; "" for none.
        form: how a value is written.
        is_share: whether it lies between fixed ends, so that its axis is never logarithmic.
    """

    name: str
    unit: str
    values: NDArray[np.float32]
    least: float | None = None
    most: float | None = None
    lowest: str = ""
    highest: str = ""
    form: Callable[[float], str] = digits
    is_share: bool = False

    def chart(self) -> DistributionChart | None:
        """How often each value was seen."""
        bounds = (("at least", self.least), ("at most", self.most))
        marks = tuple((word, float(bound)) for word, bound in bounds if bound is not None)
        log = False if self.is_share else None
        return distribution(self.name, self.values, self.unit, marks=marks, log=log)

    def figure(self, index: int) -> str:
        """The value of a picture."""
        return self.form(float(self.values[index]))


def pictures_section(data: ReportedData) -> Section | None:
    """How pictures are distributed, and the worst of each measure."""
    if not data.statistics.readable.any():
        return None
    measures = _measures(data)
    blocks: list[Block] = _grid([measure.chart() for measure in measures])
    for measure in measures:
        if np.nanmin(measure.values) == np.nanmax(measure.values):
            continue  # none is worse than others
        for heading, order in zip(
            (measure.lowest, measure.highest), _ends(measure.values), strict=True
        ):
            if heading:
                blocks += [Heading(heading), _shown(data, order, measure.figure)]
    return section_of("pictures", "Pictures", blocks)


def _measures(data: ReportedData) -> tuple[_Measure, ...]:
    statistics, rules = data.statistics, data.rules
    some_small = bool((statistics.short_side < data.side).any())
    return (
        _Measure(
            name="Sharpness",
            unit="variance of the Laplacian",
            values=statistics.sharpness,
            least=rules.min_sharpness,
            lowest="The least sharp",
        ),
        _Measure(
            name="Brightness",
            unit="mean level, 0 to 1",
            values=statistics.brightness,
            least=rules.min_brightness,
            most=rules.max_brightness,
            lowest="The darkest",
            highest="The brightest",
            is_share=True,
        ),
        _Measure(
            name="Contrast",
            unit="RMS contrast, 0 to 0.5",
            values=statistics.contrast,
            least=rules.min_contrast,
            lowest="The least contrast",
            is_share=True,
        ),
        _Measure(
            name="Noise",
            unit="levels of 255",
            values=statistics.noise,
            most=rules.max_noise,
            highest="The noisiest",
        ),
        _Measure(
            name="Shorter side",
            unit="pixels",
            values=statistics.short_side,
            least=rules.min_side,
            lowest="The smallest" if some_small else "",
            form=lambda value: f"{value:.0f} px",
        ),
        _Measure(
            name="Shape",
            unit="longer side over shorter",
            values=statistics.long_side / statistics.short_side,
            most=rules.max_aspect,
            highest="The longest",
            form=lambda value: f"{value:.1f} : 1",
        ),
    )


def groups_section(data: ReportedData) -> Section | None:
    """What is left out of each group, and the medians of what was measured."""
    groups = data.groups
    if groups is None:
        return None
    statistics, judgement, agreed = data.statistics, data.judgement, data.agreed
    kept = judgement.reason < 0
    copies = judgement.same_as != np.arange(len(statistics))
    order = np.argsort(groups.number, kind="stable")
    found = np.unique(groups.number[order], return_index=True)
    rows = []
    for number, members in zip(found[0], np.split(order, found[1][1:]), strict=True):
        name = "none" if number < 0 else groups.names[number]
        cells = [
            Cell(_cut(name)),
            Cell(count(len(members))),
            Cell(percent(float(kept[members].mean()))),
            Cell(percent(float(copies[members].mean()))),
        ]
        measured = [statistics.sharpness, statistics.brightness, statistics.contrast]
        measured += [statistics.noise, statistics.short_side]
        measured += [] if agreed is None else [agreed.own]
        cells += [Cell(_median(values[members])) for values in measured]
        rows.append((len(members), tuple(cells)))
    rows.sort(key=lambda row: -row[0])
    names = [groups.column, "pictures", "kept", "duplicates", "sharpness", "brightness"]
    names += ["contrast", "noise", "shorter side", *(() if agreed is None else ("agreement",))]

    def table(some: Sequence[tuple[int, tuple[Cell, ...]]], name: str, folded: bool) -> Table:
        cells = tuple(row for _, row in some)
        return Table(name=name, columns=columns(*names), rows=cells, folded=folded)

    blocks: list[Block] = [
        Note("Medians of each group, the largest first."),
        table(rows[:_GROUPS], f"Groups by {groups.column}", False),
    ]
    if len(rows) > _GROUPS:
        blocks.append(table(rows[_GROUPS:], f"{len(rows) - _GROUPS} smaller groups", True))
    return section_of("groups", f"Groups by {groups.column}", blocks)


def method_section(data: ReportedData) -> Section | None:
    """How everything was measured, and the commands."""
    return section_of(
        "method",
        "How it was measured",
        [
            Facts(
                (
                    (
                        "Pixels",
                        "All but the sides of the file is measured on the luminance of what the "
                        f"teacher sees, {data.side} by {data.side} pixels.",
                    ),
                    ("Sharpness", "Variance of the Laplacian (Pech-Pacheco et al. 2000)."),
                    ("Contrast", "RMS contrast, the standard deviation of levels (Peli 1990)."),
                    ("Noise", "Immerkaer 1996; fine texture counts as noise."),
                    (
                        "Agreement",
                        "Cosine of the teacher's embeddings of a picture and of the caption that "
                        "fits it best (CLIPScore, Hessel et al. 2021, unscaled).",
                    ),
                    (
                        "Far below the rest",
                        "By the modified z-score of Iglewicz and Hoaglin (1993): the distance from "
                        "the median over the median absolute deviation.",
                    ),
                    (
                        "Duplicates",
                        "A picture is left out if one that is kept is nearly the same, so chains "
                        "of small changes join nothing. The largest file is kept, of equal ones "
                        "the sharpest.",
                    ),
                )
            ),
            Heading("Again, and next"),
            Commands((data.command, data.next_command)),
        ],
    )


def _grid(charts: Sequence[DistributionChart | None]) -> list[Block]:
    found = tuple(chart for chart in charts if chart is not None)
    return [FigureGrid(found)] if found else []


def _ends(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pictures with the least and with the largest values, the worst first."""
    known = np.flatnonzero(~np.isnan(values))
    most = min(_WORST, len(known))
    if not most:
        return known, known
    found = []
    for sign in (1.0, -1.0):
        some = known[np.argpartition(sign * values[known], most - 1)[:most]]
        found.append(some[np.argsort(sign * values[some], kind="stable")])
    return found[0], found[1]


def _shown(
    data: ReportedData,
    indices: NDArray[np.int64],
    figure: Callable[[int], str],
    *,
    beside: NDArray[np.int64] | None = None,
) -> Pictures:
    """Pictures with a figure each, and their captions."""
    entries = []
    for index in indices.tolist():
        picture = _small(data.source, index)
        other = None if beside is None else _small(data.source, int(beside[index]))
        if picture is not None and (beside is None or other is not None):
            text = _cut(next(iter(data.source.captions(index)), ""))
            entries.append(
                ShownPicture(picture=picture, figure=figure(index), text=text, beside=other)
            )
    return Pictures(tuple(entries))


def _small(source: Source, index: int) -> Image.Image | None:
    """A picture no larger than the page shows it; None if it cannot be read any more."""
    try:
        image = source[index].image.copy()
    except InputError:
        return None
    image.thumbnail((_SIDE, _SIDE))
    return image


def _cut(text: str) -> str:
    return textwrap.shorten(text, _CUT, placeholder=" …")


def _median(values: NDArray[np.float32]) -> str:
    known = values[~np.isnan(values)]
    return digits(float(np.median(known))) if len(known) else ""
