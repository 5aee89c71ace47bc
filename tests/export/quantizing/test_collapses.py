"""Three collapses that quantizing is known for: the naive way misses its gates, ours passes.

Towers are real, see `collapse_models`. fp16 is run as it is where it is native, because a CPU
that computes fp16 graphs in fp32 hides the first collapse.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.quantizing.config import Config, DynamicInt8, Float16, StaticInt8, WeightOnly
from edgeclip.export.quantizing.fp16 import emulate_fp16
from edgeclip.export.quantizing.mixed_fp16 import embed_graph
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from tests.export.quantizing.collapse_models import (
    TEXT_TOWER,
    captions,
    decompose_layer_norms,
    naive_dynamic_int8,
    naive_half,
    with_lowest_mask,
    with_massive_activation,
    with_outsized_token,
    within,
)

HALF, INT8 = DEFAULT_BOUNDS["fp16"], DEFAULT_BOUNDS["int8"]


@pytest.fixture(scope="module")
def seen() -> CalibrationData:
    return captions(1, 100)


@pytest.fixture(scope="module")
def unseen() -> CalibrationData:
    return captions(2, 200)


def planted(path: Path, *changes: Callable[[onnx.ModelProto], None]) -> Path:
    model = load_graph(TEXT_TOWER)
    for change in changes:
        change(model)
    save_graph(model, path)
    return path


def in_half(path: Path, data: CalibrationData) -> NDArray[np.float32]:
    return embed_graph(emulate_fp16(load_graph(path)), data)


def test_a_layer_norm_taken_apart_overflows_fp16(
    seen: CalibrationData, unseen: CalibrationData, tmp_path: Path
) -> None:
    """The square of 400 is beyond fp16, and the variance with it."""
    source = planted(tmp_path / "f.onnx", with_massive_activation, decompose_layer_norms)
    right = embed_graph(load_graph(source), unseen)
    naive_half(source, tmp_path / "naive.onnx")
    assert not within(in_half(tmp_path / "naive.onnx", unseen), right, HALF)
    quantize_graph(source, tmp_path / "ours.onnx", Float16(), seen)
    assert within(in_half(tmp_path / "ours.onnx", unseen), right, HALF)


def test_the_same_layer_norm_as_one_operator_does_not(
    unseen: CalibrationData, tmp_path: Path
) -> None:
    """Which is why the exporter refuses any other: even the naive way is then sound."""
    source = planted(tmp_path / "f.onnx", with_massive_activation)
    naive_half(source, tmp_path / "naive.onnx")
    right = embed_graph(load_graph(source), unseen)
    assert within(in_half(tmp_path / "naive.onnx", unseen), right, HALF)


def test_the_lowest_number_as_a_mask_is_infinite_in_fp16(
    seen: CalibrationData, unseen: CalibrationData, tmp_path: Path
) -> None:
    """What may be seen is masked by 0 times the constant, which is NaN if that is infinite."""
    source = planted(tmp_path / "f.onnx", with_lowest_mask)
    right = embed_graph(load_graph(source), unseen)
    np.testing.assert_allclose(right, embed_graph(load_graph(TEXT_TOWER), unseen), atol=1e-5)
    naive_half(source, tmp_path / "naive.onnx", cut=False)
    naive = in_half(tmp_path / "naive.onnx", unseen)
    assert np.isnan(naive).any()
    assert not within(naive, right, HALF)
    quantize_graph(source, tmp_path / "ours.onnx", Float16(), seen)
    assert within(in_half(tmp_path / "ours.onnx", unseen), right, HALF)


@pytest.mark.parametrize(
    "config",
    [
        DynamicInt8(),
        DynamicInt8(int8_tables=True),
        StaticInt8(symmetric=False, int8_tables=True),
        WeightOnly(bits=8),
        WeightOnly(bits=4),
    ],
    ids=["dynamic", "dynamic with table", "static with table", "8 bits", "4 bits"],
)
def test_one_outsized_token_takes_the_digits_of_all_others(
    config: Config, seen: CalibrationData, unseen: CalibrationData, tmp_path: Path
) -> None:
    """It is in none of the texts: its share in the one scale of the table is enough."""
    source = planted(tmp_path / "f.onnx", with_outsized_token)
    right = embed_graph(load_graph(source), unseen)
    naive_dynamic_int8(source, tmp_path / "naive.onnx")
    assert not within(embed_graph(load_graph(tmp_path / "naive.onnx"), unseen), right, INT8)
    quantize_graph(source, tmp_path / "ours.onnx", config, seen)
    assert within(embed_graph(load_graph(tmp_path / "ours.onnx"), unseen), right, INT8)
