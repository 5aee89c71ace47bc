"""DeviceProfile: what a device is and what it may run."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from edgeclip.profiles.builtin_profiles import builtin_names, load_profile
from edgeclip.profiles.machine import Machine, detect_machine
from edgeclip.profiles.ranges import Range, check_ranges

EngineName = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
DevicePrecision = Literal["fp32", "fp16", "int8"]
THIS_MACHINE = "this-machine"

# Instructions that multiply int8 values and add them up without saturating.
_INT8_DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
# GPUs that TensorRT for RTX builds engines for (its support matrix).
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device, as far as running a bundle on it goes.

    Attributes:
        name: a short name.
        description: one line for a person.
        engine: what executes the towers.
        precisions: those that may be chosen on it, without repeats.
        threads: CPU threads that inference and preprocessing may use.
        memory_mb: memory that the towers can use, MB of 10^6 bytes: the GPU's where the
            engine runs on one, else the system's. None where it is unknown.
        shared_memory: CPU and GPU share that memory.
        vnni: the CPU has int8 dot products (AVX-VNNI, AVX512-VNNI, Arm dotprod). Without
            them 8-bit products can saturate, and a reduced range is needed.
        compute_capability: of the NVIDIA GPU, such as "8.7"; None without one.
        structured_sparsity: the GPU has 2:4 sparse tensor cores.
        tensorrt_major: the TensorRT on the device. Version 10 takes builder flags for
            precision, 11 is strongly typed only.
        latency_budget_ms: the most one image may take, if there is a bound.
        size_budget_mb: the most that the files of both towers may take, if there is a bound.

    Raises:
        ValueError: fields that contradict each other; all of them in one message.
    """

    name: str
    description: str
    engine: EngineName
    precisions: tuple[DevicePrecision, ...]
    threads: Annotated[int, Range(at_least=1)]
    memory_mb: Annotated[int | None, Range(at_least=1)]
    shared_memory: bool = False
    vnni: bool = False
    compute_capability: str | None = None
    structured_sparsity: bool = False
    tensorrt_major: Annotated[int | None, Range(at_least=1)] = None
    latency_budget_ms: Annotated[float | None, Range(above=0)] = None
    size_budget_mb: Annotated[float | None, Range(above=0)] = None

    def __post_init__(self) -> None:
        check_ranges(self)
        mistakes = [
            *_name_mistakes(self),
            *_precision_mistakes(self),
            *_gpu_mistakes(self),
            *_tensorrt_mistakes(self),
        ]
        if mistakes:
            raise ValueError("; ".join(mistakes))


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
    return mistakes


def _gpu_mistakes(device: DeviceProfile) -> list[str]:
    capability = device.compute_capability
    if device.engine == "onnxruntime-cpu":
        asked = {
            "compute_capability": capability is not None,
            "structured_sparsity": device.structured_sparsity,
            "shared_memory": device.shared_memory,
        }
        return [f"{key} is for GPU engines only" for key, wrong in asked.items() if wrong]
    mistakes = ["vnni is for onnxruntime-cpu only"] if device.vnni else []
    if capability is None:
        mistakes.append(f"engine {device.engine} needs compute_capability, such as '8.7'")
    elif not re.fullmatch(r"[1-9]\d?\.\d", capability):
        mistakes.append(f"compute_capability must look like '8.7', got {capability!r}")
    elif device.engine == "tensorrt-rtx" and capability not in _RTX_CAPABILITIES:
        known = ", ".join(_RTX_CAPABILITIES)
        mistakes.append(f"tensorrt-rtx supports {known}, not {capability}: use tensorrt")
    return mistakes


def _tensorrt_mistakes(device: DeviceProfile) -> list[str]:
    if device.engine == "tensorrt" and device.tensorrt_major is None:
        return ["engine tensorrt needs tensorrt_major, such as 10"]
    if device.engine.startswith("onnxruntime") and device.tensorrt_major is not None:
        return ["tensorrt_major is for the TensorRT engines only"]
    return []


def device_from_machine(machine: Machine) -> DeviceProfile:
    """The profile of a computer that runs on its CPU, one thread per physical core."""
    return DeviceProfile(
        name=THIS_MACHINE,
        description=f"{machine.cpu}, detected",
        engine="onnxruntime-cpu",
        # fp16 is for size: CPU kernels mostly compute it in fp32.
        precisions=("fp32", "fp16", "int8"),
        threads=machine.cores,
        memory_mb=machine.memory_mb,
        vnni=not _INT8_DOT_PRODUCT.isdisjoint(machine.flags),
    )


def load_device(name_or_path: str | Path) -> DeviceProfile:
    """A built-in device by name, the detected `"this-machine"`, or a YAML file by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or a bad file.
    """
    if name_or_path == THIS_MACHINE:
        return device_from_machine(detect_machine())
    return load_profile(DeviceProfile, "devices", name_or_path, (THIS_MACHINE,))


def device_names() -> tuple[str, ...]:
    """Names that `load_device` knows."""
    return (THIS_MACHINE, *builtin_names("devices"))
