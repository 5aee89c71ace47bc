"""DeviceProfile: a device's engine, precisions, batch sizes and limits, read from YAML."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from annotated_types import Ge, Gt

from edgeclip.runtime.device.machine import Machine, detect_machine, has_int8_dot_products
from edgeclip.runtime.device.schema import builtin_names, check_bounds, load_profile
from edgeclip.runtime.spec import PixelForm, Precision

EngineName = Literal[
    "onnxruntime-cpu",
    "onnxruntime-openvino",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
]
Portability = Literal["none", "same-compute-capability", "ampere-plus"]
THIS_MACHINE = "this-machine"

# GPUs that TensorRT for RTX builds engines for (its support matrix).
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_CPU_ENGINES = ("onnxruntime-cpu", "onnxruntime-openvino", "openvino")
_TENSORRT_ENGINES = ("tensorrt", "onnxruntime-tensorrt")  # full TensorRT, by itself or inside
_RTX_ENGINES = ("tensorrt-rtx", "onnxruntime-tensorrt-rtx")
_FIRST_WITH_FP8 = (8, 9)  # Ada


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device and how bundles run on it.

    Attributes:
        name: a short name.
        description: one line for a person.
        engine: the inference engine that runs the towers.
        precisions: those that may be used, in order of preference, without repeats.
        threads: CPU threads that inference and preprocessing may use.
        memory_mb: memory that the towers can use, MB of 10^6 bytes: the GPU's where the
            engine runs on one, else the system's. None where it is unknown.
        batch_min: the smallest batch that an engine is built for: 1, or `batch_max`.
        batch_best: the batch that it is tuned for.
        batch_max: the largest one; if it equals `batch_min`, graphs are made for that batch
            alone. Longer lists of inputs are cut into such batches, shorter ones padded.
        pixels: input of the image tower: uint8 [N, size, size, 3], normalised inside the
            graph, or already normalised float32 [N, 3, size, size].
        hardware_portability: which other GPUs a TensorRT engine must also run on.
        version_portability: the engine must also run on later versions of its TensorRT.
        cpu_fallback: operators that ONNX Runtime's provider lacks may run on the CPU;
            otherwise that is an error.
        shared_memory: CPU and GPU share that memory.
        vnni: the CPU has int8 dot products (AVX-VNNI, AVX512-VNNI, Arm dotprod). Without
            them 8-bit products can saturate, and a reduced range is needed.
        bfloat16: compute the float operators in bfloat16, which not every CPU has; for engine
            openvino.
        compute_capability: compute capability of the NVIDIA GPU, such as "8.7"; None without one.
        structured_sparsity: the GPU has 2:4 sparse tensor cores.
        tensorrt_major: the TensorRT on the device. Version 10 takes builder flags for
            precision, 11 is strongly typed only.
        latency_budget_ms: the most one image may take, if there is a bound.
        size_budget_mb: the most that the files of both towers may take, if there is a bound.

    Raises:
        ValueError: fields out of bounds or in contradiction; all mistakes in one message.
    """

    name: str
    description: str
    engine: EngineName
    precisions: tuple[Precision, ...]
    threads: Annotated[int, Ge(1)]
    memory_mb: Annotated[int | None, Ge(1)]
    batch_min: Annotated[int, Ge(1)] = 1
    batch_best: Annotated[int, Ge(1)] = 1
    batch_max: Annotated[int, Ge(1)] = 32
    pixels: PixelForm = "uint8-nhwc"
    hardware_portability: Portability = "none"
    version_portability: bool = False
    cpu_fallback: bool = False
    shared_memory: bool = False
    vnni: bool = False
    bfloat16: bool = False
    compute_capability: str | None = None
    structured_sparsity: bool = False
    tensorrt_major: Annotated[int | None, Ge(1)] = None
    latency_budget_ms: Annotated[float | None, Gt(0)] = None
    size_budget_mb: Annotated[float | None, Gt(0)] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        mistakes = [
            *_name_mistakes(self),
            *_precision_mistakes(self),
            *_batch_mistakes(self),
            *_gpu_mistakes(self),
            *_tensorrt_mistakes(self),
        ]
        if mistakes:
            raise ValueError("; ".join(mistakes))

    @property
    def on_cpu(self) -> bool:
        """Whether the towers run on the CPU."""
        return self.engine in _CPU_ENGINES

    @property
    def static_batch(self) -> int | None:
        """The one batch that graphs are made for; None where it may vary."""
        return self.batch_min if self.batch_min == self.batch_max else None

    def cpu_profile(self) -> "DeviceProfile":
        """Return the profile of this device's CPU: ONNX Runtime in fp32, the last fallback."""
        return DeviceProfile(
            name=f"{self.name}-cpu",
            description=f"the CPU of {self.name}",
            engine="onnxruntime-cpu",
            precisions=("fp32",),
            threads=self.threads,
            memory_mb=None,
            batch_min=self.batch_min,
            batch_best=self.batch_best,
            batch_max=self.batch_max,
            pixels=self.pixels,
        )


