import json
from pathlib import Path
from typing import Any

import pytest

from edgeclip.profiles.layers.layer_profile import NodeKey, parse_trace, read_trace
from edgeclip.runtime.errors import EngineError


def node(name: str, op: str, microseconds: int, index: int = 0) -> dict[str, Any]:
    """An event as ONNX Runtime 1.31 writes it, without its notes on memory."""
    return {
        **{"cat": "Node", "pid": 1, "tid": 1, "dur": microseconds, "ts": 6, "ph": "X"},
        "name": f"{name}_kernel_time",
        "args": {
            "op_name": op,
            "provider": "CPUExecutionProvider",
            "node_index": str(index),
            "input_type_shape": [{"float": [1, 65, 128]}, {"int64": []}],
            "output_type_shape": [{"float": [1, 65, 384]}],
        },
    }


def session(name: str) -> dict[str, Any]:
    return {"cat": "Session", "dur": 9, "ts": 6, "ph": "X", "name": name, "args": {}}


def test_events_are_told_apart_by_run() -> None:
    fence = {**node("product", "MatMul", 1), "name": "product_fence_before"}
    events = [
        session("session_initialization"),
        *(node("product", "MatMul", 104), fence, node("sum", "Add", 3, 1)),
        session("SequentialExecutor::Execute"),
        session("model_run"),
        *(node("product", "MatMul", 100), session("model_run")),
        node("product", "MatMul", 7),  # of a run that did not end
    ]
    first, second = parse_trace(events)
    assert [(item.key.name, item.ms) for item in first] == [("product", 0.104), ("sum", 0.003)]
    assert [item.ms for item in second] == [0.1]
    assert first[1].key == NodeKey("sum", "Add", "1")
    assert first[0].inputs == (("float", (1, 65, 128)), ("int64", ()))
    assert first[0].outputs == (("float", (1, 65, 384)),)
    assert first[0].provider == "CPUExecutionProvider"


def test_nodes_inside_a_branch_are_not_counted_twice() -> None:
    events = [node("inner", "Add", 3), node("outer", "If", 5), session("model_run")]
    (run,) = parse_trace(events)
    assert [item.key.name for item in run] == ["inner"]


def test_what_is_no_trace(tmp_path: Path) -> None:
    for number, text in enumerate(("[", json.dumps([{"cat": "Node"}]), json.dumps([[]]))):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(EngineError, match="trace cannot be read"):
            read_trace(path)
    with pytest.raises(EngineError, match="trace cannot be read"):
        read_trace(tmp_path / "none.json")
