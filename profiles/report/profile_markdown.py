"""A profile as compact Markdown for a pull request, in GitHub's dialect."""

import html
import re
from collections.abc import Sequence

from edgeclip.profiles.report.profile_blocks import Cell, code_parts, span
from edgeclip.profiles.report.profile_data import (
    PART_NAMES,
    AdviceNote,
    NamedRun,
    Subject,
    SubjectQuality,
    subjects_of,
)
from edgeclip.profiles.report.profile_environment import environment_rows
from edgeclip.profiles.report.profile_quality import quality_of, quality_span, quality_text
from edgeclip.profiles.report.profile_report import title_of
from edgeclip.profiles.report.profile_summary import Alarm, alarms_of
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.intervals import Interval

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$])")
# GitHub turns these into mentions, links to issues and links, whatever Markdown says; a comment
# inside parts them.
_LIVELY = re.compile(
    r"(?<!\w)(@)(?=\w)|(#)(?=\d)|(GH-)(?=\d)|(https?|ftp)(?=://)|(www)(?=\.)", re.IGNORECASE
)


def markdown_of(
    runs: Sequence[NamedRun],
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> str:
    """Warnings, a table of all subjects, and the environment folded away.

    Text from files is escaped, so that a bundle's name cannot become a link or a mention.
    """
    subjects = subjects_of(runs)
    parts = [
        f"### {escaped(title_of(subjects))}",
        *_warnings(alarms_of(runs, subjects)),
        _table(subjects, quality),
        "Small figures are 95% intervals.",
        *_advice(advice),
        _environment(runs),
    ]
    return "\n\n".join(parts) + "\n"


def escaped(content: str) -> str:
    """Text that GitHub shows as it is: no HTML, Markdown, mention, link or second line."""
    plain = html.escape(" ".join(content.split()), quote=False)
    return _LIVELY.sub(r"\g<0><!-- -->", _SPECIAL.sub(r"\\\1", plain))


def _warnings(alarms: Sequence[Alarm]) -> list[str]:
    loud = [alarm.text for alarm in alarms if alarm.tone == "miss"]
    quiet = [alarm.text for alarm in alarms if alarm.tone != "miss"]
    found = []
    for kind, texts in (("WARNING", loud), ("NOTE", quiet)):
        if texts:
            lines = "\n".join(f"> - {escaped(text)}" for text in texts)
            found.append(f"> [!{kind}]\n{lines}")
    return found


def _table(subjects: Sequence[Subject], quality: Sequence[SubjectQuality]) -> str:
    graded = any(quality_of(subject, quality) for subject in subjects)
    head = ["subject", "part", "p50 ms", "p99 ms", "ratio", "most a second"]
    head += ["quality"] if graded else []
    lines = [_row(head), _row(["---", "---", *["---:"] * (len(head) - 2)])]
    for subject in subjects:
        cells = _cells(subject)
        if graded:
            cells.append(_quality(subject, quality))
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(subject: Subject) -> list[str]:
    item = subject.item
    ratio = item.ratio
    best = max(item.sweep, key=lambda point: point.items_per_s.value, default=None)
    mark = " ⚠" if item.contended else ""
    return [
        f"{escaped(subject.label)}{mark}",
        PART_NAMES[item.part],
        _figure(item.latency.p50_ms),
        _figure(item.latency.p99_ms),
        ""
        if ratio is None
        else f"{ratio.ratio.value:.3f}<br><sub>{ratio.ratio.low:.3f} to {ratio.ratio.high:.3f} "
        f"of {escaped(ratio.reference)}</sub>",
        ""
        if best is None
        else f"{digits(best.items_per_s.value)}<br><sub>{span(best.items_per_s)}, "
        f"batch {best.batch}</sub>",
    ]


def _figure(value: Interval | None) -> str:
    if value is None:
        return "too few runs"
    return f"{digits(value.value)}<br><sub>{span(value)}</sub>"


def _quality(subject: Subject, quality: Sequence[SubjectQuality]) -> str:
    found = quality_of(subject, quality)
    if not found:
        return ""
    one = found[0]
    small = ", ".join(filter(None, (escaped(one.metric), quality_span(one))))
    return f"{quality_text(one.value.value, one.unit)}<br><sub>{small}</sub>"


def _advice(advice: Sequence[AdviceNote]) -> list[str]:
    if not advice:
        return []
    lines = [
        f"- **{_with_code(note.title)}** ({escaped(note.subject)})"
        + (f": {escaped(note.gain)}" if note.gain else "")
        for note in advice
    ]
    return [_folded("What is worth trying", "\n".join(lines))]


def _with_code(content: str) -> str:
    """Text whose commands between backticks stay code."""
    parts = code_parts(" ".join(content.split()))
    return "".join(f"`{piece}`" if is_code else _edges(piece) for is_code, piece in parts)


def _edges(piece: str) -> str:
    """A piece, escaped, with the spaces at its ends."""
    head, tail = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
    return f"{head}{escaped(piece)}{tail}"


def _environment(runs: Sequence[NamedRun]) -> str:
    head = ["", *(escaped(source.name) for source in runs)]
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [_row([_cell(cell) for cell in row]) for row in environment_rows(runs)]
    commands = "\n".join(_fenced(source.run.command) for source in runs)
    return _folded("Environment and commands", "\n".join(lines) + "\n\n" + commands)


def _cell(cell: Cell) -> str:
    small = f" <sub>{escaped(cell.small)}</sub>" if cell.small else ""
    return f"{escaped(cell.text)}{small}"


def _fenced(command: str) -> str:
    """A code block whose fence is longer than any row of backticks inside."""
    longest = max((len(ticks) for ticks in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{command}\n{fence}"


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"