def _name_mistakes(device: DeviceProfile) -> list[str]:
    return [] if device.name.strip() else ["name must not be empty"]


def _precision_mistakes(device: DeviceProfile) -> list[str]:
    mistakes = []
    if not device.precisions:
        mistakes.append("precisions must name at least one precision")
    if len(set(device.precisions)) != len(device.precisions):
        mistakes.append("precisions must not repeat one")
    if device.engine == "onnxruntime-cuda" and "int8" in device.precisions:
        # Its CUDA provider runs a Q/DQ graph's MatMuls in floating point: slower than fp16.
        mistakes.append("onnxruntime-cuda has no int8 MatMul: drop int8 or use tensorrt")
    if device.bfloat16 and device.engine != "openvino":
        mistakes.append("bfloat16 is for engine openvino only")
    capability = _numbers(device.compute_capability)
    has_fp8 = "tensorrt" in device.engine and (capability or (0, 0)) >= _FIRST_WITH_FP8
    if "fp8" in device.precisions and not has_fp8:
        mistakes.append("fp8 needs TensorRT and compute_capability 8.9 or higher")
    return mistakes


def _batch_mistakes(device: DeviceProfile) -> list[str]:
    if not device.batch_min <= device.batch_best <= device.batch_max:
        return ["batch_min must not be above batch_best, nor batch_best above batch_max"]
    if device.batch_min not in (1, device.batch_max):
        return ["batch_min must be 1, or equal batch_max where only one batch size is wanted"]
    return []


def _numbers(capability: str | None) -> tuple[int, int] | None:
    """Return (major, minor) of a compute capability; None if the text is not one."""
    match = re.fullmatch(r"([1-9]\d?)\.(\d)", capability or "")
    return (int(match[1]), int(match[2])) if match else None


def _gpu_mistakes(device: DeviceProfile) -> list[str]:
    capability = device.compute_capability
    if device.on_cpu:
        asked = {
            "compute_capability": capability is not None,
            "structured_sparsity": device.structured_sparsity,
            "shared_memory": device.shared_memory,
        }
        return [f"{key} is for GPU engines only" for key, wrong in asked.items() if wrong]
    mistakes = ["vnni is for engines on the CPU only"] if device.vnni else []
    if capability is None:
        mistakes.append(f"engine {device.engine} needs compute_capability, such as '8.7'")
    elif _numbers(capability) is None:
        mistakes.append(f"compute_capability must look like '8.7', got {capability!r}")
    elif device.engine in _RTX_ENGINES and capability not in _RTX_CAPABILITIES:
        known = ", ".join(_RTX_CAPABILITIES)
        mistakes.append(f"tensorrt-rtx supports {known}, not {capability}: use tensorrt")
    return mistakes


def _tensorrt_mistakes(device: DeviceProfile) -> list[str]:
    mistakes = []
    if device.engine in _TENSORRT_ENGINES and device.tensorrt_major is None:
        mistakes.append(f"engine {device.engine} needs tensorrt_major, such as 10")
    if "tensorrt" not in device.engine:
        asked = {
            "tensorrt_major": device.tensorrt_major is not None,
            "hardware_portability": device.hardware_portability != "none",
            "version_portability": device.version_portability,
        }
        mistakes += [f"{key} is for the TensorRT engines only" for key, no in asked.items() if no]
    portable = device.hardware_portability != "none" or device.version_portability
    if portable and device.engine in _RTX_ENGINES:
        mistakes.append(
            "engines of tensorrt-rtx run on every GPU of their compute capability and on one "
            "version only: drop hardware_portability and version_portability"
        )
    if device.cpu_fallback and not device.engine.startswith("onnxruntime"):
        mistakes.append("cpu_fallback is for ONNX Runtime's engines only")
    return mistakes


def device_from_machine(machine: Machine) -> DeviceProfile:
    """Return the profile of a computer's CPU: ONNX Runtime, one thread per physical core."""
    return DeviceProfile(
        name=THIS_MACHINE,
        description=f"{machine.cpu}, detected",
        engine="onnxruntime-cpu",
        # fp16 is for size: CPU kernels mostly compute it in fp32.
        precisions=("fp32", "fp16", "int8"),
        threads=machine.cores,
        memory_mb=machine.memory_mb,
        vnni=has_int8_dot_products(machine.flags),
    )


def load_device(name_or_path: str | Path) -> DeviceProfile:
    """Load a built-in device by name, `"this-machine"` (detected), or a YAML file by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or a bad file.
    """
    if name_or_path == THIS_MACHINE:
        return device_from_machine(detect_machine())
    return load_profile(DeviceProfile, "devices", name_or_path, (THIS_MACHINE,))


def device_names() -> tuple[str, ...]:
    """Return the names that `load_device` knows."""
    return (THIS_MACHINE, *builtin_names("devices"))


def device_yaml(device: DeviceProfile) -> str:
    """Return all fields of a device as YAML text, in their order."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(device).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
