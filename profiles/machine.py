"""Machine: the computer that a measurement was made on, as a record."""

import importlib.metadata
import platform
import sys
from dataclasses import dataclass

from edgeclip.profiles import detect

# Packages whose version can change a measurement; only those installed are recorded.
_PACKAGES = (
    "edgeclip",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "openvino",
    "pillow",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A computer as this process may use it.

    Attributes:
        cpu: the processor's model name.
        cores: physical cores available (affinity and container quota count).
        flags: the instruction sets that matter for inference, as Linux names them.
        memory_mb: memory available in total, MB of 10^6 bytes; None where unknown.
        os: system and version.
        python: version of the interpreter.
        packages: (package, version) of those installed that can change a measurement.
    """

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_mb: int | None
    os: str
    python: str
    packages: tuple[tuple[str, str], ...]


def detect_machine() -> Machine:
    """Look at this computer. Never fails: what cannot be found out stays empty or None."""
    processor = detect.detect_processor()
    return Machine(
        cpu=processor.model,
        cores=processor.cores,
        flags=processor.flags,
        memory_mb=detect.detect_memory_mb(),
        os=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {sys.version.split()[0]}",
        packages=_installed(),
    )


def _installed() -> tuple[tuple[str, str], ...]:
    """Versions by metadata alone: nothing is imported."""
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
