"""Execution providers of ONNX Runtime: the provider of each engine, and its options for a device.

Names and values were checked against ONNX Runtime's documentation of each provider
(onnxruntime.ai/docs/execution-providers), the keys that onnxruntime-gpu 1.31 and
onnxruntime-openvino 1.24 accept, and `tensorrt_rtx_provider_options.h` of
onnxruntime-ep-nv-tensorrt-rtx 0.5. All values are strings.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Precision

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
Options = dict[str, str]


Inputs = tuple[tuple[str, tuple[int | None, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """What a provider's options depend on in a graph.

    Attributes:
        precision: precision of the graph's weights.
        inputs: name and shape of each input, None for a dimension that varies; the first of
            those is the batch. Empty for providers that need no shapes.
        context_length: the longest text, in tokens, if a second dimension varies.
        cache: a folder for compiled engines of this graph only; None for no cache.
    """

    precision: Precision
    inputs: Inputs = ()
    context_length: int | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: its name in ONNX Runtime.
        package: what to install to get it.
        options: returns its options; raises EngineError for a device that it cannot serve.
        plugin: the Python module of a package that adds it to onnxruntime, if there is one.
        compiles: whether it builds engines for a range of shapes, which are worth caching.
        has_context: whether it can store a compiled graph in an ONNX file (EP context).
    """

    name: str
    package: str
    options: Callable[["DeviceProfile", GraphFacts], Options]
    plugin: str | None = None
    compiles: bool = False
    has_context: bool = False


def provider_of(device: "DeviceProfile") -> Provider:
    """Return the execution provider of a device's engine.

    Raises:
        EngineError: the device's engine is not ONNX Runtime.
    """
    if device.engine not in PROVIDERS:
        raise EngineError(
            f"device {device.name!r} has engine {device.engine}, which is not ONNX Runtime: use "
            f"a device whose engine is one of {', '.join(PROVIDERS)}"
        )
    return PROVIDERS[device.engine]


def cuda_options(device: "DeviceProfile", facts: GraphFacts) -> Options:
    """Return CUDA's options: a bounded arena, the same algorithms in every run, no TF32.

    TF32 is off so that fp32 is exact; for tensor cores choose fp16. cuDNN's default, the
    exhaustive search, would try every algorithm again for every batch size.
    """
    options = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }
    if device.memory_mb is not None:
        options["gpu_mem_limit"] = str(device.memory_mb * 10**6)
    return options


