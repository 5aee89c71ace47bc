from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import calibration_images, calibration_texts
from edgeclip.export.graph.graph import load_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.equalise import equalisable, equalise
from edgeclip.export.quantizing.smooth import quantized_weight
from edgeclip.export.quantizing.write_config import apply_transforms
from edgeclip.runtime.spec import Tower
from tests.export.quantizing.small_graphs import batches, close, copy_of, fused, graph_of, run

Make = Callable[..., Source]


def conv_net(seed: int = 0, *, between: str = "Relu", unbalanced: float = 1.0) -> onnx.ModelProto:
    """Convolution, ReLU, depthwise convolution, ReLU, pooling, one in two groups, one of all.

    Channels of the first differ in size by powers of ten up to `unbalanced`, which those that
    read them make up for.
    """
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** (unbalanced * draw.uniform(-1, 1, 8))
    weights = {
        "w1": draw.normal(size=(8, 3, 3, 3)) * sizes[:, None, None, None],
        "b1": draw.normal(size=8) * sizes,
        "w2": draw.normal(size=(8, 1, 3, 3)) / sizes[:, None, None, None],
        "b2": draw.normal(size=8),
        "w3": draw.normal(size=(6, 4, 1, 1)),
        "w4": draw.normal(size=(5, 6, 1, 1)),
    }
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w1", "b1"], ["a"], "first", pads=[1, 1, 1, 1]),
        make(between, ["a"], ["ar"], "act1"),
        make("Conv", ["ar", "w2", "b2"], ["b"], "depthwise", group=8),
        make("Relu", ["b"], ["br"], "act2"),
        make("MaxPool", ["br"], ["bp"], "pool", kernel_shape=[2, 2]),
        make("Conv", ["bp", "w3"], ["c"], "groups", group=2),
        make("Conv", ["c", "w4"], ["y"], "last"),
    ]
    shapes = {"y": ["batch", 5, 5, 5]}
    return graph_of(nodes, weights, given=["batch", 3, 8, 8], outputs=shapes, opset=20)


def pictures(seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(4, 3, 8, 8)).astype(np.float32)


def weight(model: onnx.ModelProto, name: str) -> NDArray[np.float64]:
    (found,) = (item for item in model.graph.initializer if item.name == name)
    return numpy_helper.to_array(found).astype(np.float64)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), unbalanced=st.floats(0, 3))
def test_a_convolutional_net_computes_the_same(seed: int, unbalanced: float) -> None:
    model = conv_net(seed, unbalanced=unbalanced)
    equal = copy_of(model)
    assert equalise(equal) == 3
    assert len(equal.graph.node) == len(model.graph.node)
    assert close(run(equal, pictures())[0], run(model, pictures())[0])


def test_channels_become_as_large_where_they_are_made_as_where_they_are_read() -> None:
    model = conv_net(unbalanced=2)
    assert equalisable(model) == ("first -> depthwise", "depthwise -> groups", "groups -> last")
    equalise(model)
    first = np.abs(weight(model, "w1")).max(axis=(1, 2, 3))
    middle = np.abs(weight(model, "w2")).max(axis=(1, 2, 3))
    groups = np.abs(weight(model, "w3"))  # outputs 0 to 2 read channels 0 to 3, the others the rest
    read = np.concatenate([groups[:3].max(axis=(0, 2, 3)), groups[3:].max(axis=(0, 2, 3))])
    np.testing.assert_allclose(first, middle, rtol=0.01)
    np.testing.assert_allclose(middle, read, rtol=0.01)


