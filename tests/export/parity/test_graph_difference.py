import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import calibration_images, calibration_texts
from edgeclip.export.graph.embedders import tower_inputs
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphValues, Opener, relative_error
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.parity.torch_parity import GraphDifference, find_first_difference
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.runtime.arrays import Outputs
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

pytestmark = pytest.mark.slow

# Those of the two tiny CLIP towers whose second input is a weight: six in each of two layers.
PRODUCTS = range(12)
TOWERS: tuple[Tower, ...] = ("image", "text")
# Relative errors beyond what rounding alone does to a value inside a sound tower.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.1}


def find_difference(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    feed: Outputs,
    *,
    device: DeviceProfile,
    tolerance: float,
    open_candidate: Opener | None = None,
) -> GraphDifference | None:
    """Run both graphs on the same inputs, and find the first node that differs."""
    on_device = functools.partial(open_engine, device=device)
    return find_first_difference(
        GraphValues(reference, feed, on_device),
        GraphValues(candidate, feed, open_candidate or on_device),
        tolerance,
    )


@pytest.fixture(scope="module")
def feeds(clip: DualEncoder, blobs: Callable[..., Any]) -> dict[Tower, Outputs]:
    """Four inputs for each tower; the texts are shorter than the context."""
    found: dict[Tower, Outputs] = {}
    for tower in TOWERS:
        values = next(tower_inputs(clip, tower, blobs(4)))
        found[tower] = tower_feed(values, tower, "float32-nchw", clip.spec.image)
    return found


@pytest.fixture(scope="module")
def towers(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[Tower, Precision], onnx.ModelProto]:
    folder = tmp_path_factory.mktemp("towers")
    found: dict[tuple[Tower, Precision], onnx.ModelProto] = {}
    settings = StaticInt8(symmetric=False, reduce_range=True)
    for tower in TOWERS:
        source = clip_towers.image if tower == "image" else clip_towers.text
        found[tower, "fp32"] = load_graph(source)
        write_fp16(source, folder / "fp16.onnx")
        found[tower, "fp16"] = load_graph(folder / "fp16.onnx")
        data = (
            calibration_images(blobs(16), clip.spec.image)
            if tower == "image"
            else calibration_texts(blobs(16), clip.text_tokenizer)
        )
        write_int8(source, folder / "int8.onnx", data, settings)
        found[tower, "int8"] = load_graph(folder / "int8.onnx")
    return found


