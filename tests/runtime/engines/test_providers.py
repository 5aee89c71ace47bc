import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.providers import (
    PROVIDERS,
    GraphFacts,
    cuda_options,
    openvino_options,
    provider_of,
    rtx_options,
    tensorrt_options,
)
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Precision

FP32 = GraphFacts(precision="fp32")
IMAGE = GraphFacts(precision="fp16", inputs=(("pixels", (None, 64, 64, 3)),))
TEXT = GraphFacts(precision="fp32", inputs=(("input_ids", (None, None)),), context_length=77)
TENSORRT = DeviceProfile(
    name="board",
    description="with TensorRT in ONNX Runtime",
    engine="onnxruntime-tensorrt",
    precisions=("fp32",),
    threads=2,
    memory_mb=4000,
    batch_min=1,
    batch_best=4,
    batch_max=8,
    compute_capability="8.7",
    tensorrt_major=10,
)
RTX = dataclasses.replace(
    TENSORRT, engine="onnxruntime-tensorrt-rtx", tensorrt_major=None, compute_capability="8.9"
)
CUDA = dataclasses.replace(TENSORRT, engine="onnxruntime-cuda", tensorrt_major=None)


def test_every_engine_of_onnx_runtime_has_a_provider(cpu_device: DeviceProfile) -> None:
    assert provider_of(cpu_device).name == "CPUExecutionProvider"
    assert provider_of(TENSORRT).name == "TensorrtExecutionProvider"
    assert provider_of(RTX).name == "NvTensorRTRTXExecutionProvider"
    assert provider_of(CUDA).name == "CUDAExecutionProvider"
    assert len({provider.name for provider in PROVIDERS.values()}) == len(PROVIDERS) == 5


def test_engine_that_is_not_onnx_runtime() -> None:
    device = dataclasses.replace(TENSORRT, name="other", engine="tensorrt")
    with pytest.raises(EngineError, match=r"'other' has engine tensorrt, .* onnxruntime-cpu"):
        provider_of(device)


def test_all_values_are_strings(cpu_device: DeviceProfile) -> None:
    for provider in PROVIDERS.values():
        device = cpu_device if provider.name.startswith(("CPU", "OpenVINO")) else TENSORRT
        for key, value in provider.options(device, IMAGE).items():
            assert isinstance(key, str)
            assert isinstance(value, str)


def test_cuda_bounds_its_memory_and_keeps_fp32() -> None:
    options = cuda_options(CUDA, FP32)
    assert options["gpu_mem_limit"] == "4000000000"
    assert options["use_tf32"] == "0"
    unknown = dataclasses.replace(CUDA, memory_mb=None)
    assert "gpu_mem_limit" not in cuda_options(unknown, FP32)


def test_tensorrt_has_no_flag_that_the_graph_does_not_need() -> None:
    assert tensorrt_options(TENSORRT, FP32) == {
        "device_id": "0",
        "trt_max_workspace_size": "2000000000",
    }


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", set()), ("fp16", {"fp16"}), ("int8", {"fp16", "int8"})]
)
def test_tensorrt_flags_of_a_typed_graph(precision: Precision, flags: set[str]) -> None:
    options = tensorrt_options(TENSORRT, dataclasses.replace(FP32, precision=precision))
    # "1" is refused: "should be 'True' or 'False'".
    found = {key: value for key, value in options.items() if key.endswith("_enable")}
    assert found == {f"trt_{flag}_enable": "True" for flag in flags}


def test_tensorrt_profile_of_images_and_texts() -> None:
    image, text = tensorrt_options(TENSORRT, IMAGE), tensorrt_options(TENSORRT, TEXT)
    assert image["trt_profile_min_shapes"] == "pixels:1x64x64x3"
    assert image["trt_profile_opt_shapes"] == "pixels:4x64x64x3"
    assert image["trt_profile_max_shapes"] == "pixels:8x64x64x3"
    assert text["trt_profile_min_shapes"] == "input_ids:1x1"
    assert text["trt_profile_opt_shapes"] == "input_ids:4x77"
    assert text["trt_profile_max_shapes"] == "input_ids:8x77"


def test_no_profile_where_nothing_varies_or_a_bound_is_unknown() -> None:
    static = dataclasses.replace(IMAGE, inputs=(("pixels", (4, 64, 64, 3)),))
    unbounded = dataclasses.replace(TEXT, context_length=None)
    for facts in (FP32, static, unbounded):
        assert not any("profile" in key for key in tensorrt_options(TENSORRT, facts))
        assert not any("profile" in key for key in rtx_options(RTX, facts))


@given(st.lists(st.integers(1, 512), min_size=2, max_size=2).map(sorted), st.integers(1, 128))
def test_profile_holds_the_batches_of_the_device(batches: list[int], length: int) -> None:
    best, largest = batches
    device = dataclasses.replace(RTX, batch_min=1, batch_best=best, batch_max=largest)
    facts = dataclasses.replace(TEXT, inputs=(*IMAGE.inputs, *TEXT.inputs), context_length=length)
    options = rtx_options(device, facts)
    for end, batch, tokens in (
        ("min", 1, 1),
        ("opt", best, length),
        ("max", largest, length),
    ):
        expected = f"pixels:{batch}x64x64x3,input_ids:{batch}x{tokens}"
        assert options[f"nv_profile_{end}_shapes"] == expected


def test_tensorrt_caches_and_hardware(tmp_path: Path) -> None:
    device = dataclasses.replace(
        TENSORRT, hardware_portability="ampere-plus", structured_sparsity=True
    )
    options = tensorrt_options(device, dataclasses.replace(FP32, cache=tmp_path))
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    assert options["trt_engine_hw_compatible"] == options["trt_sparsity_enable"] == "True"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hardware_portability": "same-compute-capability"}, "same-compute-capability"),
        ({"version_portability": True}, "drop it, or use engine tensorrt"),
    ],
)
def test_tensorrt_refuses_what_it_cannot_give(changes: dict[str, object], match: str) -> None:
    device = dataclasses.replace(TENSORRT, **changes)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=match):
        tensorrt_options(device, FP32)


def test_tensorrt_refuses_fp8() -> None:
    with pytest.raises(EngineError, match="cannot run fp8"):
        tensorrt_options(TENSORRT, GraphFacts(precision="fp8"))
    assert rtx_options(RTX, GraphFacts(precision="fp8")) == rtx_options(RTX, FP32)


def test_rtx(tmp_path: Path) -> None:
    options = rtx_options(RTX, dataclasses.replace(IMAGE, cache=tmp_path))
    assert options["nv_runtime_cache_path"] == str(tmp_path)
    assert options["nv_max_workspace_size"] == "2000000000"


def test_openvino_keeps_fp32_and_the_threads(cpu_device: DeviceProfile) -> None:
    options = openvino_options(dataclasses.replace(cpu_device, threads=3), IMAGE)
    properties = json.loads(options["load_config"])["CPU"]
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties["INFERENCE_NUM_THREADS"] == "3"
    assert options["device_type"] == "CPU"


def test_built_in_devices_of_onnx_runtime_have_options() -> None:
    from edgeclip.runtime.device.device_profile import device_names

    seen = 0
    for name in device_names():
        device = load_device(name)
        if device.engine in PROVIDERS:
            provider_of(device).options(device, IMAGE)
            seen += 1
    assert seen > 0
