"""One self-contained HTML page: no network, no scripts, pictures inside."""

import base64
import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from edgeclip.profiles.report.chart_parts import both_widths
from edgeclip.profiles.report.chart_tradeoff import TradePoint, trade_chart
from edgeclip.profiles.report.html_page import page_template, write_page
from edgeclip.profiles.report.report_charts import headline_chart, loss_chart
from edgeclip.profiles.report.report_data import Gate, ParetoPoint, Picture, ReportData
from edgeclip.runtime.console import (
    MISSING,
    digits,
    megabytes,
    percent,
    percent_interval,
    seconds,
)
from edgeclip.runtime.errors import InputError

_PICTURE_SIDE = 256  # px; shown at half of that, so that it is sharp on dense screens


def write_report(data: ReportData, path: Path) -> None:
    """Write the report to `path`, whole or not at all.

    Raises:
        InputError: the file cannot be written, or a picture cannot be read.
        MissingExtraError: jinja2 is not installed.
    """
    write_page(render_report(data), path)


def render_report(data: ReportData) -> str:
    """The report as HTML text. Everything from `data` is escaped.

    Raises:
        InputError: a picture cannot be read.
        MissingExtraError: jinja2 is not installed.
    """
    template = page_template(
        "report_template.html.j2",
        data_uri=data_uri,
        digits=digits,
        gate_number=gate_number,
        megabytes=megabytes,
        percent=percent,
        percent_interval=percent_interval,
        seconds=seconds,
        failed=_failed,
    )
    from markupsafe import Markup  # comes with jinja2

    return template.render(
        data=data,
        missing=MISSING,
        pareto=Markup(both_widths(lambda narrow: _pareto(data, narrow))),
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


def _failed(gates: tuple[Gate, ...]) -> list[Gate]:
    return [gate for gate in gates if not gate.record.passed]


def _pareto(data: ReportData, narrow: bool) -> str:
    return trade_chart(
        [_trade_point(point) for point in data.pareto],
        quality_name=data.quality_name,
        unit="share",
        latency_name=data.latency_name,
        narrow=narrow,
        bar=data.quality_bar,
    )


def _trade_point(point: ParetoPoint) -> TradePoint:
    facts = (percent(point.quality.value), f"{digits(point.latency_ms.value)} ms")
    named = replace(point, name=f"{point.name} (ships)") if point.chosen else point
    return TradePoint(named, (*facts, megabytes(point.bytes)))
