import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.engines.onnxruntime_engine import embed_context
from edgeclip.runtime.errors import EngineError


@pytest.fixture
def tower(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx" / "vision_model.onnx"


@pytest.fixture
def openvino(cpu_device: DeviceProfile, tower: Path) -> DeviceProfile:
    """A device with OpenVINO, where it is installed and finds hardware."""
    device = dataclasses.replace(cpu_device, engine="onnxruntime-openvino")
    try:
        open_engine(tower, device=device)
    except EngineError as error:
        absent = ("has no OpenVINOExecutionProvider", "supports no hardware")
        if any(text in str(error) for text in absent):
            pytest.skip(str(error))
        raise
    return device


def pixels(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", ["vision_model.onnx", "text_model.onnx", "text_model_int8.onnx"])
def test_openvino_gives_what_the_cpu_gives(
    tiny_bundle: Path, cpu_device: DeviceProfile, openvino: DeviceProfile, name: str
) -> None:
    path = tiny_bundle / "onnx" / name
    for count in (1, 3):
        ids = np.random.default_rng(0).integers(0, 200, (count, 5))
        feeds = {"pixel_values": pixels(count)} if "vision" in name else {"input_ids": ids}
        engine = open_engine(path, device=openvino, content=path.read_bytes())
        assert engine.name == "onnxruntime-openvino"
        ((_, found),) = engine.run(feeds).items()
        ((_, expected),) = open_engine(path, device=cpu_device).run(feeds).items()
        # Some versions also quantize what is multiplied by weights stored in int8.
        np.testing.assert_allclose(found, expected, atol=5e-3 if "int8" in name else 1e-5)


def test_openvino_leaves_an_operator_to_the_cpu(tmp_path: Path, openvino: DeviceProfile) -> None:
    path = tmp_path / "odd.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["y"], name="product"),
        helper.make_node("Det", ["y"], ["z"], name="determinant"),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 2, 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    told = (
        r"leaves 1 of the 2 nodes .*: determinant \(Det\): .*|some nodes would run on the CPU: .*"
    )
    with pytest.raises(EngineError, match=rf"({told})cpu_fallback: true"):
        open_engine(path, device=openvino)
    allowed = dataclasses.replace(openvino, cpu_fallback=True)
    x = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    found = open_engine(path, device=allowed).run({"x": x})["z"]
    np.testing.assert_allclose(found, np.linalg.det(x @ x), atol=1e-4)


def test_context_runs_like_the_graph(tower: Path, tmp_path: Path, openvino: DeviceProfile) -> None:
    target = tmp_path / "context.onnx"
    if "OpenVINOExecutionProvider" not in {item.ep_name for item in onnxruntime.get_ep_devices()}:
        # The wheels of onnxruntime-openvino lack the library that reads contexts of CPUs.
        with pytest.raises(EngineError, match=r"cannot read back the context .* another build"):
            embed_context(tower, device=openvino, target=target)
        assert list(tmp_path.iterdir()) == []
        return
    embed_context(tower, device=openvino, target=target)
    assert list(tmp_path.iterdir()) == [target]
    expected = open_engine(tower, device=openvino).run({"pixel_values": pixels(3)})
    for content in (None, target.read_bytes()):
        found = open_engine(target, device=openvino, content=content)
        np.testing.assert_array_equal(
            found.run({"pixel_values": pixels(3)})["image_embeds"], expected["image_embeds"]
        )


def test_provider_without_contexts(tower: Path, tmp_path: Path, cpu_device: DeviceProfile) -> None:
    target = tmp_path / "context.onnx"
    with pytest.raises(EngineError, match=r"nothing ahead of time.* onnxruntime-openvino"):
        embed_context(tower, device=cpu_device, target=target)
    assert list(tmp_path.iterdir()) == []


def test_provider_that_is_absent_leaves_no_file(
    tower: Path, tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    device = dataclasses.replace(cpu_device, engine="onnxruntime-openvino")
    if importlib.util.find_spec("onnxruntime_ep_openvino") is not None:
        pytest.skip("the plugin of OpenVINO is installed")
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has OpenVINO")
    target = tmp_path / "context.onnx"
    with pytest.raises(EngineError, match=r"no OpenVINOExecutionProvider .*: install onnx"):
        embed_context(tower, device=device, target=target)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_survives_a_failure(tmp_path: Path, openvino: DeviceProfile) -> None:
    target = tmp_path / "context.onnx"
    target.write_bytes(b"of before")
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot load"):
        embed_context(tmp_path / "a.onnx", device=openvino, target=target)
    assert target.read_bytes() == b"of before"
