"""Token tables in int8: exact formulas, and only where tokens are looked up."""

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.quantizing.dynamic_int8 import rounded_rows, store_tables, token_lookups
from tests.export.quantizing.collapse_models import TEXT_TOWER, TOKENS, captions
from tests.export.quantizing.small_graphs import copy_of, run

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
    whole, scales = rounded_rows(table)
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
    assert store_tables(model) == 1
    onnx.checker.check_model(model, full_check=True)
    whole, scales = rounded_rows(table)
    (found,) = run(model, ids)
    np.testing.assert_array_equal(found, whole[ids].astype(np.float32) * scales[ids, 0][..., None])
    assert {item.name for item in model.graph.initializer} == {"table_int8", "table_scale"}


def test_onnxruntimes_own_operator_gives_the_same_bits() -> None:
    table = np.random.default_rng(1).normal(size=(40, 32)).astype(np.float32)
    whole, scales = rounded_rows(table)
    ids = np.array([[3, 0, 39, 7]])
    model = lookup(table)
    store_tables(model)
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
    assert store_tables(shared) == 1
    assert "table" in {item.name for item in shared.graph.initializer}
    kept = lookup(table)
    before = kept.SerializeToString(deterministic=True)
    assert store_tables(kept, {"look_up"}) == 0
    assert kept.SerializeToString(deterministic=True) == before


def test_the_text_tower_loses_three_quarters_of_its_table_and_hardly_anything_else() -> None:
    model = load_graph(TEXT_TOWER)
    assert token_lookups(model) == ["node_embedding"]  # and not that of positions
    smaller = copy_of(model)
    assert store_tables(smaller) == 1
    (table,) = (item for item in model.graph.initializer if item.name == TOKENS)
    rows, width = table.dims
    saved = model.ByteSize() - smaller.ByteSize()
    assert abs(saved - (3 * rows * width - 4 * rows)) < 1000
    ids = captions(2, 25).batch(0)
    (found,), (right,) = run(smaller, ids), run(model, ids)
    assert (found * right).sum(axis=1).min() > 0.9999
