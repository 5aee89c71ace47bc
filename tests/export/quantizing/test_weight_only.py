"""Weights in few bits: exact formulas, small files, and no embedding that depends on another."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.quantizing.dynamic_int8 import token_table_lookups
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.export.quantizing.weight_only import PackedWeight, pack, write_weight_only
from edgeclip.runtime.bundle.index import cosines
from tests.export.quantizing.collapse_models import TEXT_LAYERS, TEXT_TOWER, captions
from tests.export.quantizing.small_graphs import graph_of, run

EVERY = [(bits, block) for bits in (4, 8) for block in (32, 64, 128)]
each = pytest.mark.parametrize(("bits", "block"), EVERY)


@pytest.fixture(scope="module")
def texts() -> CalibrationData:
    return captions(2, 100)


def whole_numbers(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Undo the packing along the last axis."""
    if bits == 8:
        return values
    return np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def unpacked(made: PackedWeight, bits: int, inputs: int) -> NDArray[np.float64]:
    """The weight [inputs, outputs] that MatMulNBits computes with: (q - z) * s."""
    outputs, blocks, _ = made.packed.shape
    whole = whole_numbers(made.packed, bits).astype(np.float64)
    zeros = np.full((outputs, blocks), 128)
    if made.zeros is not None:
        zeros = whole_numbers(made.zeros.reshape(outputs, -1), bits)[:, :blocks]
    weight = (whole - zeros[..., None]) * made.scales.reshape(outputs, blocks, 1)
    return np.asarray(weight.reshape(outputs, -1)[:, :inputs].T, np.float64)


@pytest.mark.parametrize("bits", [4, 8])
@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 70), st.integers(1, 4)),
        elements=st.floats(-100, 100, width=32),
    )
)
def test_weights_lose_about_half_a_step(bits: int, weight: NDArray[np.float32]) -> None:
    made = pack(weight, bits, 32)
    blocks = -(-len(weight) // 32)
    assert made.packed.shape == (weight.shape[1], blocks, 32 * bits // 8)
    found = unpacked(made, bits, len(weight))
    padded = np.zeros((blocks * 32, weight.shape[1]))
    padded[: len(weight)] = weight
    parts = padded.reshape(blocks, 32, -1)
    spread = np.maximum(parts.max(axis=1), 0) - np.minimum(parts.min(axis=1), 0)
    largest = np.abs(parts).max(axis=1)
    step = largest / 127 if bits == 8 else spread / 15
    # What is drawn in to round the others better is cut off itself, for less in sum.
    allowed = 0.5 if bits == 8 else 0.5 * np.sqrt(32) * 2
    error = np.abs(found - weight).max(axis=0)
    assert (error <= allowed * step.max(axis=0) * 1.001 + 1e-6).all()


def test_a_range_is_drawn_in_only_where_the_block_gains() -> None:
    draw = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    even = np.tile(np.linspace(-7, 8, 16, dtype=np.float32), 4)[:, None]
    assert np.abs(unpacked(pack(even, 4, 32), 4, 64) - even).max() < 1e-6
    low, high = draw.reshape(2, 32, 8).min(axis=1), draw.reshape(2, 32, 8).max(axis=1)
    step = ((high - low) / 15)[:, None]
    zero = np.rint(-low[:, None] / step)
    plain = (np.clip(np.rint(draw.reshape(2, 32, 8) / step) + zero, 0, 15) - zero) * step
    ours = unpacked(pack(draw, 4, 32), 4, 64)
    assert np.square(ours - draw).sum() < np.square(plain.reshape(64, 8) - draw).sum()


@each
@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "GemmB"])
def test_the_kernel_computes_with_exactly_these_weights(
    operator: str, bits: int, block: int, tmp_path: Path
) -> None:
    """One-hot rows are exact in int8, so each gives a row of the weight (and the bias)."""
    draw = np.random.default_rng(1)
    weight = draw.normal(size=(96, 24)).astype(np.float32)
    bias = draw.normal(size=24).astype(np.float32)
    gemm = operator != "MatMul"
    weights = {"w": weight.T if operator == "GemmB" else weight} | ({"b": bias} if gemm else {})
    node = helper.make_node(operator[:4] if gemm else operator, ["x", *weights], ["y"], "product")
    if operator == "GemmB":
        node.attribute.append(helper.make_attribute("transB", 1))
    last = helper.make_node("MatMul", ["y", "same"], ["z"], "last")
    weights["same"] = np.eye(24, dtype=np.float32)
    model = graph_of([node, last], weights, given=["n", 96], outputs={"z": ["n", 24]})
    save_graph(model, tmp_path / "f.onnx")
    source, target = tmp_path / "f.onnx", tmp_path / "q.onnx"
    write_weight_only(source, target, bits=bits, block=block, kept=["last"])
    (found,) = run(load_graph(tmp_path / "q.onnx"), np.eye(96, dtype=np.float32) * 127)
    right = 127 * unpacked(pack(weight, bits, block), bits, 96) + (bias if gemm else 0)
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


