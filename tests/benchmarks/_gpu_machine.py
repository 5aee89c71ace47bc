"""The NVIDIA GPU that a benchmark runs on: whether torch reaches one, and what is recorded."""

import importlib.metadata
import os
import subprocess
from dataclasses import dataclass

import torch

# Versions beside those of `edgeclip.runtime.device.machine` that can change what a GPU does.
_PACKAGES = (
    "cuda-bindings",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "triton",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMachine:
    """The GPU, and the libraries on it. What cannot be found out is None.

    Attributes:
        name: such as "NVIDIA RTX A2000".
        capability: compute capability, such as "8.6".
        memory_mb: MB of 10^6 bytes.
        driver: version of the NVIDIA driver.
        cuda: version that torch was built with.
        cudnn: version that torch loaded, as cuDNN counts them.
        tensorrt: version of TensorRT that Python sees, whoever installed it.
        packages: (package, version) of those installed.
    """

    name: str
    capability: str
    memory_mb: int
    driver: str | None
    cuda: str | None
    cudnn: int | None
    tensorrt: str | None
    packages: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        found = {"driver": self.driver, "CUDA": self.cuda, "cuDNN": self.cudnn}
        found["TensorRT"] = self.tensorrt
        parts = [f"{name} {value or 'unknown'}" for name, value in found.items()]
        parts += [f"{name} {version}" for name, version in self.packages]
        return f"{self.name} (compute capability {self.capability}), {', '.join(parts)}"


def why_no_gpu() -> str | None:
    """Why torch cannot use an NVIDIA GPU here, in one line; None if it can."""
    if torch.version.cuda is not None and torch.cuda.is_available():
        return None
    driver = _driver()
    found = "no NVIDIA driver answers" if driver is None else f"NVIDIA driver {driver} is here"
    lack = "is built without CUDA" if torch.version.cuda is None else "finds no NVIDIA GPU"
    return f"torch {torch.__version__} {lack}, and {found}"


def full_precision() -> None:
    """Let fp32 mean fp32 for every candidate: no TF32, whose mantissa has 10 bits.

    The variable is read by cuBLAS, cuDNN and TensorRT when they start, so call this before
    anything runs; torch's flag is for the convolutions that it compiles itself.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cudnn.allow_tf32 = False


def detect_gpu() -> GpuMachine:
    """Look at the GPU that CUDA calls the first; call it only if `why_no_gpu` is None."""
    facts = torch.cuda.get_device_properties(0)
    return GpuMachine(
        name=facts.name,
        capability=f"{facts.major}.{facts.minor}",
        memory_mb=facts.total_memory // 10**6,
        driver=_driver(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        tensorrt=tensorrt_version(),
        packages=_installed(),
    )


def tensorrt_version() -> str | None:
    """The version of full TensorRT that Python can import; on a Jetson no package says it."""
    try:
        import tensorrt
    except Exception:  # each release fails in its own way where a library is missing
        return None
    return str(tensorrt.__version__)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _installed() -> tuple[tuple[str, str], ...]:
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
