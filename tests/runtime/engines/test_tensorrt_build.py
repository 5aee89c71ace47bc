import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime.bundle.engine_records import GraphSource
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary
from edgeclip.runtime.errors import EngineError
from tests.runtime.tiny_graphs import graph_bytes, image_content, source_of


@pytest.mark.parametrize("device", ["rtx-a2000", "rtx-4000-ada", "rtx-blackwell"])
def test_builds_both_towers_for_gpus_that_are_not_here(
    rtx: TensorRtLibrary, image_source: GraphSource, text_source: GraphSource, device: str
) -> None:
    for source in (image_source, text_source):
        built = build_engine(source, device=load_device(device), library=rtx)
        assert len(built.engine) > 1000
        assert built.key.capability == load_device(device).compute_capability
        assert built.key.graph_sha256 == source.sha256
        assert built.timing_cache is None
        assert built.seconds > 0


def test_symmetric_int8_builds(rtx: TensorRtLibrary, ada: DeviceProfile) -> None:
    source = source_of("vision_int8", image_content(zero_point=0))
    assert build_engine(source, device=ada, library=rtx).engine


def test_asymmetric_int8_is_refused(rtx: TensorRtLibrary, ada: DeviceProfile) -> None:
    source = source_of("vision_int8", image_content(zero_point=3))
    with pytest.raises(EngineError, match=r"cannot read vision_int8: .*quantize.*symmetric") as e:
        build_engine(source, device=ada, library=rtx)
    assert "\n" not in str(e.value)
    assert "export int8 for a device whose engine is TensorRT" in str(e.value)


def test_fixed_batch(rtx: TensorRtLibrary, ada: DeviceProfile) -> None:
    source = source_of("vision", image_content(batch=2))
    device = dataclasses.replace(ada, batch_min=2, batch_best=2, batch_max=2)
    assert build_engine(source, device=device, library=rtx).engine
    with pytest.raises(EngineError, match="takes batches of 2 only"):
        build_engine(source, device=ada, library=rtx)


def test_unknown_operator_is_named_with_its_node(rtx: TensorRtLibrary, ada: DeviceProfile) -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Det", ["squares"], ["values"], "determinant"),
        helper.make_node("Unsqueeze", ["values", "axis"], ["columns"]),
        helper.make_node("MatMul", ["columns", "weights"], ["found"]),
    ]
    constants = {"axis": np.array([1]), "weights": np.ones((1, 4), np.float32)}
    content = graph_bytes(nodes, ("squares", TensorProto.FLOAT, ["n", 3, 3]), "found", constants)
    with pytest.raises(EngineError, match="cannot read odd: node Det determinant: "):
        build_engine(source_of("odd", content), device=ada, library=rtx)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x00" * 9], ids=len)
def test_bytes_that_are_no_graph(rtx: TensorRtLibrary, ada: DeviceProfile, content: bytes) -> None:
    with pytest.raises(EngineError, match=r"TensorRT cannot read vision: .+"):
        build_engine(source_of("vision", content), device=ada, library=rtx)


def test_graph_with_weights_in_another_file(
    rtx: TensorRtLibrary, ada: DeviceProfile, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load_from_string(image_content())
    path = tmp_path / "vision.onnx"
    onnx.save(model, path, save_as_external_data=True, location="vision.data", size_threshold=0)
    assert (tmp_path / "vision.data").stat().st_size > 0
    source = GraphSource(name="vision", content=path, sha256="a" * 64)
    assert build_engine(source, device=ada, library=rtx).engine
    (tmp_path / "vision.data").unlink()
    with pytest.raises(EngineError, match="cannot read vision"):
        build_engine(source, device=ada, library=rtx)


def test_what_the_builder_says_is_in_the_error(
    rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource
) -> None:
    """8-bit floating point is for compute capability 8.9 and later."""
    from onnx import TensorProto, helper, numpy_helper

    scale = np.array(0.1, np.float32)
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\x00", raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["rows", "scale", "zero"], ["small"]),
        helper.make_node("DequantizeLinear", ["small", "scale", "zero"], ["again"]),
        helper.make_node("MatMul", ["again", "weights"], ["found"]),
    ]
    graph = helper.make_graph(
        nodes,
        "fp8",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["n", 16])],
        [
            zero,
            numpy_helper.from_array(scale, "scale"),
            numpy_helper.from_array(np.eye(16, dtype=np.float32), "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    source = source_of("fp8", model.SerializeToString())
    assert build_engine(source, device=ada, library=rtx).engine
    with pytest.raises(EngineError, match=r"cannot build fp8 for compute capability 8\.6: .+"):
        build_engine(source, device=load_device("rtx-a2000"), library=rtx)


def test_device_that_it_does_not_build_for(rtx: TensorRtLibrary, image_source: GraphSource) -> None:
    with pytest.raises(EngineError, match=r"does not build for compute capability 8\.7"):
        build_engine(image_source, device=load_device("jetson-orin-nano"), library=rtx)


class PressCtrlC:
    """Told of the phases of a build, it interrupts this process at the first step."""

    def __init__(self) -> None:
        self.pressed = False

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        pass

    def step(self, phase: str, done: int) -> None:
        if not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the main thread hears of it meanwhile

    def finish(self, phase: str) -> None:
        pass


def test_ctrl_c_ends_the_build(
    rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource
) -> None:
    sink = PressCtrlC()
    # A shell that starts the tests in the background has Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(image_source, device=ada, library=rtx, progress=sink)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sink.pressed
    assert build_engine(image_source, device=ada, library=rtx).engine


@pytest.mark.gpu
def test_report_lists_the_layers(
    rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource
) -> None:
    import json

    from edgeclip.runtime.engines.tensorrt_library import gpu_capability

    pytest.importorskip("cuda.bindings.runtime")
    capability = gpu_capability()
    if rtx.target(capability) is None:
        pytest.skip(f"TensorRT-RTX does not know compute capability {capability}")
    device = dataclasses.replace(ada, precisions=("fp32",), compute_capability=capability)
    built = build_engine(image_source, device=device, library=rtx)
    assert built.report is not None
    assert json.loads(built.report)["Layers"]
