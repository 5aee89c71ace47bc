"""Print a comparison of two profiles: text for a terminal, Markdown for a pull request."""

from collections.abc import Sequence
from math import ceil, floor

from edgeclip.profiles.compare.compare_runs import Comparison, RatioEstimate, SetupAspect
from edgeclip.profiles.compare.regression_gate import GateVerdict, SubjectVerdict
from edgeclip.runtime.console import columns, digits

_HEADER = (
    "subject",
    "baseline ms",
    "now ms",
    "now / baseline",
    "95% interval",
    "fastest runs",
    "plain times",
)
_MARKS = {"passed": "✅ passed", "regressed": "❌ regressed", "undecided": "⚠️ undecided"}
# Aspects that are the same for all subjects of a run.
_OF_ALL: tuple[SetupAspect, ...] = ("machine", "system", "packages", "workload")
_RUN_NAMES = {"now": "run", "baseline": "baseline"}


def comparison_text(comparisons: Sequence[Comparison], verdict: GateVerdict | None = None) -> str:
    """Format columns for a terminal, then the differences of the runs, then the verdict."""
    rows = [_HEADER, *map(_row, comparisons)]
    if verdict is not None:
        words = ("verdict", *(item.outcome for item in verdict.judged))
        rows = [(*row, word) for row, word in zip(rows, words, strict=True)]
    parts = [columns(rows), *_notes(comparisons)]
    if verdict is not None:
        parts += [*_judgements(verdict), summary(verdict)]
    return "\n".join(parts)


def comparison_markdown(
    comparisons: Sequence[Comparison], verdict: GateVerdict | None = None
) -> str:
    """Format the verdict, if there is one, a table and a list in GitHub's Markdown."""
    rows = [_HEADER, *map(_row, comparisons)]
    if verdict is not None:
        words = ("verdict", *(_MARKS[item.outcome] for item in verdict.judged))
        rows = [(*row, word) for row, word in zip(rows, words, strict=True)]
    rule = ["---", *["---:"] * (len(_HEADER) - 1), *["---"] * (verdict is not None)]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (rows[0], rule, *rows[1:])]
    notes = [*_notes(comparisons), *(_judgements(verdict) if verdict is not None else ())]
    head = [] if verdict is None else [f"**{_cell(summary(verdict))}**", ""]
    tail = ["", *(f"- {_cell(note)}" for note in notes)] if notes else []
    return "\n".join([*head, *lines, *tail]) + "\n"


def summary(verdict: GateVerdict) -> str:
    """Say the verdict on the whole run in one sentence."""
    count, tolerated = len(verdict.judged), _percent(verdict.max_regression)
    if verdict.outcome == "passed":
        return f"PASSED: none of {count} is slower by {tolerated} or more"
    of = [item for item in verdict.judged if item.outcome == verdict.outcome]
    names = ", ".join(item.comparison.title for item in of)
    if verdict.outcome == "regressed":
        return f"REGRESSED: {len(of)} of {count} slower by more than {tolerated}: {names}"
    missing = f"not measured: {', '.join(verdict.not_measured)}" if verdict.not_measured else ""
    unsure = f"cannot tell whether it is slower by more than {tolerated}: {names}" if names else ""
    return f"UNDECIDED: {'; '.join(filter(None, (unsure, missing)))}"


def _row(item: Comparison) -> tuple[str, ...]:
    return (
        item.title,
        digits(item.baseline_ms.value),
        digits(item.now_ms.value),
        f"{item.ratio.value:.3f}",
        _interval(item.ratio),
        f"{item.fastest.value:.3f} ({_interval(item.fastest)})" if item.fastest else "unknown",
        f"{item.times.value:.3f} ({_interval(item.times)})" if item.to_yardstick else "as judged",
    )


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Explain the ratios and list the differences of the runs, each once."""
    lines = []
    if any(item.to_yardstick for item in comparisons):
        lines.append(
            "now / baseline is the ratio of times divided by the yardstick's in the same round; "
            "plain times are not divided; fastest runs are those of each process"
        )
    if not all(item.to_yardstick for item in comparisons):
        lines.append(
            "without a yardstick in both runs, the machine's own speed at either time is part "
            "of the ratio"
        )
    for item in comparisons:
        for found in item.differences:
            prefix = "" if found.what in _OF_ALL else f"{item.title}: "
            lines.append(f"{prefix}{found.what} changed: {found.baseline} -> {found.now}")
        for run in item.disturbed:
            lines.append(f"{item.title}: other programs disturbed the {_RUN_NAMES[run]}")
        if item.ratio.error is None:
            lines.append(f"{item.title}: one process only, so the interval is too narrow")
    return list(dict.fromkeys(lines))


def _judgements(verdict: GateVerdict) -> list[str]:
    return [f"{item.comparison.title}: {_judgement(item)}" for item in verdict.judged]


def _judgement(item: SubjectVerdict) -> str:
    least, most = floor(1000 * (item.lower - 1)) / 10, ceil(1000 * (item.upper - 1)) / 10
    if item.outcome == "regressed":
        return f"regressed, slower by {least:.1f}% at least"
    if item.outcome == "passed" and most < 0:
        return f"passed, faster by {-most:.1f}% at least"
    if item.outcome == "passed":
        return f"passed, slower by {most:.1f}% at most"
    return f"undecided, {least:+.1f}% to {most:+.1f}%; {item.advice}"


def _interval(ratio: RatioEstimate) -> str:
    return f"{ratio.interval.low:.3f} to {ratio.interval.high:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _cell(text: str) -> str:
    """Escape text that would end a table cell or begin HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
