"""Where ONNX Runtime put a graph's nodes: on the provider that was asked for, or elsewhere.

ONNX Runtime gives what a provider cannot run to its CPU provider and says nothing. That is
right for the arithmetic on shapes, which GPU providers leave on the CPU on purpose, and
wrong for everything else. The list of nodes has operators but no types, so what is shape
arithmetic cannot be told for certain. The rule: operators that only move, describe or index
data may run elsewhere, all others may not. `Add`, `Mul` and the like are among the others,
although a graph may use them on shapes; and a provider that lacks `Gather` alone passes,
since the copy costs little.
"""

from pathlib import Path
from typing import Any

from edgeclip.runtime.errors import EngineError

RECORD = "session.record_ep_graph_assignment_info"
FORBID = "session.disable_cpu_ep_fallback"
_SHOWN = 5
_COMPUTES_NOTHING = frozenset(
    (
        "ArgMax",
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Equal",
        "Expand",
        "Gather",
        "Identity",
        "Range",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Squeeze",
        "Unsqueeze",
    )
)


def placement_entries(ort: Any) -> dict[str, str]:
    """Session configuration under which a silent fallback cannot go unnoticed.

    ONNX Runtime tells where nodes went since 1.24. Before that it can only be told to refuse
    any node on the CPU, shape arithmetic included: too strict for CUDA and a varying batch,
    but a false alarm with a way out is better than a silent fallback.
    """
    return {RECORD: "1"} if _can_tell(ort) else {FORBID: "1"}


def check_placement(ort: Any, session: Any, provider: str, path: Path) -> None:
    """Refuse a session that computes something elsewhere than on `provider`.

    Does nothing before ONNX Runtime 1.24, which refuses by itself: see `placement_entries`.

    Raises:
        EngineError: some nodes compute elsewhere; it names the first few.
    """
    if not _can_tell(ort):
        return
    total, elsewhere = 0, []
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = subgraph.get_nodes()
        total += len(nodes)
        if subgraph.ep_name != provider:
            elsewhere += [node for node in nodes if node.op_type not in _COMPUTES_NOTHING]
    if elsewhere:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in elsewhere[:_SHOWN])
        more = ", ..." if len(elsewhere) > _SHOWN else ""
        raise EngineError(
            f"{provider} leaves {len(elsewhere)} of the {total} nodes of {path} to another "
            f"provider: {names}{more}: use another precision or engine, or set cpu_fallback: true "
            "in the device profile"
        )


def is_refusal(error: Exception) -> bool:
    """Whether ONNX Runtime itself refused to place nodes on the CPU."""
    return "fallback to CPU EP has been explicitly disabled" in str(error)


def _can_tell(ort: Any) -> bool:
    return hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
