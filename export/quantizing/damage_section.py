"""The part of a search's page that shows what each group of products suffers and saves."""

from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.sensitivity import GroupDamage
from edgeclip.runtime.reporting.chart_rows import Dot, Row, RowChart, row_picture
from edgeclip.runtime.reporting.profile_blocks import (
    Block,
    Cell,
    Figure,
    Note,
    Section,
    Table,
    columns,
    section_of,
)
from edgeclip.runtime.reporting.report_format import seconds

_SHOWN = 20  # groups in the picture


def damage_section(result: SearchResult) -> Section | None:
    """The damage of each group alone; None where it was not measured."""
    if result.damage is None or not result.damage.groups:
        return None
    groups = result.damage.groups
    chart = RowChart(
        rows=tuple(_row(item) for item in groups[:_SHOWN] if item.divergence.value > 0),
        axis_name="divergence of a row of similarities, nats (log)",
        label="Damage of each group of products alone",
        log=True,
    )
    saved = "time saved, % of fp32" if _timed(result) else "multiply-adds, %"
    table = Table(
        name="All groups",
        columns=columns("group", "divergence, nats", "1 - cosine", saved, "in int8"),
        rows=tuple(_cells(item, result) for item in groups),
        folded=True,
    )
    blocks: list[Block] = [Figure(picture=row_picture(chart), caption=_caption(result)), table]
    note = _measured_in(result)
    return section_of("damage", "What each group of products suffers", [*blocks, Note(note)])


def _caption(result: SearchResult) -> str:
    more = len(result.damage.groups) - _SHOWN if result.damage is not None else 0
    rest = f" The table has the other {more}." if more > 0 else ""
    return (
        "Each group quantized alone, all others in float, the most damaging first. Products that "
        f"read the same value are one group.{rest}"
    )


def _measured_in(result: SearchResult) -> str:
    damage = result.damage
    assert damage is not None
    return (
        f"Measured on {damage.inputs} steering inputs in {seconds(damage.seconds)}, "
        f"{damage.rate:.0f} inputs a second. A group goes back to float "
        "the earlier, the more it damages for the time that it saves."
    )


def _row(item: GroupDamage) -> Row:
    value = item.divergence
    return Row(item.title, (Dot(value),), f"{value.value:.1e}")


def _cells(item: GroupDamage, result: SearchResult) -> tuple[Cell, ...]:
    chosen = result.chosen.config
    kept = set(getattr(chosen, "kept", ()))
    float_only = not hasattr(chosen, "kept")
    inside = "no" if float_only or set(item.nodes) <= kept else "yes"
    loss = item.cosine_loss
    saved = "" if result.gains is None else f"{100 * result.gains.of(item.nodes):+.1f}"
    return (
        Cell(item.title, "\n".join(item.nodes)),
        Cell(f"{item.divergence.value:.2e}", _span(item.divergence.low, item.divergence.high)),
        Cell(f"{loss.value:.2e}", _span(loss.low, loss.high)),
        Cell(saved),
        Cell(inside),
    )


def _span(low: float, high: float) -> str:
    return f"{low:.2e} to {high:.2e}"


def _timed(result: SearchResult) -> bool:
    return result.gains is not None and result.gains.measured
