"""Gates as text: one line for each, then what they were measured on, then what is to be known."""

from collections.abc import Iterable, Sequence

from edgeclip.runtime.manifest import DataRecord, GateRecord, GateRemark
from edgeclip.runtime.model_card import plain_text
from edgeclip.runtime.text_columns import columns

Named = tuple[str, GateRecord]  # what a gate is about, such as "image int8", and the gate


def gates_table(gates: Sequence[Named], remarks: Iterable[GateRemark] = ()) -> str:
    """A table of gates with their data, and a line for each remark; safe to print.

    Args:
        gates: see `Manifest.all_gates`.
        remarks: see `Manifest.remarks`.
    """
    data = list(dict.fromkeys(gate.data for _, gate in gates if gate.data is not None))
    rows: list[tuple[str, ...]] = [("what", "gate", "value", "95% interval", "bound", "data", "")]
    rows += [_row(subject, gate, data) for subject, gate in gates]
    lines = [columns(rows, left=len(rows[0]))]
    lines += [f"data [{number}]: {data_text(item)}" for number, item in enumerate(data, start=1)]
    lines += [f"warning: {plain_text(str(remark))}" for remark in remarks]
    return "\n".join(lines)


def data_text(data: DataRecord) -> str:
    """What a gate was measured on, and the beginning of its hash."""
    return f"{plain_text(data.name)}; {data.count:,} measured; sha256 {data.sha256[:16]}"


def _row(subject: str, gate: GateRecord, data: Sequence[DataRecord]) -> tuple[str, ...]:
    return (
        plain_text(subject),
        plain_text(gate.name),
        f"{gate.value:.5f}",
        f"{gate.low:.5f} to {gate.high:.5f}",
        f"{gate.direction} {gate.bound:g} {plain_text(gate.unit)}",
        "" if gate.data is None else f"[{data.index(gate.data) + 1}]",
        "pass" if gate.passed else "miss",
    )
