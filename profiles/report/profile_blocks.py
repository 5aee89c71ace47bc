"""Blocks that a profile's report is made of: plain data, for the HTML page and for Markdown.

Text in cells and notes is plain and escaped where it is rendered; pictures are SVG that the
charts have escaped themselves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeclip.profiles.report.profile_data import AdviceNote, Subject, full_name
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.intervals import Interval

Tone = Literal["", "pass", "miss", "strong"]
NOT_AVAILABLE = "not available"
_FEW = 3  # subjects that are named one by one


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell: lines of `small` stand below the text, such as the interval of a figure."""

    text: str
    small: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column: numbers to the right, words to the left."""

    name: str
    left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table whose first column names the row; `folded` until it is asked for."""

    kind: ClassVar[str] = "table"
    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture in two widths, of which the page shows one."""

    kind: ClassVar[str] = "figure"
    picture: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallCharts:
    """Small pictures in a grid."""

    kind: ClassVar[str] = "charts"
    pictures: tuple[str, ...]
    caption: str


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines to type."""

    kind: ClassVar[str] = "commands"
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdviceList:
    """What is worth trying."""

    kind: ClassVar[str] = "advice"
    entries: tuple[AdviceNote, ...]


Block = Table | Figure | SmallCharts | Note | Heading | Commands | AdviceList


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page; `anchor` is its name in links."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


def section_of(anchor: str, title: str, blocks: Sequence[Block]) -> Section | None:
    """A section of these blocks; None without any."""
    return Section(anchor=anchor, title=title, blocks=tuple(blocks)) if blocks else None


def columns(*names: str) -> tuple[Column, ...]:
    """Columns by their names; one that begins with "<" is aligned to the left."""
    return tuple(Column(name.removeprefix("<"), name.startswith("<")) for name in names)


def interval_cell(value: Interval | None, *, scale: float = 1.0, absent: str = "") -> Cell:
    """A figure with the ends of its interval below it; `absent` where there is none."""
    if value is None:
        return Cell(absent)
    return Cell(digits(scale * value.value), span(value, scale=scale))


def ratio_cell(value: Interval | None) -> Cell:
    """A ratio with three digits after the point."""
    if value is None:
        return Cell("")
    return Cell(f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}")


def span(value: Interval, *, scale: float = 1.0) -> str:
    """The ends of an interval: "1.22 to 1.31"."""
    return f"{digits(scale * value.low)} to {digits(scale * value.high)}"


def with_interval(value: Interval, unit: str) -> str:
    """A figure, its unit and its interval in a line: "1.26 ms (1.22 to 1.31)"."""
    return f"{digits(value.value)} {unit} ({span(value)})"


def code_parts(content: str) -> list[tuple[bool, str]]:
    """Pieces of a text, and whether each stood between backticks; a lone backtick stays."""
    pieces = content.split("`")
    if len(pieces) % 2 == 0:
        return [(False, content)]
    return [(at % 2 == 1, piece) for at, piece in enumerate(pieces) if piece]


def count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def missing_notes(
    subjects: Sequence[Subject], keys: Iterable[str], *, remark: bool = False
) -> list[Note]:
    """Why something of `keys` could not be measured: one note a reason, with its subjects.

    With `remark` the reason stands for itself, since what it is about may be there in part.
    """
    wanted = set(keys)
    reasons: dict[tuple[str, str], list[Subject]] = {}
    for subject in subjects:
        for key, reason in subject.item.missing:
            if key in wanted:
                reasons.setdefault((key, reason), []).append(subject)
    notes = []
    for (key, reason), those in reasons.items():
        what = key.replace("_", " ").capitalize()
        words = reason if remark else f"{NOT_AVAILABLE} ({reason})"
        notes.append(Note(f"{what}{_of_whom(those, subjects)}: {words}"))
    return notes


def _of_whom(those: Sequence[Subject], everyone: Sequence[Subject]) -> str:
    """Names of a few subjects, numbers of many, nothing for all."""
    if len(those) == len(everyone):
        return ""
    if len(those) <= _FEW:
        return f" of {', '.join(full_name(subject) for subject in those)}"
    names = dict.fromkeys(subject.source.name for subject in those)
    parts = []
    for name in names:
        some, all_of = (sum(s.source.name == name for s in group) for group in (those, everyone))
        run = f" on {name}" if len({s.source.name for s in everyone}) > 1 else ""
        parts.append(f"{some} of {all_of} subjects{run}")
    return f" of {', '.join(parts)}"
