"""The table and the page of a scaling experiment."""

from pathlib import Path

from edgeclip.compress.experiments.scaling import Scaling
from edgeclip.profiles.report.charts import ScatterChart, ScatterPoint
from edgeclip.profiles.report.sections import (
    Cell,
    Figure,
    Note,
    Page,
    PageSummary,
    Table,
    Tone,
    columns,
    count,
    method_section,
    section_of,
    sections,
)
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime import console
from edgeclip.runtime.console import digits, percent, percent_interval, seconds
from edgeclip.runtime.stats.interval import Interval

_CAPTION = "Blue: the sizes that were trained, with 95% intervals over the seeds. Grey: the law."
_METHOD = (
    "The law is lost = a + b (N / N0)^-c, for the lost share of the teacher's R@1 at N parameters. "
    "Intervals are of 95%, over the seeds, whose spread is pooled over the sizes; the pairs are "
    "taken as given. The law is refused where the sizes lie further from it than the seeds "
    "explain, with 5% for a law that is right. An answer meets the bar with 95%."
)


def scaling_text(table: Scaling) -> str:
    """The table and the answer as text."""
    head = ("size", "parameters", "of teacher", "kept", "by the law", "time", "meets")
    body = [
        (
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            percent(row.share),
            f"{percent(row.kept.value)} [{percent_interval(row.kept)}]",
            "" if row.law is None else f"{percent(row.law.value)} [{percent_interval(row.law)}]",
            seconds(row.seconds),
            "yes" if row.meets else "",
        )
        for row in table.rows
    ]
    return "\n".join(
        [
            f"{table.recipe}: {table.seeds} seeds, {table.pairs} test pairs, teacher "
            f"{table.teacher_parameters / 1e6:.2f} M, R@1 {percent(table.teacher_r1)}",
            console.columns([head, *body]),
            _law_words(table),
            *answer_lines(table),
        ]
    )


def _law_words(table: Scaling) -> str:
    if not table.fits:
        return (
            "the law does not fit: the sizes lie further from it than their seeds explain "
            f"(p = {table.fit_chance:.3g}), so nothing is said of other sizes"
        )
    numbers = ", ".join(
        f"{name} = {digits(item.value)} [{digits(item.low)} to {digits(item.high)}]"
        for name, item in (("a", table.a), ("b", table.b), ("c", table.c))
    )
    return (
        f"lost = a + b (N / {table.n0 / 1e6:.3g} M)^-c: {numbers}; lack of fit p = "
        f"{table.fit_chance:.2f}"
    )


def answer_lines(table: Scaling) -> tuple[str, ...]:
    """Which size meets the bar: of those trained, and by the law."""
    bar = percent(table.bar)
    trained = (
        f"no size that was trained surely keeps {bar}"
        if table.smallest_trained is None
        else f"the smallest that was trained and surely keeps {bar}: {table.smallest_trained}"
    )
    if table.answer is None:
        return (trained,)
    found = table.answer
    if found.parameters is None:
        law = f"by the law no size up to twice the largest surely keeps {bar}; beyond is not said"
    else:
        law = f"by the law {found.parameters / 1e6:.2f} M parameters keep {bar} (95%)"
    if found.where in ("beyond", "below"):
        law += f": EXTRAPOLATED, {found.where} all sizes that were trained"
    return trained, law


def write_scaling_page(table: Scaling, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(scaling_page(table), path)


def scaling_page(table: Scaling) -> Page:
    """The sizes and the law as a picture and a table, the answer, and the method."""
    trained, *by_law = answer_lines(table)
    tone: Tone = "" if table.fits else "miss"
    notes = [Note(_law_words(table), tone), Note(trained), *map(Note, by_law)]
    return Page(
        title=f"Kept quality by size: {table.recipe}",
        lead=(
            f"{len(table.rows)} sizes, {table.seeds} seeds each, {count(table.pairs)} test pairs.",
        ),
        summary=PageSummary(by_law[0] if by_law else trained, tone),
        sections=sections(
            section_of("sizes", "Sizes", (Figure(_chart(table), _CAPTION), _table(table), *notes)),
            method_section(_METHOD, table.machine, table.command),
        ),
    )


def _chart(table: Scaling) -> ScatterChart:
    trained = [
        ScatterPoint(
            name=f"{row.parameters / 1e6:.2f} M", x=_exact(row.parameters / 1e6), y=row.kept
        )
        for row in table.rows
    ]
    law = [
        ScatterPoint(name="", x=_exact(at / 1e6), y=_exact(kept.value), colour="muted")
        for at, kept in table.curve
    ]
    return ScatterChart(
        title="Kept share of the teacher's R@1 by number of parameters",
        points=(*trained, *law),
        x_name="parameters, millions (log)",
        y_name="kept share of the teacher's R@1",
        y_percent=True,
        front=tuple(range(len(trained), len(trained) + len(law))),
        bar=(table.bar, f"bar {percent(table.bar)}"),
    )


def _exact(value: float) -> Interval:
    return Interval(value, value, value)


def _table(table: Scaling) -> Table:
    names = ("<size", "parameters", "of teacher", "kept", "by the law", "training", "<meets")
    return Table(
        name="Sizes",
        columns=columns(*names),
        rows=tuple(
            (
                Cell(row.name),
                Cell(f"{row.parameters / 1e6:.2f} M"),
                Cell(percent(row.share)),
                Cell(percent(row.kept.value), percent_interval(row.kept)),
                Cell("")
                if row.law is None
                else Cell(percent(row.law.value), percent_interval(row.law)),
                Cell(seconds(row.seconds)),
                Cell("yes", tone="pass") if row.meets else Cell("not surely"),
            )
            for row in table.rows
        ),
    )