@each
def test_the_text_tower_is_small_and_close(
    bits: int, block: int, texts: CalibrationData, tmp_path: Path
) -> None:
    path = tmp_path / "q.onnx"
    write_weight_only(TEXT_TOWER, path, bits=bits, block=block)
    model = load_graph(path)
    kinds = Counter(node.op_type for node in model.graph.node)
    count = len(quantizable_nodes(TEXT_TOWER))
    assert count == 6 * TEXT_LAYERS + 1  # four of attention, two of the MLP, and the projection
    assert kinds["MatMulNBits"] == count
    assert kinds["MatMul"] == 2 * TEXT_LAYERS  # of attention
    widths = [
        next(item.i for item in node.attribute if item.name == "bits")
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert widths == [bits] * (count - 1) + [8]
    assert path.stat().st_size < TEXT_TOWER.stat().st_size * (0.22 if bits == 4 else 0.29)
    (found,), (right,) = run(model, texts.batch(0)), run(load_graph(TEXT_TOWER), texts.batch(0))
    assert cosines(found, right).min() > (0.997 if bits == 4 else 0.9995)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_embedding_depends_on_its_batch(
    bits: int, texts: CalibrationData, tmp_path: Path
) -> None:
    write_weight_only(TEXT_TOWER, tmp_path / "q.onnx", bits=bits, block=32)
    model, ids = load_graph(tmp_path / "q.onnx"), texts.batch(0)
    (together,) = run(model, ids)
    alone = np.concatenate([run(model, row[None])[0] for row in ids])
    # One row may be summed in another order than many, and then round to the next int8.
    np.testing.assert_allclose(alone, together, atol=5e-4)
    assert np.median(np.abs(alone - together)) < 1e-6


def test_kept_nodes_and_tables_stay_as_they_are(tmp_path: Path) -> None:
    products, (table,) = quantizable_nodes(TEXT_TOWER), token_table_lookups(load_graph(TEXT_TOWER))
    kept = [products[0], table]
    write_weight_only(TEXT_TOWER, tmp_path / "q.onnx", bits=8, block=32, kept=kept)
    before = {node.name: node for node in load_graph(TEXT_TOWER).graph.node}
    after = {node.name: node for node in load_graph(tmp_path / "q.onnx").graph.node}
    assert all(after[name] == before[name] for name in kept)
    assert all(after[name].op_type == "MatMulNBits" for name in products[1:])


def test_a_scaled_gemm_is_left_alone_and_then_nothing_is_left(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "product", alpha=2.0)
    weights = {"w": np.eye(32, dtype=np.float32)}
    model = graph_of([node], weights, given=["n", 32], outputs={"y": ["n", 32]})
    save_graph(model, tmp_path / "f.onnx")
    with pytest.raises(ExportError, match="stored in 4 bits"):
        write_weight_only(tmp_path / "f.onnx", tmp_path / "q.onnx", bits=4, block=32)
    assert not (tmp_path / "q.onnx").exists()


def test_a_weight_of_two_products_is_packed_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "second"),
    ]
    weights = {"w": np.random.default_rng(0).normal(size=(32, 32))}
    model = graph_of(nodes, weights, given=["n", 32], outputs={"y": ["n", 32]})
    save_graph(model, tmp_path / "f.onnx")
    write_weight_only(tmp_path / "f.onnx", tmp_path / "q.onnx", bits=8, block=32)
    stored = load_graph(tmp_path / "q.onnx").graph.initializer
    assert sorted(numpy_helper.to_array(item).dtype.name for item in stored) == ["float32", "uint8"]
    assert {item.domain for item in onnx.load(tmp_path / "q.onnx").opset_import} >= {
        "com.microsoft"
    }
