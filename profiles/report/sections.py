"""The model of a report: a page of sections, each of notes, tables, figures and lists.

It is plain data: `write_page` writes it as HTML or as Markdown, and escapes all text. Figures are
charts that have not been drawn yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from edgeclip.profiles.report.drawing import Chart
from edgeclip.runtime.console import digits, interval_ends
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.stats.interval import Interval

Tone = Literal["", "pass", "miss", "strong"]
Picture = Image.Image | bytes
NOT_AVAILABLE = "not available"


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

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with a caption."""

    chart: Chart
    caption: str = ""


@dataclass(frozen=True, slots=True)
class FigureGrid:
    """Small charts side by side, with one caption."""

    charts: tuple[Chart, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines to type."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, such as those of a machine."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceNote:
    """Something worth trying: `evidence` are the figures behind it, `gain` what it may bring.

    Text between backticks in `title`, `text` and `evidence` is code.
    """

    subject: str
    title: str
    text: str = ""
    evidence: tuple[str, ...] = ()
    gain: str = ""


@dataclass(frozen=True, slots=True)
class AdviceList:
    """What is worth trying, the best first."""

    entries: tuple[AdviceNote, ...]


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One of a model's top answers."""

    text: str
    score: float
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryEntry:
    """A picture (or its PNG, JPEG or WebP bytes) and what two models answered, best first."""

    picture: Picture
    caption: str
    teacher: tuple[ShownAnswer, ...]
    student: tuple[ShownAnswer, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures with answers, side by side."""

    entries: tuple[GalleryEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPicture:
    """A picture (or its bytes) as a small photograph, a figure of it, and a text such as a caption.

    `beside` is another picture to compare it with, shown before it.
    """

    picture: Picture
    figure: str
    text: str = ""
    beside: Picture | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures with a figure each, side by side."""

    entries: tuple[ShownPicture, ...]


Block = (
    Table
    | Figure
    | FigureGrid
    | Note
    | Heading
    | Commands
    | Facts
    | AdviceList
    | Gallery
    | Pictures
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page; `anchor` is its name in links, letters and hyphens."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that the reader must know before any figure; "miss" is loud."""

    text: str
    tone: Tone


@dataclass(frozen=True, slots=True)
class Card:
    """A figure that matters, its interval, what it is of, and a small chart if there is one."""

    name: str
    figure: str
    interval: str
    note: str
    verdict: str = ""
    tone: Tone = ""
    chart: Chart | None = None


@dataclass(frozen=True, slots=True)
class PageSummary:
    """The head of a page: a verdict with its tone, alarms and cards."""

    verdict: str
    tone: Tone
    alarms: tuple[Alarm, ...] = ()
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report.

    Attributes:
        title: title of the page.
        lead: sentences below it.
        summary: the verdict and the figures that matter.
        sections: the sections, in order.
        footer: sentences at the end, such as licences and when it was written.
    """

    title: str
    lead: tuple[str, ...]
    summary: PageSummary
    sections: tuple[Section, ...]
    footer: tuple[str, ...] = ()


def section_of(anchor: str, title: str, blocks: Sequence[Block]) -> Section | None:
    """A section of these blocks; None without any."""
    return Section(anchor=anchor, title=title, blocks=tuple(blocks)) if blocks else None


def method_section(method: str, machine: Machine, command: str) -> Section:
    """How the figures of a page were found: by which method, where, and by which command."""
    where = Note(f"On {machine.cpu}, {machine.cores} cores.")
    blocks = (Note(method), where, Commands((command,)))
    return Section(anchor="method", title="Method", blocks=blocks)


def sections(*found: Section | None) -> tuple[Section, ...]:
    """The sections that have something to show."""
    return tuple(section for section in found if section is not None)


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
    return Cell(f"{value.value:.3f}", ratio_span(value))


def ratio_span(value: Interval) -> str:
    """The ends of a ratio's interval: "0.912 to 1.043"."""
    return interval_ends(value, "{:.3f}".format)


def span(value: Interval, *, scale: float = 1.0) -> str:
    """The ends of an interval: "1.22 to 1.31", "at least 1.22", "not known"."""
    return interval_ends(value, lambda end: digits(scale * end))


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
