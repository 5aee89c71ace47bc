"""The model of a page: both writers show all of it, and nothing of it becomes markup."""

import dataclasses
import html
from collections.abc import Iterator

import pytest
from PIL import Image

from edgeclip.profiles.report.sections import (
    AdviceList,
    AdviceNote,
    Alarm,
    Block,
    Card,
    Cell,
    Column,
    Commands,
    Facts,
    Figure,
    FigureGrid,
    Gallery,
    GalleryEntry,
    Heading,
    Note,
    Page,
    PageSummary,
    Pictures,
    Section,
    ShownAnswer,
    ShownPicture,
    Table,
)
from edgeclip.profiles.report.write_page import html_of, markdown_of
from tests.page import Page as Found
from tests.page import visible
from tests.profiles.report.test_charts import chart


def blocks(mark: str) -> tuple[Block, ...]:
    """One of each kind of block, whose texts all begin with `mark`."""
    numbers = iter(range(1000))

    def text() -> str:
        return f"{mark}{next(numbers):03}"

    answer = (ShownAnswer(text(), 0.9, True), ShownAnswer(text(), 0.1, False))
    entry = GalleryEntry(
        picture=Image.new("RGB", (8, 8)), caption=text(), teacher=answer, student=answer[:1]
    )
    table = Table(
        name=text(),
        columns=(Column(text(), left=True), Column(text())),
        rows=((Cell(text(), text()), Cell(text(), tone="miss")),),
    )
    return (
        table,
        dataclasses.replace(table, name=text(), folded=True),
        Figure(chart("rows", text()), text()),
        FigureGrid((chart("histogram", text()), chart("loss", text())), text()),
        Note(text()),
        Note(text(), "miss"),
        Heading(text()),
        Commands((text(), text())),
        Facts(((text(), text()),)),
        AdviceList(
            (
                AdviceNote(
                    subject=text(), title=text(), text=text(), evidence=(text(),), gain=text()
                ),
            )
        ),
        Gallery((entry,)),
        Pictures(
            (
                ShownPicture(picture=Image.new("RGB", (8, 8)), figure=text(), text=text()),
                ShownPicture(
                    picture=Image.new("L", (8, 8)),
                    figure=text(),
                    beside=Image.new("RGBA", (300, 8)),
                ),
            )
        ),
    )


def page(mark: str) -> Page:
    return Page(
        title=f"{mark}title",
        lead=(f"{mark}lead",),
        summary=PageSummary(
            f"{mark}verdict",
            "miss",
            (Alarm(f"{mark}loud", "miss"), Alarm(f"{mark}quiet", "")),
            (
                Card(
                    f"{mark}name",
                    f"{mark}figure",
                    f"{mark}interval",
                    f"{mark}note",
                    f"{mark}judged",
                    "pass",
                    chart("bound"),
                ),
            ),
        ),
        sections=(
            Section(anchor="one", title=f"{mark}one", blocks=blocks(mark)),
            Section(anchor="two", title=f"{mark}two", blocks=(Note(f"{mark}last"),)),
        ),
        footer=(f"{mark}footer",),
    )


def texts(value: object) -> Iterator[str]:
    """Every text of the model that a reader must find."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from texts(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            unseen = {Section: "anchor", Column: "left"}.get(type(value))
            unnamed = isinstance(value, Table) and field.name == "name" and not value.folded
            if field.name not in (unseen, "tone") and not unnamed:
                yield from texts(getattr(value, field.name))


def wanted(model: Page) -> list[str]:
    return [text for text in texts(model) if text.startswith("word")]


def test_the_page_shows_everything_of_the_model() -> None:
    shown = visible(html_of(page("word")))
    missing = [
        text for text in texts(page("word")) if text.startswith("word") and text not in shown
    ]
    assert missing == []


def test_markdown_tells_everything_of_the_model() -> None:
    told = markdown_of(page("word"))
    assert [text for text in wanted(page("word")) if text not in told] == []


@pytest.mark.parametrize("mark", ["<script>alert(1)</script>", '"></style><b>'])
def test_no_text_becomes_markup(mark: str) -> None:
    page_html = html_of(page(mark))
    found = Found(page_html)
    assert found.open == []
    assert not {"script", "b"} & set(found.tags)
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert visible(page_html).count(html.unescape(mark).strip()) > 40
    told = markdown_of(page(mark))
    outside = told.split("```")[0::2]  # a code block shows what it holds
    assert not any(mark.strip() in part for part in outside)


def test_every_table_has_headers_and_every_picture_a_text() -> None:
    found = html_of(page("word"))
    assert found.count("<table>") == found.count("<thead>") == 2
    assert 'scope="col"' in found
    assert 'scope="row"' in found
    assert found.count("<svg") == found.count("<desc>") == found.count('role="img"')
    assert 'alt="word' in found
