"""Write a report as Markdown in GitHub's dialect: everything but the pictures, in words."""

import html
import re
from collections.abc import Sequence

from edgeclip.profiles.report.sections import (
    AdviceList,
    AdviceNote,
    Alarm,
    Block,
    Cell,
    Commands,
    Facts,
    Figure,
    FigureGrid,
    Gallery,
    GalleryEntry,
    Heading,
    Note,
    Page,
    ShownAnswer,
    Table,
    code_parts,
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$])")
# GitHub turns these into mentions, links to issues and links, whatever Markdown says; a comment
# inside parts them.
_LIVELY = re.compile(
    r"(?<!\w)(@)(?=\w)|(#)(?=\d)|(GH-)(?=\d)|(https?|ftp)(?=://)|(www)(?=\.)", re.IGNORECASE
)


def markdown_of(page: Page) -> str:
    """The page as Markdown, whose folded tables are folded there too.

    Text from files is escaped, so that a bundle's name cannot become a link or a mention.
    """
    summary = page.summary
    parts = [f"### {escaped(page.title)}", *map(escaped, page.lead)]
    parts += [f"**{escaped(summary.verdict)}**"] if summary.verdict else []
    parts += _callouts(summary.alarms)
    cards = [
        f"- {escaped(card.name)}: **{escaped(card.figure)}** ({escaped(card.interval)}). "
        f"{escaped(' '.join((card.verdict, card.note)))}"
        for card in summary.cards
    ]
    parts += ["\n".join(cards)] if cards else []
    for section in page.sections:
        parts.append(f"#### {escaped(section.title)}")
        parts += [block for one in section.blocks if (block := _block(one))]
    return "\n\n".join([*parts, *map(escaped, page.footer)]) + "\n"


def escaped(content: str) -> str:
    """Text that GitHub shows as it is: no HTML, Markdown, mention, link or second line."""
    plain = html.escape(" ".join(content.split()), quote=False)
    return _LIVELY.sub(r"\g<0><!-- -->", _SPECIAL.sub(r"\\\1", plain))


def _callouts(alarms: Sequence[Alarm]) -> list[str]:
    loud = [alarm.text for alarm in alarms if alarm.tone == "miss"]
    quiet = [alarm.text for alarm in alarms if alarm.tone != "miss"]
    found = []
    for kind, texts in (("WARNING", loud), ("NOTE", quiet)):
        if texts:
            lines = "\n".join(f"> - {escaped(text)}" for text in texts)
            found.append(f"> [!{kind}]\n{lines}")
    return found


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Figure(chart=chart, caption=caption):
            words = f"*{escaped(chart.title)}*: {escaped(chart.description)}."
            return f"{words}\n\n{escaped(caption)}" if caption else words
        case FigureGrid(charts=charts, caption=caption):
            words = "\n".join(
                f"- *{escaped(chart.title)}*: {escaped(chart.description)}" for chart in charts
            )
            return f"{words}\n\n{escaped(caption)}" if caption else words
        case Note(text=text, tone=tone):
            return f"**{escaped(text)}**" if tone else escaped(text)
        case Heading(text=text):
            return f"##### {escaped(text)}"
        case Commands(lines=lines):
            return _fenced("\n".join(lines))
        case Facts(pairs=pairs):
            return "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in pairs)
        case AdviceList(entries=entries):
            return "\n".join(map(_advice, entries))
        case Gallery(entries=entries):
            return "\n".join(map(_answers, entries))


def _table(table: Table) -> str:
    rule = ["---" if column.left or not at else "---:" for at, column in enumerate(table.columns)]
    lines = [
        _row([escaped(column.name) for column in table.columns]),
        _row(rule),
        *(_row([_cell(cell) for cell in row]) for row in table.rows),
    ]
    content = "\n".join(lines)
    return _folded(table.name, content) if table.folded else content


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    small = "<br>".join(escaped(line) for line in cell.small.split("\n"))
    return f"{escaped(cell.text)}<br><sub>{small}</sub>" if cell.small else escaped(cell.text)


def _advice(note: AdviceNote) -> str:
    words = f"- **{_with_code(note.title)}** ({escaped(note.subject)})"
    words += f": {escaped(note.gain)}" if note.gain else ""
    more = [*([note.text] if note.text else []), *note.evidence]
    return "\n".join([words, *(f"  - {_with_code(line)}" for line in more)])


def _answers(entry: GalleryEntry) -> str:
    def told(answers: Sequence[ShownAnswer]) -> str:
        return ", ".join(
            f"{escaped(one.text)} {one.score:.2f}{' ✓' if one.right else ''}" for one in answers
        )

    return (
        f"- {escaped(entry.caption)}: teacher {told(entry.teacher)}; student {told(entry.student)}"
    )


def _with_code(content: str) -> str:
    """Text whose commands between backticks stay code."""
    parts = code_parts(" ".join(content.split()))
    return "".join(f"`{piece}`" if is_code else _edges(piece) for is_code, piece in parts)


def _edges(piece: str) -> str:
    """A piece, escaped, with the spaces at its ends."""
    head, tail = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
    return f"{head}{escaped(piece)}{tail}"


def _fenced(command: str) -> str:
    """A code block whose fence is longer than any row of backticks inside."""
    longest = max((len(ticks) for ticks in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{command}\n{fence}"


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{html.escape(title)}</summary>\n\n{content}\n\n</details>"
