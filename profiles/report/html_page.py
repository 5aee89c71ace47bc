"""Write a report as one HTML file that needs no network and no script, pictures inside."""

import base64
import io
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from edgeclip.profiles.report.drawing import Chart, svg
from edgeclip.profiles.report.sections import Page, Picture, code_parts
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from markupsafe import Markup

_PICTURE_SIDE = 256  # px; shown at half of that, so that it is sharp on dense screens


def write_html(page: Page, path: Path) -> None:
    """Write a page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written, or a picture cannot be read.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    html = html_of(page)
    with atomic_file(path) as temporary:
        # A file's name may hold what UTF-8 cannot say.
        temporary.write_bytes(html.encode("utf-8", "replace"))


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
    environment.filters.update(code_parts=code_parts, data_uri=data_uri, drawn=drawn, kind=_kind)
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
    try:
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        small = image.convert("RGB")
        small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"a picture of the report cannot be read: {error}") from None
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
