"""TensorRT's own classes where it is installed; its engines run only where a GPU is."""

import copy
import json
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.profiles.layers.tensorrt_layers import (
    LayerRecorder,
    make_profiler,
    profile_tensorrt,
    read_layers,
)
from edgeclip.runtime.bundle.engine_records import GraphSource
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_engine import TensorRtEngine
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary
from edgeclip.runtime.errors import EngineError

FEED = {"pixels": np.zeros((1, 8, 8, 3), np.uint8)}


def tensor(shape: list[int], kind: str) -> dict[str, Any]:
    return {"Name": "x", "Location": "Device", "Dimensions": shape, "Format/Datatype": kind}


# Layers as `trtexec --exportLayerInfo --profilingVerbosity=detailed` writes them (NVIDIA's
# documentation of the engine inspector, and issue 4020 of NVIDIA/TensorRT).
REPORT = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to patches",
            "LayerType": "Reformat",
            "Inputs": [tensor([1, 3, 64, 64], "Row major linear FP32")],
            "Outputs": [tensor([1, 3, 64, 64], "Row major Int8 format")],
            "ParameterType": "Reformat",
            "TacticValue": "0x00000000000003e8",
        },
        {
            "Name": "patches",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor([1, 3, 64, 64], "Row major Int8 format")],
            "Outputs": [tensor([1, 128, 8, 8], "Channel major FP16 format where channel % 8 == 0")],
            "ParameterType": "Convolution",
            "Kernel": [8, 8],
            "OutMaps": 128,
            "Groups": 1,
            "Weights": {"Type": "Int8", "Count": 24576},
            "Bias": {"Type": "Float", "Count": 128},
        },
        {
            "Name": "/layers.0/mlp/fc1/MatMul_myl0_7",
            "LayerType": "gemm",
            "Inputs": [tensor([1, 65, 128], "Half"), tensor([128, 512], "Half")],
            "Outputs": [tensor([1, 65, 512], "Half")],
            "TacticName": "sm80_xmma_gemm_f16f16",
        },
        {
            "Name": "__myl_AddMean_myl0_8",
            "LayerType": "kgen",
            "Inputs": [tensor([1, 65, 128], "Half"), tensor([1, 65, 128], "Half")],
            "Outputs": [tensor([1, 65, 128], "Half")],
        },
        {
            "Name": "{ForeignNode[a...b]}",
            "LayerType": "Myelin",
            "Inputs": [tensor([1, 65, 128], "Half")],
            "Outputs": [tensor([1, 256], "Half")],
        },
        {
            "Name": "shapes that vary",
            "LayerType": "gemm",
            "Inputs": [tensor([-1, 65, 128], "Half"), tensor([128, 512], "Half")],
            "Outputs": [tensor([-1, 65, 512], "Half")],
        },
    ],
    "Bindings": ["pixels", "image_embeds"],
}


def test_layers_of_an_inspector() -> None:
    layers = read_layers(json.dumps(REPORT), "TensorRT 10.3.0")
    found = {layer.name: (layer.op, layer.flops, layer.bytes) for layer in layers.values()}
    pixels = 3 * 64 * 64
    assert list(found.values()) == [
        ("Reformat", 0.0, 5 * pixels),
        ("Convolution", 2 * 64 * 128 * 192, pixels + 24576 + 4 * 128 + 2 * 128 * 64),
        ("gemm", 2 * 65 * 128 * 512, 2 * (65 * 128 + 128 * 512 + 65 * 512)),
        ("kgen", None, 2 * 3 * 65 * 128),
        ("Myelin", None, None),
        ("gemm", None, None),
    ]
    assert {layer.provider for layer in layers.values()} == {"TensorRT 10.3.0"}


def test_types_of_tensorrt_11_stand_by_themselves() -> None:
    def split(item: dict[str, Any]) -> dict[str, Any]:
        words = item.pop("Format/Datatype").split()
        kinds = {"FP32": "Float", "FP16": "Half", "Int8": "Int8", "Half": "Half"}
        found = next(kinds[word] for word in words if word in kinds)
        return {**item, "DataType": found, "Format": "Row major linear format (kLINEAR)"}

    newer: dict[str, Any] = copy.deepcopy(REPORT)
    for layer in newer["Layers"]:
        for key in ("Inputs", "Outputs"):
            layer[key] = [split(item) for item in layer[key]]
    expected = read_layers(json.dumps(REPORT), "TensorRT")
    assert read_layers(json.dumps(newer), "TensorRT") == expected
    assert any(layer.bytes for layer in expected.values())


