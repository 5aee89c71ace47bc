"""The trace that ONNX Runtime writes when it profiles: which node ran when, and for how long.

A JSON list of events, Chrome's trace format (onnxruntime.ai/docs/performance/tune-performance/
profiling-tools.html). Each run ends with one `model_run` of category "Session"; before it come
its nodes, category "Node", with durations in whole microseconds.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.inspecting.node_costs import TensorType

_KERNEL = "_kernel_time"
_HOLDS_NODES = {"If", "Loop", "Scan"}  # the nodes inside have events of their own


@dataclass(frozen=True, slots=True)
class NodeKey:
    """What tells a node of the optimised graph from the others; names may repeat."""

    name: str
    op: str
    index: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """One run of one node.

    `inputs` and `outputs` are types and shapes; inputs that the node does not have, or whose
    kernel holds its own copy of them, are left out.
    """

    key: NodeKey
    provider: str
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    ms: float


def read_trace(path: Path) -> list[list[NodeRun]]:
    """The nodes of each run, in order.

    Raises:
        EngineError: the file cannot be read, or is not such a trace.
    """
    try:
        return parse_trace(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"ONNX Runtime's trace cannot be read ({error!r}): use a released onnxruntime"
        ) from error


def parse_trace(events: Iterable[dict[str, Any]]) -> list[list[NodeRun]]:
    """As `read_trace`, for events that were read already. A run that did not end is left out."""
    runs: list[list[NodeRun]] = []
    nodes: list[NodeRun] = []
    for event in events:
        kind, name = event["cat"], event["name"]
        if (kind, name) == ("Session", "model_run"):
            runs.append(nodes)
            nodes = []
        elif kind == "Node" and name.endswith(_KERNEL):
            node = _node(name.removesuffix(_KERNEL), event)
            if node.key.op not in _HOLDS_NODES:
                nodes.append(node)
    return runs


def _node(name: str, event: dict[str, Any]) -> NodeRun:
    facts = event["args"]
    return NodeRun(
        key=NodeKey(name, facts["op_name"], str(facts.get("node_index", ""))),
        provider=facts["provider"],
        inputs=_tensors(facts.get("input_type_shape") or ()),
        outputs=_tensors(facts.get("output_type_shape") or ()),
        ms=event["dur"] / 1e3,
    )


def _tensors(listed: Sequence[dict[str, list[int]]]) -> tuple[TensorType, ...]:
    return tuple((kind, tuple(shape)) for item in listed for kind, shape in item.items())
