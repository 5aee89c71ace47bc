"""The table and the page of an ablation."""

from collections.abc import Sequence
from pathlib import Path

from edgeclip.compress.experiments.ablate import CHOSEN, Ablation, AblationRow
from edgeclip.compress.experiments.trials import CHOOSE, JUDGE
from edgeclip.profiles.report.charts import Dot, DotRow, RowChart
from edgeclip.profiles.report.sections import (
    Cell,
    Figure,
    Note,
    Page,
    PageSummary,
    Section,
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
from edgeclip.runtime.console import interval_ends, percent, percent_interval, seconds
from edgeclip.runtime.stats.interval import Interval

_TONES: dict[str | None, Tone] = {
    "better": "pass",
    "worse": "miss",
    "undecided": "",
    None: "strong",
}
_COLUMNS = (
    "<recipe",
    "R@1",
    "kept of teacher",
    "cosine, image",
    "cosine, text",
    "training",
    "difference",
    "over pairs",
    "<verdict",
)
_METHOD = (
    "The difference is R@1 (mean of both directions) less that of the base in points, with a 95% "
    "interval over the seeds (paired, Student's t). The interval over pairs is of the students as "
    "they are. A change is better or worse if both intervals say so at a level that holds over all "
    "changes together (Holm, 95%); the intervals shown are those of each change alone. Steps and "
    "times are of the whole training, with the steps in which a map of the teacher's weights is "
    "learned; times are of one machine that may have done other work."
)


def ablation_text(table: Ablation) -> str:
    """The table as text."""
    parts = [
        f"{table.recipe}: {table.seeds} seeds, judged on {table.pairs[0]} {CHOOSE} pairs "
        f"(teacher R@1 {percent(table.teacher_r1[0])})",
        _text_rows(table.rows),
        "difference: points of R@1 to the base, [95% over seeds] [95% over pairs]; verdicts hold "
        "over all changes together (Holm)",
    ]
    parts += [f"left out: {line}" for line in table.left_out]
    if table.judged:
        parts += [
            f"\nchosen: {', '.join(table.chosen)}; judged on {table.pairs[1]} other pairs "
            f"({JUDGE}, teacher R@1 {percent(table.teacher_r1[1])})",
            _text_rows(table.judged),
        ]
    else:
        parts.append("nothing was surely better than the base")
    return "\n".join(parts)


def _text_rows(rows: Sequence[AblationRow]) -> str:
    head = ("recipe", "R@1", "kept", "cosine", "steps", "time", "difference", "verdict")
    body = [
        (
            row.name,
            percent(row.r1.value),
            f"{percent(row.kept.value)} [{percent_interval(row.kept)}]",
            f"{row.image_cosine:.3f} {row.text_cosine:.3f}",
            count(row.steps),
            seconds(row.seconds),
            _points(row.difference, row.over_pairs),
            row.verdict or "",
        )
        for row in rows
    ]
    return console.columns([head, *body])


def _points(difference: Interval | None, over_pairs: Interval | None) -> str:
    if difference is None or over_pairs is None:
        return ""
    ends = " ".join(f"[{_span(item)}]" for item in (difference, over_pairs))
    return f"{100 * difference.value:+.2f} {ends}"


def _span(item: Interval) -> str:
    return interval_ends(item, lambda end: f"{100 * end:+.2f}")


def write_ablation_page(table: Ablation, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(ablation_page(table), path)


def ablation_page(table: Ablation) -> Page:
    """What each change buys, what was chosen and how that was judged, and the method."""
    better = sum(row.verdict == "better" for row in table.rows)
    worse = sum(row.verdict == "worse" for row in table.rows)
    tried = len(table.rows) - 1
    left_out = [Note(f"Left out: {line}") for line in table.left_out]
    return Page(
        title=f"What each setting of {table.recipe} buys",
        lead=(
            f"{count(tried)} changes, one at a time, {table.seeds} seeds each, on "
            f"{count(table.pairs[0])} pairs that no student was trained on.",
        ),
        summary=PageSummary(
            f"{better} better, {worse} worse, {tried - better - worse} undecided", ""
        ),
        sections=sections(
            section_of(
                "changes",
                "Changes",
                (
                    Figure(_chart(table.rows), "Whiskers are 95% intervals over the seeds."),
                    _table("Changes", table.rows),
                    *left_out,
                ),
            ),
            _chosen(table),
            method_section(_METHOD, table.machine, table.command),
        ),
    )


def _chosen(table: Ablation) -> Section | None:
    if not table.judged:
        return section_of("chosen", "Chosen", (Note("Nothing was surely better than the base."),))
    note = Note(
        f"All changes that were better, the best of each setting: {', '.join(table.chosen)}. "
        f"Judged on {count(table.pairs[1])} pairs that had no part in the choice."
    )
    return section_of("chosen", "Chosen", (note, _table(CHOSEN, table.judged)))


def _chart(rows: Sequence[AblationRow]) -> RowChart:
    shown = [row for row in rows if row.difference is not None]
    shown.sort(key=lambda row: -row.difference.value if row.difference else 0.0)
    return RowChart(
        rows=tuple(
            DotRow(
                row.name,
                (Dot(row.difference.scaled(100)),),
                f"{100 * row.difference.value:+.2f}, {row.verdict}",
            )
            for row in shown
            if row.difference is not None
        ),
        axis_name="points of R@1, less the base",
        title="Difference of each change to the base",
        reference=(0.0, "the base"),
        log=False,
    )


def _table(name: str, rows: Sequence[AblationRow]) -> Table:
    return Table(
        name=name,
        columns=columns(*_COLUMNS),
        rows=tuple(
            (
                Cell(row.name),
                Cell(percent(row.r1.value), f"{percent(row.image_r1)}, {percent(row.text_r1)}"),
                Cell(percent(row.kept.value), percent_interval(row.kept)),
                Cell(f"{row.image_cosine:.3f}"),
                Cell(f"{row.text_cosine:.3f}"),
                Cell(seconds(row.seconds), f"{count(row.steps)} steps"),
                _difference(row.difference),
                _difference(row.over_pairs),
                Cell(row.verdict or "base", tone=_TONES[row.verdict]),
            )
            for row in rows
        ),
    )


def _difference(item: Interval | None) -> Cell:
    return Cell("") if item is None else Cell(f"{100 * item.value:+.2f}", _span(item))
