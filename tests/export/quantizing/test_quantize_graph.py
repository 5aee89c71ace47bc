"""Every config gives a sound file, names only what is there, and is calibrated once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.activation_ranges import Ranging
from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    Float32,
    StaticInt8,
    WeightOnly,
    describe,
)
from edgeclip.export.quantizing.dynamic_int8 import token_table_lookups
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.spec import Tower
from tests.export.quantizing.small_graphs import run

pytestmark = pytest.mark.slow

Make = Callable[..., Source]

CPU = StaticInt8(symmetric=False, reduce_range=True)
CUT = Ranging(method="percentile")
EVERY: list[Config] = [
    Float32(),
    Float16(),
    CPU,
    StaticInt8(symmetric=False, per_channel=False, ranging=Ranging(method="percentile")),
    StaticInt8(symmetric=False, int8_tables=True),
    StaticInt8(symmetric=True, float_precision="fp16"),
    StaticInt8(symmetric=True, per_channel=False),
    DynamicInt8(int8_tables=True),
    WeightOnly(bits=8),
    WeightOnly(bits=4, block=64),
    Float8(),
]
QUANTIZED: list[Config] = [
    CPU,
    StaticInt8(symmetric=True),
    DynamicInt8(),
    WeightOnly(bits=8),
    Float8(),
]
each = pytest.mark.parametrize("config", EVERY, ids=describe)


@pytest.fixture(scope="module")
def texts(clip: DualEncoder, blobs: Make) -> CalibrationData:
    return calibration_texts(blobs(32, seed=1), clip.text_tokenizer)


@pytest.fixture(scope="module")
def pictures(clip: DualEncoder, blobs: Make) -> CalibrationData:
    return calibration_images(blobs(32, seed=1), clip.image_spec)


def unseen() -> CalibrationData:
    """What must not be looked at."""

    def batch(index: int) -> NDArray[Any]:
        raise AssertionError("calibrated again")

    return CalibrationData(1, batch)


@each
@pytest.mark.parametrize("tower", ["image", "text"])
def test_it_embeds_nearly_as_fp32(
    tower: Tower,
    config: Config,
    clip_towers: TowerPaths,
    texts: CalibrationData,
    pictures: CalibrationData,
    tmp_path: Path,
) -> None:
    source = clip_towers.graph(tower).path
    data = texts if tower == "text" else pictures
    quantize_graph(source, tmp_path / "made.onnx", config, data)
    (found,) = run(load_graph(tmp_path / "made.onnx"), data.batch(0))
    (right,) = run(load_graph(source), data.batch(0))
    assert cosines(found, right).min() > (0.9 if config == WeightOnly(bits=4, block=64) else 0.97)


@pytest.mark.parametrize("config", QUANTIZED, ids=describe)
def test_the_same_config_gives_the_same_bytes(
    config: Config, clip_towers: TowerPaths, texts: CalibrationData, tmp_path: Path
) -> None:
    for name in ("made", "again"):
        quantize_graph(clip_towers.text, tmp_path / f"{name}.onnx", config, texts)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "made.onnx").read_bytes()


@pytest.mark.parametrize("config", QUANTIZED, ids=describe)
def test_kept_nodes_stay_in_float(
    config: Config, clip_towers: TowerPaths, texts: CalibrationData, tmp_path: Path
) -> None:
    kept = tuple(quantizable_nodes(clip_towers.text)[2:5])
    path = tmp_path / "made.onnx"
    made: Config = type(config)(**{**_fields(config), "kept": kept})
    quantize_graph(clip_towers.text, path, made, texts)
    model = load_graph(path)
    constants = {item.name: item.data_type for item in model.graph.initializer}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    nodes = {node.name: node for node in model.graph.node}
    assert {nodes[name].op_type for name in kept} == {"MatMul"}
    assert all(constants[nodes[name].input[1]] in floats for name in kept)
    quantize_graph(clip_towers.text, path, config, texts)
    assert not set(kept) & {
        node.name
        for node in load_graph(path).graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }


def test_islands_stay_in_fp32(
    clip_towers: TowerPaths, texts: CalibrationData, tmp_path: Path
) -> None:
    source = load_graph(clip_towers.text).graph
    islands = tuple(node.name for node in source.node if node.op_type == "Softmax")
    quantize_graph(clip_towers.text, tmp_path / "h.onnx", Float16(islands=islands), texts)
    graph = onnx.shape_inference.infer_shapes(load_graph(tmp_path / "h.onnx")).graph
    types = {item.name: item.type.tensor_type.elem_type for item in graph.value_info}
    made = {types[node.output[0]] for node in graph.node if node.name in islands}
    assert made == {TensorProto.FLOAT}


@pytest.mark.parametrize(
    "config",
    [
        Float16(islands=("node_nowhere", "softmax_9")),
        StaticInt8(symmetric=False, kept=("node_nowhere",), smoothing=(("softmax_9", 0.5),)),
        DynamicInt8(kept=("node_nowhere", "softmax_9")),
        WeightOnly(bits=8, kept=("node_nowhere", "softmax_9")),
        Float8(kept=("node_nowhere", "softmax_9")),
    ],
    ids=describe,
)
def test_names_that_are_not_in_the_graph_are_refused(
    config: Config, clip_towers: TowerPaths, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="no node named node_nowhere, softmax_9"):
        quantize_graph(clip_towers.text, tmp_path / "made.onnx", config, unseen())
    assert not (tmp_path / "made.onnx").exists()


@pytest.mark.parametrize("config", QUANTIZED, ids=describe)
def test_everything_kept_is_refused(
    config: Config, clip_towers: TowerPaths, texts: CalibrationData, tmp_path: Path
) -> None:
    tables = token_table_lookups(load_graph(clip_towers.text))
    kept = (*quantizable_nodes(clip_towers.text), *tables)
    made: Config = type(config)(**{**_fields(config), "kept": kept})
    with pytest.raises(ExportError):
        quantize_graph(clip_towers.text, tmp_path / "made.onnx", made, texts)
    assert not (tmp_path / "made.onnx").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (CPU, StaticInt8(symmetric=False, kept=("node_linear_12",), int8_tables=True)),
        (
            StaticInt8(symmetric=False, ranging=CUT),
            StaticInt8(symmetric=False, ranging=CUT, per_channel=False),
        ),
        (
            StaticInt8(symmetric=True, ranging=CUT),
            StaticInt8(symmetric=True, ranging=CUT, float_precision="fp16"),
        ),
        (Float16(), Float8(kept=("node_linear_12",))),
    ],
    ids=describe,
)
def test_a_cache_spares_the_next_config_its_calibration(
    first: Config,
    second: Config,
    clip_towers: TowerPaths,
    texts: CalibrationData,
    tmp_path: Path,
) -> None:
    source, cache = clip_towers.text, tmp_path / "cache"
    second = _of_graph(second, source)
    quantize_graph(source, tmp_path / "first.onnx", first, texts, cache=cache)
    quantize_graph(source, tmp_path / "second.onnx", second, unseen(), cache=cache)
    for name, config in (("first", first), ("second", second)):
        quantize_graph(source, tmp_path / "plain.onnx", config, texts)
        made = tmp_path / f"{name}.onnx"
        assert made.read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_a_cache_is_of_one_graph_and_one_way_of_ranging(
    clip_towers: TowerPaths, texts: CalibrationData, pictures: CalibrationData, tmp_path: Path
) -> None:
    cache, target = tmp_path / "cache", tmp_path / "made.onnx"
    quantize_graph(clip_towers.text, target, CPU, texts, cache=cache)
    quantize_graph(clip_towers.image, target, CPU, pictures, cache=cache)
    assert len(list(cache.iterdir())) == 2
    other = StaticInt8(symmetric=False, ranging=CUT)
    with pytest.raises(AssertionError, match="calibrated again"):
        quantize_graph(clip_towers.text, target, other, unseen(), cache=cache)


def test_one_scale_for_a_whole_weight(
    clip_towers: TowerPaths, texts: CalibrationData, tmp_path: Path
) -> None:
    for symmetric in (False, True):
        config = StaticInt8(symmetric=symmetric, per_channel=False)
        quantize_graph(clip_towers.text, tmp_path / "made.onnx", config, texts)
        graph = load_graph(tmp_path / "made.onnx").graph
        shapes = {item.name: list(item.dims) for item in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert nodes
        assert all(np.prod(shapes[node.input[1]]) == 1 for node in nodes)


def _fields(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _of_graph(config: Config, source: Path) -> Config:
    """Keep the last product of the graph where the config keeps one."""
    if not getattr(config, "kept", ()):
        return config
    return type(config)(**{**_fields(config), "kept": (quantizable_nodes(source)[-1],)})
