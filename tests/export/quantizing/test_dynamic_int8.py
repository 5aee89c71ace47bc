"""Dynamic int8 and int8 token tables: close to fp32; dynamic embeddings depend on the batch."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import DynamicInt8, StaticInt8
from edgeclip.export.quantizing.dynamic_int8 import (
    quantize_rows,
    quantize_token_tables,
    token_table_lookups,
    write_dynamic_int8,
)
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.runtime.bundle.index import cosines
from tests.export.quantizing.collapse_models import TEXT_LAYERS, TEXT_TOWER, TOKENS, captions
from tests.export.quantizing.small_graphs import copy_of, fused, run


@pytest.fixture(scope="module")
def texts() -> CalibrationData:
    return captions(2, 100)


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def apart(path: Path, ids: NDArray[np.int64]) -> float:
    """How far an embedding made alone is from the same one made in a batch."""
    model = load_graph(path)
    (together,) = run(model, ids)
    alone = np.concatenate([run(model, row[None])[0] for row in ids])
    return float(np.abs(alone - together).max())


def test_products_with_weights_are_quantized_and_nothing_else(tmp_path: Path) -> None:
    write_dynamic_int8(TEXT_TOWER, tmp_path / "q.onnx", reduce_range=False)
    found, before = kinds(tmp_path / "q.onnx"), kinds(TEXT_TOWER)
    assert found["MatMulInteger"] == len(quantizable_nodes(TEXT_TOWER))
    assert found["MatMulInteger"] == 6 * TEXT_LAYERS + 1
    assert found["MatMul"] == 2 * TEXT_LAYERS  # of attention
    assert found["Gather"] == before["Gather"]
    model = load_graph(tmp_path / "q.onnx")
    types = {item.name: item for item in model.graph.initializer}
    weights = [types[n.input[1]] for n in model.graph.node if n.op_type == "MatMulInteger"]
    assert {item.data_type for item in weights} == {onnx.TensorProto.INT8}
    zeros = [types[n.input[3]] for n in model.graph.node if n.op_type == "MatMulInteger"]
    assert [item.dims[0] for item in zeros] == [item.dims[1] for item in weights]


def test_an_embedding_depends_on_its_batch_and_a_static_one_does_not(
    texts: CalibrationData, tmp_path: Path
) -> None:
    """Why it is never a default: the same caption has another embedding beside others."""
    dynamic, static = tmp_path / "dynamic.onnx", tmp_path / "static.onnx"
    quantize_graph(TEXT_TOWER, dynamic, DynamicInt8(), texts)
    quantize_graph(TEXT_TOWER, static, StaticInt8(symmetric=False), texts)
    ids = texts.batch(0)
    assert apart(dynamic, ids) > 1e-3
    assert apart(static, ids) < 1e-5
    (found,), (right,) = run(load_graph(dynamic), ids), run(load_graph(TEXT_TOWER), ids)
    assert cosines(found, right).min() > 0.999


def test_less_range_kept_nodes_and_tables(texts: CalibrationData, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    kept = quantizable_nodes(TEXT_TOWER)[-1]
    write_dynamic_int8(TEXT_TOWER, path, reduce_range=True, kept=[kept], int8_tables=True)
    model = load_graph(path)
    assert kinds(path)["MatMulInteger"] == len(quantizable_nodes(TEXT_TOWER)) - 1
    weights = [n.input[1] for n in model.graph.node if n.op_type == "MatMulInteger"]
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert max(np.abs(values[name].astype(int)).max() for name in weights) <= 64
    write_dynamic_int8(TEXT_TOWER, tmp_path / "float_table.onnx", reduce_range=True, kept=[kept])
    assert path.stat().st_size < (tmp_path / "float_table.onnx").stat().st_size - 700_000
    (found,), (right,) = run(model, texts.batch(0)), run(load_graph(TEXT_TOWER), texts.batch(0))
    assert cosines(found, right).min() > 0.999


def test_a_tower_with_everything_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no MatMul or Gemm"):
        write_dynamic_int8(
            TEXT_TOWER,
            tmp_path / "q.onnx",
            reduce_range=False,
            kept=quantizable_nodes(TEXT_TOWER),
        )
    assert not (tmp_path / "q.onnx").exists()


def test_fused_and_merged_graphs_are_quantized_too(clip_towers: TowerPaths, tmp_path: Path) -> None:
    """What follows a fused node has no inferred type: ONNX does not know its operator."""
    model = load_graph(clip_towers.image)
    model = fused(model)
    save_graph(model, tmp_path / "fused.onnx")
    write_dynamic_int8(tmp_path / "fused.onnx", tmp_path / "q.onnx", reduce_range=False)
    assert kinds(tmp_path / "q.onnx")["MatMulInteger"] > 0
    assert not set(quantizable_nodes(tmp_path / "fused.onnx")) & {
        node.name for node in onnx.load(tmp_path / "q.onnx").graph.node if node.op_type == "MatMul"
    }


make = helper.make_node


def lookup(table: NDArray[np.float32], *more: onnx.NodeProto) -> onnx.ModelProto:
    """Look up int64 [batch, length] in a table."""
    width = table.shape[1]
    nodes = [make("Gather", ["table", "x"], ["y"], "look_up"), *more]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", width])]
    outputs += [helper.make_empty_tensor_value_info(node.output[0]) for node in more]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", "length"])],
        outputs,
        [numpy_helper.from_array(table, "table")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


tables = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-1000, 1000, width=32),
)


@given(table=tables)
def test_no_value_is_off_by_more_than_half_a_step_of_its_row(table: NDArray[np.float32]) -> None:
    whole, scales = quantize_rows(table)
    assert whole.dtype == np.int8
    assert scales.shape == (len(table), 1)
    assert (scales > 0).all()
    error = np.abs(whole.astype(np.float64) * scales - table)
    assert (error <= 0.5001 * scales + 1e-37).all()


def test_a_looked_up_vector_is_its_steps_times_its_scale() -> None:
    table = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    table[3] *= 1000
    table[4] = 0
    ids = np.array([[3, 0, 39], [4, 4, 7]])
    model = lookup(table)
    assert quantize_token_tables(model) == 1
    onnx.checker.check_model(model, full_check=True)
    whole, scales = quantize_rows(table)
    (found,) = run(model, ids)
    np.testing.assert_array_equal(found, whole[ids].astype(np.float32) * scales[ids, 0][..., None])
    assert {item.name for item in model.graph.initializer} == {"table_int8", "table_scale"}


def test_onnxruntimes_own_operator_gives_the_same_bits() -> None:
    table = np.random.default_rng(1).normal(size=(40, 32)).astype(np.float32)
    whole, scales = quantize_rows(table)
    ids = np.array([[3, 0, 39, 7]])
    model = lookup(table)
    quantize_token_tables(model)
    own = lookup(table)
    own.graph.node[0].CopyFrom(
        make(
            "GatherBlockQuantized",
            ["whole", "x", "scales"],
            ["y"],
            domain="com.microsoft",
            bits=8,
            block_size=32,
            quantize_axis=1,
        )
    )
    del own.graph.initializer[:]
    unsigned = (whole.astype(np.int16) + 128).astype(np.uint8)
    own.graph.initializer.append(numpy_helper.from_array(unsigned, "whole"))
    own.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    np.testing.assert_array_equal(run(model, ids)[0], run(own, ids)[0])


def test_a_table_that_is_read_elsewhere_or_kept_stays() -> None:
    table = np.eye(5, dtype=np.float32)
    shared = lookup(table, make("MatMul", ["y", "table"], ["z"], "tied"))
    assert quantize_token_tables(shared) == 1
    assert "table" in {item.name for item in shared.graph.initializer}
    kept = lookup(table)
    before = kept.SerializeToString(deterministic=True)
    assert quantize_token_tables(kept, {"look_up"}) == 0
    assert kept.SerializeToString(deterministic=True) == before


def test_the_text_tower_loses_three_quarters_of_its_table_and_hardly_anything_else() -> None:
    model = load_graph(TEXT_TOWER)
    assert token_table_lookups(model) == ["node_embedding"]  # and not that of positions
    smaller = copy_of(model)
    assert quantize_token_tables(smaller) == 1
    (table,) = (item for item in model.graph.initializer if item.name == TOKENS)
    rows, width = table.dims
    saved = model.ByteSize() - smaller.ByteSize()
    assert abs(saved - (3 * rows * width - 4 * rows)) < 1000
    ids = captions(2, 25).batch(0)
    (found,), (right,) = run(smaller, ids), run(model, ids)
    assert (found * right).sum(axis=1).min() > 0.9999