def test_one_scale_for_a_whole_weight_is_then_enough() -> None:
    """What equalisation is for: unequal channels lose most of their bits to the largest."""
    config = StaticInt8(symmetric=True, per_channel=False)
    model = conv_net(unbalanced=2)
    right = run(model, pictures())[0]

    def error(given: onnx.ModelProto) -> float:
        rounded = copy_of(given)
        for item in rounded.graph.initializer:
            values = numpy_helper.to_array(item)
            if values.ndim == 4:
                flat = quantized_weight(values.reshape(len(values), -1).T, config)
                item.CopyFrom(numpy_helper.from_array(flat.T.reshape(values.shape), item.name))
        return float(np.linalg.norm(run(rounded, pictures())[0] - right) / np.linalg.norm(right))

    equal = apply_transforms(model, StaticInt8(symmetric=True, equalised=True), batches(pictures()))
    assert error(equal) < 0.3 * error(model)


def test_other_activations_are_in_the_way() -> None:
    for between in ("Gelu", "Sigmoid", "HardSwish", "Tanh"):
        assert "first -> depthwise" not in equalisable(conv_net(between=between))


def test_what_is_also_read_elsewhere_is_left_alone() -> None:
    model = conv_net()
    model.graph.output.append(helper.make_tensor_value_info("ar", 1, ["batch", 8, 8, 8]))
    assert equalisable(model) == ("depthwise -> groups", "groups -> last")


def test_products_with_a_relu_between_are_a_pair() -> None:
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.normal(size=(4, 6)) * 10.0 ** np.arange(-3, 3),
        "b1": draw.normal(size=6),
        "w2": draw.normal(size=(5, 6)),
        "b2": draw.normal(size=5),
        "one": np.ones(1),
    }
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "w1"], ["a"], "first"),
        make("Add", ["b1", "a"], ["ab"], "bias"),
        make("LeakyRelu", ["ab"], ["ar"], "act", alpha=0.2),
        make("Gemm", ["ar", "w2", "b2"], ["y"], "second", transB=1, alpha=2.0),
    ]
    model = graph_of(nodes, weights, given=["batch", 4], outputs={"y": ["batch", 5]})
    values = draw.normal(size=(9, 4)).astype(np.float32)
    equal = copy_of(model)
    assert equalise(equal) == 1
    assert close(run(equal, values)[0], run(model, values)[0])
    sizes = [np.abs(weight(equal, "w1")).max(axis=0), np.abs(weight(equal, "w2")).max(axis=0)]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.01)
    # One number for all channels is no bias of theirs.
    nodes[1].input[0] = "one"
    assert equalisable(graph_of(nodes, weights, given=["b", 4], outputs={"y": ["b", 5]})) == ()


def test_a_channel_that_is_never_made_or_read_stays() -> None:
    model = conv_net()
    for name, place in (("w1", 2), ("w2", 5)):
        (item,) = (item for item in model.graph.initializer if item.name == name)
        values = numpy_helper.to_array(item).copy()
        values[place] = 0
        item.CopyFrom(numpy_helper.from_array(values, name))
    equal = copy_of(model)
    equalise(equal)
    assert all(np.isfinite(weight(equal, name)).all() for name in ("w1", "w2", "w3", "w4"))
    assert close(run(equal, pictures())[0], run(model, pictures())[0])


@pytest.mark.parametrize(
    ("family", "tower", "pairs"),
    [
        # The projection to values and the one behind attention, of each layer.
        ("clip", "image", 2),
        ("clip", "text", 2),
        ("convnext", "text", 2),
        # Norms and GELUs are between all layers of a ConvNeXt.
        ("convnext", "image", 0),
    ],
)
@pytest.mark.parametrize("rewritten", [False, True], ids=["plain", "fused"])
def test_towers_compute_the_same(
    family: str,
    tower: Tower,
    pairs: int,
    rewritten: bool,
    blobs: Make,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    model = load_graph(paths.graph(tower).path)
    if rewritten:
        model = fused(model)
    data = (
        calibration_images(blobs(8), dual.spec.image)
        if tower == "image"
        else calibration_texts(blobs(8), dual.text_tokenizer)
    )
    equal = copy_of(model)
    assert equalise(equal) == pairs
    assert (equal.SerializeToString() != model.SerializeToString()) is (pairs > 0)
    for index in range(data.count):
        assert close(run(equal, data.batch(index))[0], run(model, data.batch(index))[0])