def test_an_engine_with_names_alone() -> None:
    (layer,) = read_layers('{"Layers": ["patches"], "Bindings": []}', "TensorRT").values()
    assert (layer.name, layer.op, layer.flops, layer.bytes) == ("patches", "unknown", None, None)


@pytest.mark.parametrize("report", ["", "{}", '{"Layers": [{}]}', "[]", '{"Layers": 3}'])
def test_what_is_no_report(report: str) -> None:
    with pytest.raises(EngineError, match="gave no list of layers"):
        read_layers(report, "TensorRT")


def test_a_real_profiler_tells_the_recorder(rtx: TensorRtLibrary) -> None:
    recorder = LayerRecorder()
    profiler = make_profiler(rtx.module, recorder)
    assert isinstance(profiler, rtx.module.IProfiler)
    for name, ms in (("a", 1.0), ("b", 2.0), ("a", 0.5)):  # one that runs twice
        profiler.report_layer_time(name, ms)
    recorder.end_run()
    profiler.report_layer_time("b", 3.0)
    recorder.end_run()
    assert recorder.runs == [{"a": 1.5, "b": 2.0}, {"b": 3.0}]


def test_calls_that_are_used_exist(rtx: TensorRtLibrary) -> None:
    context, engine = rtx.module.IExecutionContext, rtx.module.ICudaEngine
    for name in ("profiler", "enqueue_emits_profile", "report_to_profiler", "engine"):
        assert hasattr(context, name)
    assert hasattr(engine, "create_engine_inspector")
    assert hasattr(rtx.module.EngineInspector, "execution_context")
    assert hasattr(rtx.module.LayerInformationFormat, "JSON")


class Context:
    """An execution context that takes 2 ms for "patches" and 1 ms for one without a name."""

    def __init__(self) -> None:
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        self.engine = self
        self.execution_context: Any = None

    def report_to_profiler(self) -> bool:
        assert not self.enqueue_emits_profile
        self.profiler.report_layer_time("patches", 2.0)
        self.profiler.report_layer_time("another", 1.0)
        return True

    def create_engine_inspector(self) -> "Context":
        return self

    def get_engine_information(self, form: Any) -> str:
        assert self.execution_context is self
        return json.dumps(REPORT)


class Engine(TensorRtEngine):
    """An engine without a GPU."""

    def __init__(self, context: Any) -> None:
        self.name = "tensorrt-rtx"
        loaded: Any = SimpleNamespace(context=context)
        self._loaded = loaded

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert feeds is FEED
        return {}


def test_runs_are_collected(
    rtx: TensorRtLibrary, ada: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    profile = profile_tensorrt(Engine(None), Engine(Context()), FEED, ada, runs=3, warm_up=2)
    assert profile.source == f"{rtx.title} IProfiler"
    assert (profile.runs, profile.total_ms, profile.plain_ms) == (3, 3.0, 0.0)
    assert [(layer.op, layer.ms) for layer in profile.layers] == [
        ("Convolution", 2.0),
        ("unknown", 1.0),
    ]


def test_an_engine_that_does_not_report(
    rtx: TensorRtLibrary, ada: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "report_to_profiler", lambda self: False)
    with pytest.raises(EngineError, match="does not tell the times"):
        profile_tensorrt(Engine(None), Engine(Context()), FEED, ada, runs=3, warm_up=2)


@pytest.mark.gpu
def test_a_real_engine(rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource) -> None:
    import dataclasses

    from edgeclip.runtime.engines.tensorrt_library import gpu_capability

    pytest.importorskip("cuda.bindings.runtime")
    capability = gpu_capability()
    if rtx.target(capability) is None:
        pytest.skip(f"TensorRT-RTX does not know compute capability {capability}")
    device = dataclasses.replace(ada, precisions=("fp32",), compute_capability=capability)
    content = build_engine(image_source, device=device, library=rtx).engine
    plain, profiled = (TensorRtEngine(content, library=rtx, source="vision") for _ in range(2))
    profile = profile_tensorrt(plain, profiled, FEED, device, runs=5, warm_up=2)
    assert profile.runs == 5
    assert profile.total_ms > 0
    assert any(layer.op != "unknown" for layer in profile.layers)
