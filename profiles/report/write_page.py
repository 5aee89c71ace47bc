"""Write a page of a report: one HTML file that needs no network and no script, or Markdown.

The Markdown is GitHub's, and says everything but the pictures in words.
"""

import base64
import html
import importlib.util
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from edgeclip.profiles.report.drawing import Chart, svg
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
    Picture,
    Pictures,
    ShownAnswer,
    ShownPicture,
    Table,
    code_parts,
)
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from markupsafe import Markup

_PICTURE_SIDE = 256  # px; shown at half of that, so that it is sharp on dense screens


def check_page_packages() -> None:
    """Refuse to begin long work whose page could not be written in the end.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"a page needs {package}: pip install 'edgeclip[report]'")


def write_html(page: Page, path: Path) -> None:
    """Write a page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written, or a picture cannot be read.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    text = html_of(page)
    with atomic_file(path) as temporary:
        # A file's name may hold what UTF-8 cannot say.
        temporary.write_bytes(text.encode("utf-8", "replace"))


def html_of(page: Page) -> str:
    """The page as HTML text; whatever comes from files is escaped.

    Raises:
        InputError: a picture cannot be read.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup  # comes with jinja2
    except ImportError as error:
        raise MissingExtraError("a report needs jinja2: pip install 'edgeclip[report]'") from error
    numbers = itertools.count(1)

    def drawn(chart: Chart) -> "Markup":
        sizes = (False,) if chart.small else (False, True)
        pictures = (_with_own_names(svg(chart, narrow=n), f"f{next(numbers)}-") for n in sizes)
        return Markup("\n".join(pictures))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        code_parts=code_parts, data_uri=data_uri, photo_uri=photo_uri, drawn=drawn, kind=_kind
    )
    return environment.get_template("report.html.j2").render(page=page).strip()


def _kind(block: object) -> str:
    """The name of a block's class, by which the template knows it."""
    return type(block).__name__


def _with_own_names(picture: str, prefix: str) -> str:
    """A picture whose names no other picture of the page has."""
    return re.sub(r'( id="| href="#|url\(#)', lambda found: found[0] + prefix, picture)


def data_uri(picture: Picture) -> str:
    """A picture of at most 256 pixels a side, as a PNG inside a URI.

    Raises:
        InputError: bytes that are not a picture.
    """
    buffer = io.BytesIO()
    _small(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def photo_uri(picture: Picture) -> str:
    """The same as a JPEG, a tenth of the size for photographs.

    Raises:
        InputError: bytes that are not a picture.
    """
    buffer = io.BytesIO()
    _small(picture).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _small(picture: Picture) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        small = image.convert("RGB")
        small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"a picture of the report cannot be read: {error}") from None
    return small


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
        case Pictures(entries=entries):
            return "\n".join(map(_told, entries))


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


def _told(entry: ShownPicture) -> str:
    words = f"- {escaped(entry.figure)}"
    return f"{words}: {escaped(entry.text)}" if entry.text else words


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
