"""Pages that need no network: their templates, the page of sections, and the file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeclip.profiles.report.profile_blocks import Section, code_parts
from edgeclip.profiles.report.profile_summary import Summary
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from jinja2 import Template


def page_template(name: str, **filters: Callable[..., Any]) -> "Template":
    """A template beside this file that escapes what it is given, and knows these filters.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("a report needs jinja2: pip install 'edgeclip[report]'") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def render_sections(
    *,
    title: str,
    lead: Sequence[str],
    summary: Summary,
    sections: Sequence[Section | None],
    created: str,
) -> str:
    """A page of sections as HTML text, without those that have nothing to show.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return page_template("profile_template.html.j2", code_parts=code_parts).render(
        title=title,
        lead=lead,
        summary=summary,
        sections=[section for section in sections if section is not None],
        created=created,
    )


def write_page(html: str, path: Path) -> None:
    """Write a page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        # A file's name may hold what UTF-8 cannot say.
        temporary.write_bytes(html.encode("utf-8", "replace"))