def weight_of(model: onnx.ModelProto, product: int) -> tuple[onnx.NodeProto, onnx.TensorProto]:
    """The product's node, and the constant behind its weights, Q/DQ or casts notwithstanding."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {item.name: item for item in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        name = node.input[1]
        while name in makers and makers[name].op_type in ("DequantizeLinear", "Cast"):
            name = makers[name].input[0]
        if name in constants:
            found.append((node, constants[name]))
    assert len(found) == len(PRODUCTS)
    return found[product]


def broken(model: onnx.ModelProto, product: int) -> tuple[onnx.ModelProto, onnx.NodeProto]:
    """A copy in which one product's weights have the wrong sign."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    node, weight = weight_of(copy, product)
    values = -numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return copy, node


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_with_wrong_weights_is_found(
    tower: Tower,
    precision: Precision,
    product: int,
    towers: dict[tuple[Tower, Precision], onnx.ModelProto],
    feeds: dict[Tower, Outputs],
    cpu_device: DeviceProfile,
) -> None:
    candidate, node = broken(towers[tower, precision], product)
    found = find_difference(
        towers[tower, "fp32"],
        candidate,
        feeds[tower],
        device=cpu_device,
        tolerance=TOLERANCES[precision],
    )
    assert found is not None
    assert (found.node, found.op_type, found.value) == (node.name, "MatMul", node.output[0])
    assert found.error == pytest.approx(2, rel=0.1)
    assert found.agreed_error is not None
    assert found.agreed_error < TOLERANCES[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_sound_tower_differs_nowhere(
    tower: Tower,
    precision: Precision,
    towers: dict[tuple[Tower, Precision], onnx.ModelProto],
    feeds: dict[Tower, Outputs],
    cpu_device: DeviceProfile,
) -> None:
    reference, candidate = (
        GraphValues(
            towers[tower, kind], feeds[tower], functools.partial(open_engine, device=cpu_device)
        )
        for kind in ("fp32", precision)
    )
    shared = [name for name in reference.names if name in candidate.names]
    assert len(shared) >= 0.9 * len(reference.names)
    right, found = reference.values(shared), candidate.values(shared)
    errors = {name: relative_error(right[name], found[name]) for name in shared}
    assert max(errors.values()) < TOLERANCES[precision] / 2
    assert (
        find_difference(
            towers[tower, "fp32"],
            towers[tower, precision],
            feeds[tower],
            device=cpu_device,
            tolerance=TOLERANCES[precision],
        )
        is None
    )


def test_a_shorter_text_finds_the_same_node(
    towers: dict[tuple[Tower, Precision], onnx.ModelProto],
    feeds: dict[Tower, Outputs],
    cpu_device: DeviceProfile,
) -> None:
    candidate, node = broken(towers["text", "fp32"], 7)
    (ids,) = feeds["text"].values()
    for length in (2, 5):
        cut = ids[:1, :length].copy()
        cut[:, -1] = ids.max()  # the end of the text
        found = find_difference(
            towers["text", "fp32"], candidate, {"input_ids": cut}, device=cpu_device, tolerance=1e-3
        )
        assert found is not None
        assert found.node == node.name


def test_an_overflow_in_fp16_is_found(
    clip_towers: TowerPaths, feeds: dict[Tower, Outputs], cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    model = load_graph(clip_towers.image)
    node, weight = weight_of(model, 4)  # the first layer's MLP
    values = 3e4 * numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    save_graph(model, tmp_path / "fp32.onnx")
    write_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    found = find_difference(
        load_graph(tmp_path / "fp32.onnx"),
        load_graph(tmp_path / "fp16.onnx"),
        feeds["image"],
        device=cpu_device,
        tolerance=TOLERANCES["fp16"],
    )
    assert found is not None
    assert (found.value, found.error) == (node.output[0], math.inf)
    assert found.agreed is not None
    assert "inf" in str(found)


def test_nan_is_found(
    towers: dict[tuple[Tower, Precision], onnx.ModelProto],
    feeds: dict[Tower, Outputs],
    cpu_device: DeviceProfile,
) -> None:
    candidate, node = broken(towers["text", "fp32"], 3)
    _, weight = weight_of(candidate, 3)
    values = np.full_like(numpy_helper.to_array(weight), np.nan)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    found = find_difference(
        towers["text", "fp32"], candidate, feeds["text"], device=cpu_device, tolerance=1e-3
    )
    assert found is not None
    assert (found.node, found.error) == (node.name, math.inf)


def test_few_runs_are_enough(
    towers: dict[tuple[Tower, Precision], onnx.ModelProto],
    feeds: dict[Tower, Outputs],
    cpu_device: DeviceProfile,
) -> None:
    reference = towers["image", "fp32"]
    counts = []
    for product in PRODUCTS:
        opened: list[Path] = []

        def count(path: Path, opened: list[Path] = opened) -> Engine:
            opened.append(path)
            return open_engine(path, device=cpu_device)

        candidate, _ = broken(reference, product)
        find_difference(
            reference,
            candidate,
            feeds["image"],
            device=cpu_device,
            tolerance=1e-3,
            open_candidate=count,
        )
        counts.append(len(opened))
    assert max(counts) <= 2 * math.log2(len(reference.graph.node)) + 8


def chain(factors: list[float], inner: list[tuple[int, int]]) -> onnx.ModelProto:
    """Value i is a factor times the sum of the values it reads; the last ones are added up."""
    nodes, read = [], set()
    names = ["x", *(f"v{index}" for index in range(len(factors)))]
    for index, (left, right) in enumerate(inner):
        a, b = names[left % (index + 1)], names[right % (index + 1)]
        read |= {a, b}
        nodes.append(helper.make_node("Add", [a, b], [f"s{index}"], f"add{index}"))
        nodes.append(
            helper.make_node("Mul", [f"s{index}", f"f{index}"], [f"v{index}"], f"mul{index}")
        )
    ends = [name for name in names[1:] if name not in read]
    nodes.append(helper.make_node("Concat", ends, ["y"], "end", axis=0))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            numpy_helper.from_array(np.array(value, np.float32), f"f{index}")
            for index, value in enumerate(factors)
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@given(
    inner=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12),
    data=st.data(),
)
def test_in_any_graph_the_node_that_is_wrong_is_found(
    inner: list[tuple[int, int]], data: st.DataObject
) -> None:
    device = DeviceProfile(
        name="cpu",
        description="one thread",
        engine="onnxruntime-cpu",
        precisions=("fp32",),
        threads=1,
        memory_mb=None,
    )
    wrong = data.draw(st.integers(0, len(inner) - 1))
    factors = [0.5] * len(inner)
    reference = chain(factors, inner)
    factors[wrong] = 0.6
    feed = {"x": np.array([1, 2], np.float32)}
    found = find_difference(reference, chain(factors, inner), feed, device=device, tolerance=1e-6)
    assert found is not None
    assert found.node == f"mul{wrong}"
    assert found.agreed == f"s{wrong}"


def test_a_renamed_output_is_an_error(cpu_device: DeviceProfile) -> None:
    candidate = chain([1.0], [(0, 0)])
    candidate.graph.node[-1].output[0] = candidate.graph.output[0].name = "other"
    with pytest.raises(ExportError, match="share no output"):
        find_difference(chain([1.0], [(0, 0)]), candidate, {}, device=cpu_device, tolerance=1e-3)


def test_the_line_names_node_error_and_the_last_value_that_agrees() -> None:
    found = GraphDifference(
        node="node_1",
        op_type="MatMul",
        value="val_2",
        behind=("node_0",),
        error=0.5,
        tolerance=0.001,
        agreed="norm",
        agreed_error=2e-7,
    )
    line = str(found)
    for part in ("node_1 (MatMul) with node_0 before", "val_2", "0.5", "0.001", "norm (2e-07)"):
        assert part in line
    assert "\n" not in line


MASKED_SCORES = np.array([-1e4, -1e4, 3.0, 4.0], np.float32)


@pytest.mark.parametrize(
    ("reference", "candidate", "error"),
    [
        (np.ones(4), np.ones((2, 2)), math.inf),
        (np.array([3.0, 4.0]), np.array([3.0, 4.5]), 0.1),
        (MASKED_SCORES, MASKED_SCORES + np.array([0, 0, 0, 0.5], np.float32), 0.1),
        (MASKED_SCORES, MASKED_SCORES * np.array([1.001, 1, 1, 1], np.float32), 0.0),
        (np.array([1.0, 2]), np.array([1.0, np.nan]), math.inf),
        (np.array([1.0, 2]), np.array([1.0, np.inf]), math.inf),
        (np.array([np.inf, 2]), np.array([np.inf, 2]), 0.0),
        (np.array([np.nan, 2]), np.array([np.nan, 2]), 0.0),
        (np.array([np.inf, 2]), np.array([-np.inf, 2]), math.inf),
        (np.zeros(2), np.zeros(2), 0.0),
        (np.zeros(2), np.ones(2), math.inf),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0.0),
        (np.arange(3), np.arange(3), 0.0),
        (np.arange(3), np.array([0, 1, 3]), 1.0),
        (np.array([True]), np.array([False]), 1.0),
        (np.array([3.0, 4.0]), np.array([3.0, 4.5], np.float16), 0.1),
    ],
)
def test_relative_error(reference: NDArray[Any], candidate: NDArray[Any], error: float) -> None:
    assert relative_error(reference, candidate) == pytest.approx(error)
