"""Real sessions: graphs whose operations are known by hand, and both bundles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.profiles.layers.layer_profile import (
    NodeKey,
    parse_trace,
    profile_layers,
    profile_layers_of,
    read_trace,
)
from edgeclip.profiles.layers.node_costs import is_product
from edgeclip.profiles.record.measurement import LayerProfile
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.spec import Precision


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


EMOJI_BUNDLE = Path(__file__).parents[3] / "export" / "emoji_bundle"
FEED = {"x": np.ones((1, 4, 6, 6), np.float32)}


def _graph(tmp_path: Path, *, external: bool = False, loop: bool = False) -> Path:
    """A convolution in two groups, its pixels as rows, times a matrix, and the sum of it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    constants = {
        "kernel": random.normal(size=(8, 2, 3, 3)).astype(np.float32),
        "weights": random.normal(size=(8, 5)).astype(np.float32),
        "rows": np.array([1, 8, 36]),
        "axes": np.array([1, 2]),
    }
    pads: dict[str, Any] = {"pads": [1, 1, 1, 1], "group": 2}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["maps"], "convolution", **pads),
        helper.make_node("Reshape", ["maps", "rows"], ["flat"], "as rows"),
        helper.make_node("Transpose", ["flat"], ["tokens"], "turned", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "weights"], ["product"], "times"),
        helper.make_node("ReduceSum", ["product", "axes"], ["y"], "total", keepdims=0),
    ]
    if loop:
        nodes[-1] = _looped(helper, TensorProto)
        constants |= {"count": np.array(3), "go on": np.array(True)}
    graph = helper.make_graph(
        nodes,
        "known",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "known.onnx"
    onnx.save(
        model, path, save_as_external_data=external, location="known.data", size_threshold=100
    )
    return path


def _looped(helper: Any, kinds: Any) -> Any:
    """Three times the sine of the product."""
    info = helper.make_tensor_value_info
    inside = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["still"]),
            helper.make_node("Sin", ["given"], ["made"], "wave"),
        ],
        "inside",
        [
            *(info("turn", kinds.INT64, []), info("more", kinds.BOOL, [])),
            info("given", kinds.FLOAT, None),
        ],
        [info("still", kinds.BOOL, []), info("made", kinds.FLOAT, None)],
    )
    return helper.make_node("Loop", ["count", "go on", "product"], ["y"], "around", body=inside)


def _by_name(profile: LayerProfile) -> dict[str, Any]:
    return {layer.name: layer for layer in profile.layers}


def _product_flops(profile: LayerProfile) -> float:
    return sum(layer.flops or 0 for layer in profile.layers if is_product(layer.op))


@pytest.mark.parametrize("external", [False, True])
def test_a_graph_known_by_hand(tmp_path: Path, cpu_device: DeviceProfile, external: bool) -> None:
    profile = profile_layers_of(
        _graph(tmp_path, external=external), FEED, cpu_device, runs=7, warm_up=2
    )
    assert (profile.source, profile.runs) == ("ONNX Runtime profiling", 7)
    assert profile.plain_ms > 0
    assert {layer.provider for layer in profile.layers} == {"CPUExecutionProvider"}
    assert sum(layer.share for layer in profile.layers) == pytest.approx(1)
    assert [layer.ms for layer in profile.layers] == sorted(
        (layer.ms for layer in profile.layers), reverse=True
    )
    assert _product_flops(profile) == 2 * 8 * 36 * (2 * 9) + 2 * 36 * 8 * 5
    (product,) = (layer for layer in profile.layers if layer.op == "FusedMatMul")  # and transposed
    assert product.bytes == 4 * (36 * 8 + 8 * 5 + 36 * 5)  # with the weights
    assert _by_name(profile)["total"].flops == 36 * 5
    assert _by_name(profile)["as rows"].flops == 0


def test_a_graph_in_memory_is_the_same(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    content = _graph(tmp_path).read_bytes()
    profile = profile_layers_of(content, FEED, cpu_device, runs=1, warm_up=0)
    assert _product_flops(profile) == 2 * 8 * 36 * (2 * 9) + 2 * 36 * 8 * 5


def test_nodes_of_a_loop_are_counted_each_time_and_the_loop_is_not(
    tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    profile = profile_layers_of(_graph(tmp_path, loop=True), FEED, cpu_device, runs=3, warm_up=1)
    found = _by_name(profile)
    assert "around" not in found
    assert found["wave"].op == "Sin"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tower_of_a_bundle(
    tiny_bundle: Path, cpu_device: DeviceProfile, precision: Precision
) -> None:
    bundle = Bundle.open(tiny_bundle)
    image = profile_layers(bundle, "image", precision, cpu_device, runs=3, warm_up=1)
    assert _product_flops(image) == 2 * 3 * 8  # mean colour times weights
    text = profile_layers(bundle, "text", precision, cpu_device, runs=3, warm_up=1)
    assert _product_flops(text) == 2 * 8 * 8


def test_the_built_in_image_tower_computes_what_its_architecture_says(
    cpu_device: DeviceProfile,
) -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    profile = profile_layers(bundle, "image", "fp32", cpu_device, runs=3, warm_up=1)
    config = json.loads((EMOJI_BUNDLE / "config.json").read_text(encoding="utf-8"))
    vision, dim = config["vision_config"], config["projection_dim"]
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens = patches + 1

    def layer(queries: int) -> int:
        """Multiply-adds where so many tokens are needed of what comes out."""
        keys_and_values = 2 * tokens * width * width
        attention = 2 * queries * tokens * width
        rest = queries * (2 * width * width + 2 * width * inner)
        return int(keys_and_values + attention + rest)

    embedding = patches * width * 3 * vision["patch_size"] ** 2
    # The last layer is computed for the class token alone.
    layers = (vision["num_hidden_layers"] - 1) * layer(tokens) + layer(1)
    assert _product_flops(profile) == 2 * (embedding + layers + width * dim)
    assert all(layer.flops is not None and layer.bytes is not None for layer in profile.layers)
    weights = bundle.tower_path("image", "fp32").stat().st_size
    assert sum(layer.bytes or 0 for layer in profile.layers) > 0.95 * weights


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_built_in_towers_in_other_precisions(
    cpu_device: DeviceProfile, precision: Precision
) -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    for tower in ("image", "text"):
        full = profile_layers(bundle, tower, "fp32", cpu_device, runs=1, warm_up=0)
        other = profile_layers(bundle, tower, precision, cpu_device, runs=1, warm_up=0)
        assert _product_flops(other) == _product_flops(full)
        unknown = {item.op for item in other.layers if item.flops is None or item.bytes is None}
        assert unknown == set()


def test_what_cannot_be_profiled(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    path = _graph(tmp_path)
    with pytest.raises(InputError, match="at least 1 run"):
        profile_layers_of(path, FEED, cpu_device, runs=0)
    with pytest.raises(EngineError, match="failed on"):
        profile_layers_of(path, {"z": FEED["x"]}, cpu_device)
    with pytest.raises(EngineError, match="not ONNX Runtime"):
        profile_layers_of(path, FEED, load_device("rtx-4000-ada"))
    with pytest.raises(EngineError, match="cannot load"):
        profile_layers_of(b"no graph", FEED, cpu_device)