def tensorrt_options(device: "DeviceProfile", facts: GraphFacts) -> Options:
    """Return TensorRT's options; their booleans must be `True` or `False`.

    The provider builds weakly typed networks of TensorRT 10: a graph with fp16 tensors or
    int8 Q/DQ pairs is refused unless the builder's flag for it is set, and fp8 has no flag. The
    int8 graphs of a bundle compute in fp16 between their Q/DQ pairs, so they need both flags.
    With the fp16 flag TensorRT may also run an fp16 graph's fp32 islands in fp16, and it
    uses TF32 for fp32 unless NVIDIA_TF32_OVERRIDE=0. `edgeclip verify` measures the error.

    Raises:
        EngineError: the precision is fp8, or a portability that the provider cannot give.
    """
    _check_tensorrt(device, facts)
    options = {"device_id": "0", **_profile("trt_profile_{}_shapes", device, facts)}
    if device.memory_mb is not None:  # the rest is for weights, activations and the other tower
        options["trt_max_workspace_size"] = str(device.memory_mb * 10**6 // 2)
    if facts.precision in ("fp16", "int8"):
        options["trt_fp16_enable"] = "True"
    if facts.precision == "int8":
        options["trt_int8_enable"] = "True"
    if device.hardware_portability == "ampere-plus":
        options["trt_engine_hw_compatible"] = "True"
    if device.structured_sparsity:
        options["trt_sparsity_enable"] = "True"
    if facts.cache is not None:
        folder = str(facts.cache)
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": folder}
        options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": folder}
    return options


def rtx_options(device: "DeviceProfile", facts: GraphFacts) -> Options:
    """Return the options of TensorRT for RTX; strongly typed networks need no precision flags."""
    options = _profile("nv_profile_{}_shapes", device, facts)
    if device.memory_mb is not None:
        options["nv_max_workspace_size"] = str(device.memory_mb * 10**6 // 2)
    if facts.cache is not None:
        options["nv_runtime_cache_path"] = str(facts.cache)
    return options


def openvino_options(device: "DeviceProfile", facts: GraphFacts) -> Options:
    """Return OpenVINO's options on the CPU, as OpenVINO properties (ONNX Runtime 1.23 or later).

    By default it may compute in bf16 where the CPU has it. With f32, fp32 and fp16 graphs are
    exact, and int8 Q/DQ pairs still run as int8. Compiling is fast, so nothing is cached.
    """
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(device.threads),
        "NUM_STREAMS": "1",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": properties})}


def _no_options(device: "DeviceProfile", facts: GraphFacts) -> Options:
    return {}


def _check_tensorrt(device: "DeviceProfile", facts: GraphFacts) -> None:
    if facts.precision == "fp8":
        raise EngineError(
            "ONNX Runtime's TensorRT provider cannot run fp8: use another precision, or engine "
            "tensorrt"
        )
    if device.hardware_portability == "same-compute-capability":
        raise EngineError(
            f"device {device.name!r} asks for hardware_portability same-compute-capability, which "
            "ONNX Runtime's TensorRT provider lacks: use none, ampere-plus, or engine tensorrt"
        )
    if device.version_portability:
        raise EngineError(
            f"device {device.name!r} asks for version_portability, which ONNX Runtime's TensorRT "
            "provider lacks: drop it, or use engine tensorrt"
        )


def _profile(key: str, device: "DeviceProfile", facts: GraphFacts) -> Options:
    """Return minimum, optimum and maximum shapes; none if no shape varies or a bound is unknown.

    Without them the provider builds for the shapes that it is given, and again when they grow.
    """
    batches = {"min": device.batch_min, "opt": device.batch_best, "max": device.batch_max}
    lengths = {"min": 1, "opt": facts.context_length, "max": facts.context_length}
    shapes: dict[str, list[str]] = {end: [] for end in batches}
    for name, shape in facts.inputs:
        for end, parts in shapes.items():
            varying = iter((batches[end], lengths[end]))
            dims = [next(varying, None) if size is None else size for size in shape]
            if None in dims:
                return {}
            parts.append(f"{name}:{'x'.join(map(str, dims))}")
    if all(None not in shape for _, shape in facts.inputs):
        return {}
    return {key.format(end): ",".join(parts) for end, parts in shapes.items()}


PROVIDERS: dict[str, Provider] = {
    "onnxruntime-cpu": Provider(name=CPU, package="edgeclip[cpu]", options=_no_options),
    "onnxruntime-openvino": Provider(
        name="OpenVINOExecutionProvider",
        package="onnxruntime-openvino>=1.23 in place of onnxruntime, or onnxruntime-ep-openvino "
        "beside it on an Intel CPU",
        options=openvino_options,
        plugin="onnxruntime_ep_openvino",
        has_context=True,
    ),
    "onnxruntime-cuda": Provider(name=CUDA, package="edgeclip[gpu]", options=cuda_options),
    "onnxruntime-tensorrt": Provider(
        name=TENSORRT,
        package="edgeclip[gpu] and the TensorRT 10 libraries",
        options=tensorrt_options,
        compiles=True,
        has_context=True,
    ),
    "onnxruntime-tensorrt-rtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        package="onnxruntime-ep-nv-tensorrt-rtx beside onnxruntime>=1.24",
        options=rtx_options,
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        compiles=True,
        has_context=True,
    ),
}
