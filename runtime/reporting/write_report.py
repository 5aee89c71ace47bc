"""One self-contained HTML page: no network, no scripts, pictures inside."""

import base64
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.reporting.report_charts import headline_chart, loss_chart
from edgeclip.runtime.reporting.report_data import Gate, Picture, ReportData
from edgeclip.runtime.reporting.report_format import (
    MISSING,
    digits,
    megabytes,
    percent,
    percent_interval,
    seconds,
)
from edgeclip.runtime.reporting.report_pareto import pareto_chart

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATE = "report_template.html.j2"
_PICTURE_SIDE = 256  # px; shown at half of that, so that it is sharp on dense screens


def write_report(data: ReportData, path: Path) -> None:
    """Write the report to `path`, whole or not at all.

    Raises:
        InputError: the file cannot be written, or a picture cannot be read.
        MissingExtraError: jinja2 is not installed.
    """
    html = render_report(data)
    with atomic_file(path) as temporary:
        # A caption from a file name may hold what UTF-8 cannot say.
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_report(data: ReportData) -> str:
    """The report as HTML text. Everything from `data` is escaped.

    Raises:
        InputError: a picture cannot be read.
        MissingExtraError: jinja2 is not installed.
    """
    template = _environment().get_template(_TEMPLATE)
    from markupsafe import Markup  # comes with jinja2

    pareto = partial(
        pareto_chart,
        data.pareto,
        quality_name=data.quality_name,
        latency_name=data.latency_name,
        quality_bar=data.quality_bar,
    )
    return template.render(
        data=data,
        missing=MISSING,
        pareto=Markup(pareto(narrow=False) + pareto(narrow=True)),
        losses=[Markup(loss_chart(curve)) for curve in data.losses],
        headline_chart=lambda headline: Markup(headline_chart(headline)),
    )


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


def gate_number(value: float, unit: str) -> str:
    """A gate's value with its unit; five digits, so that 0.99998 does not become 1."""
    return f"{value:.5g} {unit}".strip()


def _environment() -> "Environment":
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
    filters: dict[str, Callable[..., Any]] = {
        "data_uri": data_uri,
        "digits": digits,
        "gate_number": gate_number,
        "megabytes": megabytes,
        "percent": percent,
        "percent_interval": percent_interval,
        "seconds": seconds,
        "failed": _failed,
    }
    environment.filters.update(filters)
    return environment


def _failed(gates: tuple[Gate, ...]) -> list[Gate]:
    return [gate for gate in gates if not gate.record.passed]
