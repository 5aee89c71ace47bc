"""What is rounded for a product is rounded for it alone."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphEdit
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.static_int8 import spare_other_readers
from edgeclip.export.quantizing.write_config import write_config
from tests.export.quantizing.small_graphs import batches, copy_of, graph_of, run

make = helper.make_node
DRAW = np.random.default_rng(0)


def post_norm() -> onnx.ModelProto:
    """As in a BERT: a norm is read by two products and by the sum behind them."""
    weights = {
        "scale": np.ones(16),
        "w1": DRAW.normal(size=(16, 32)),
        "w2": DRAW.normal(size=(16, 32)),
        "w3": DRAW.normal(size=(32, 16)) / 10_000,
    }
    nodes = [
        make("LayerNormalization", ["x", "scale"], ["normed"], "norm"),
        make("MatMul", ["normed", "w1"], ["a"], "first"),
        make("MatMul", ["normed", "w2"], ["b"], "second"),
        make("Mul", ["a", "b"], ["ab"], "gate"),
        make("MatMul", ["ab", "w3"], ["c"], "third"),
        make("Add", ["normed", "c"], ["y"], "residual"),
    ]
    return graph_of(nodes, weights, given=["n", 16], outputs={"y": ["n", 16]})


@pytest.mark.parametrize("kept", [(), ("second",)], ids=["whole", "one product in float"])
def test_a_residual_sum_reads_floats(kept: tuple[str, ...], tmp_path: Path) -> None:
    model, values = post_norm(), DRAW.normal(size=(64, 16)).astype(np.float32)
    save_graph(copy_of(model), tmp_path / "f.onnx")
    config = StaticInt8(symmetric=False, kept=kept)
    write_config(tmp_path / "f.onnx", tmp_path / "q.onnx", config, batches(values))
    quantized = load_graph(tmp_path / "q.onnx")
    edit = GraphEdit(quantized)
    readers = {node.name for node in edit.readers("normed")}
    assert {"residual", *kept} < readers
    rounded = {node.name for node in quantized.graph.node if node.input[0].startswith("normed_")}
    assert {"first", "second", *kept} - set(kept) <= rounded
    (found,), (right,) = run(quantized, values), run(model, values)
    # The norm itself goes through; in 8 bits it would be off by up to 0.01.
    assert 0 < np.abs(found - right).max() < 0.003


def test_chains_of_convolutions_are_left_alone(tmp_path: Path) -> None:
    weights = {"w1": DRAW.normal(size=(4, 4, 3, 3)), "w2": DRAW.normal(size=(4, 4, 3, 3))}
    nodes = [
        make("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["r"], "act"),
        make("Conv", ["r", "w2"], ["b"], "second", pads=[1, 1, 1, 1]),
        make("Add", ["r", "b"], ["y"], "residual"),
    ]
    shape = ["n", 4, 8, 8]
    model = graph_of(nodes, weights, given=shape, outputs={"y": shape})
    save_graph(model, tmp_path / "f.onnx")
    data = batches(DRAW.normal(size=(16, 4, 8, 8)).astype(np.float32))
    config = StaticInt8(symmetric=False)
    write_config(tmp_path / "f.onnx", tmp_path / "q.onnx", config, data)
    made = load_graph(tmp_path / "q.onnx")
    (residual,) = (node for node in made.graph.node if node.name == "residual")
    assert all(name.endswith("DequantizeLinear_Output") for name in residual.input)
    again = copy_of(made)
    spare_other_readers(again)
    assert again == made
