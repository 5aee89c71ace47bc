"""A bundle's gates as a table for the terminal."""

from collections.abc import Iterable, Sequence

from edgeclip.runtime.bundle.manifest import GateRecord, GateRemark
from edgeclip.runtime.console import columns, plain_text


def gates_table(gates: Sequence[tuple[str, GateRecord]], remarks: Iterable[GateRemark] = ()) -> str:
    """Return one line for each gate, then the data they were measured on, then the remarks.

    Nothing in a name can move the cursor or colour the terminal.

    Args:
        gates: what each gate is about, such as "image int8", and the gate:
            `Manifest.all_gates`.
        remarks: warnings of the export: `Manifest.remarks`.
    """
    data = list(dict.fromkeys(gate.data for _, gate in gates if gate.data is not None))
    rows: list[tuple[str, ...]] = [("what", "gate", "value", "95% interval", "bound", "data", "")]
    rows += [
        (
            plain_text(subject),
            plain_text(gate.name),
            f"{gate.value:.5f}",
            f"{gate.low:.5f} to {gate.high:.5f}",
            f"{gate.direction} {gate.bound:g} {plain_text(gate.unit)}",
            "" if gate.data is None else f"[{data.index(gate.data) + 1}]",
            "pass" if gate.passed else "miss",
        )
        for subject, gate in gates
    ]
    lines = [columns(rows, left=len(rows[0]))]
    lines += [
        f"data [{number}]: {plain_text(item.name)}; {item.count:,} measured; "
        f"sha256 {item.sha256[:16]}"
        for number, item in enumerate(data, start=1)
    ]
    lines += [f"warning: {plain_text(str(remark))}" for remark in remarks]
    return "\n".join(lines)
