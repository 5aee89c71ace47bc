"""Dynamic int8: close to fp32, and a different embedding in every company."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import DynamicInt8, StaticInt8
from edgeclip.export.quantizing.dynamic_int8 import write_dynamic_int8
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.runtime.quality.retrieval import cosines
from tests.export.quantizing.collapse_models import TEXT_TOWER, captions
from tests.export.quantizing.small_graphs import fused, run


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
    assert found["MatMulInteger"] == len(quantizable_nodes(TEXT_TOWER)) == 13
    assert found["MatMul"] == 4  # of attention
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
    write_config(TEXT_TOWER, dynamic, DynamicInt8(), texts)
    write_config(TEXT_TOWER, static, StaticInt8(symmetric=False), texts)
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
    assert kinds(path)["MatMulInteger"] == 12
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
