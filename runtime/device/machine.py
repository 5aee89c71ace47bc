"""Machine: detect the processor, memory, system and package versions of this computer."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

Sysctl = Callable[[str], str]  # name of a macOS kernel value -> the value, "" if unknown

# Names as in /proc/cpuinfo.
RELEVANT_FLAGS = (
    *(
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx_vnni_int8",
        "amx_int8",
        "avx512_bf16",
        "amx_bf16",
    ),
    *("asimd", "asimdhp", "asimddp", "i8mm", "sve"),
)
_MACOS_FLAGS = {
    "asimd": "hw.optional.neon",
    "asimdhp": "hw.optional.arm.FEAT_FP16",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "avx2": "hw.optional.avx2_0",
    "avx512f": "hw.optional.avx512f",
}

_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
_INT8_DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})


@dataclass(frozen=True, slots=True)
class Processor:
    """Model name, physical cores that this process may use, and which `RELEVANT_FLAGS` it has."""

    model: str
    cores: int
    flags: tuple[str, ...]


def has_int8_dot_products(flags: Collection[str]) -> bool:
    """Tell from a processor's flags whether it sums int8 products without saturation."""
    return not _INT8_DOT_PRODUCT.isdisjoint(flags)


def has_bfloat16(flags: Collection[str]) -> bool:
    """Tell from a processor's flags whether it multiplies matrices in bfloat16."""
    return not _BFLOAT16.isdisjoint(flags)


def detect_processor() -> Processor:
    """Detect the processor of this computer; fields stay generic where the system says nothing."""
    if sys.platform == "darwin":
        return macos_processor(_sysctl)
    text = _read(Path("/proc/cpuinfo"))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = linux_processor(text, allowed if allowed else set(range(os.cpu_count() or 1)))
    quota = cgroup_cores(Path("/sys/fs/cgroup"))
    cores = found.cores if quota is None else max(1, min(found.cores, quota))
    board = _read(Path("/proc/device-tree/model")).rstrip("\0\n")
    model = found.model or board or platform.processor() or platform.machine()
    return Processor(model, cores, found.flags)


def linux_processor(cpuinfo: str, allowed: set[int]) -> Processor:
    """Parse the text of /proc/cpuinfo, for the logical processors in `allowed`.

    Two logical processors with the same package and core number are one core. Where the
    text does not number cores (Arm), each logical processor is one.
    """
    cores: set[tuple[str, str]] = set()
    model, flags = "", set[str]()
    for block in cpuinfo.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
        values = {key.strip(): value.strip() for key, _, value in pairs}
        number = values.get("processor", "")
        if not number.isdecimal() or int(number) not in allowed:
            continue
        cores.add((values.get("physical id", ""), values.get("core id", f"cpu{number}")))
        model = model or values.get("model name", "")
        flags.update((values.get("flags") or values.get("Features", "")).split())
    relevant = tuple(flag for flag in RELEVANT_FLAGS if flag in flags)
    return Processor(model, len(cores) or len(allowed), relevant)


def macos_processor(sysctl: Sysctl) -> Processor:
    """Read model, cores and flags from macOS; performance cores only, where it has two kinds."""
    counts = [sysctl("hw.perflevel0.physicalcpu"), sysctl("hw.physicalcpu")]
    cores = next((int(count) for count in counts if count.isdecimal()), os.cpu_count() or 1)
    found = {flag for flag, name in _MACOS_FLAGS.items() if sysctl(name) == "1"}
    flags = tuple(flag for flag in RELEVANT_FLAGS if flag in found)
    return Processor(sysctl("machdep.cpu.brand_string") or platform.machine(), cores, flags)


def detect_memory_mb() -> int | None:
    """Return memory in MB of 10^6 bytes: the machine's, or the container's limit if lower.

    None where neither is known.
    """
    if sys.platform == "darwin":
        text = _sysctl("hw.memsize")
        return int(text) // 10**6 if text.isdecimal() else None
    limits = [memory_total(_read(Path("/proc/meminfo"))), cgroup_memory(Path("/sys/fs/cgroup"))]
    known = [limit for limit in limits if limit]
    return min(known) // 10**6 if known else None


def memory_total(meminfo: str) -> int | None:
    """Return bytes of memory from the text of /proc/meminfo; None if it does not say."""
    for line in meminfo.splitlines():
        words = line.split()
        if words[:1] == ["MemTotal:"] and len(words) == 3 and words[1].isdecimal():
            return int(words[1]) * 1024
    return None


def cgroup_memory(root: Path) -> int | None:
    """Return the bytes that a container may use (cgroup version 2, then 1); None for no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(root / name).strip()
        # Version 1 writes a huge number where there is no limit; `min` takes care of it.
        if text.isdecimal():
            return int(text)
    return None


def cgroup_cores(root: Path) -> int | None:
    """Return the whole cores that a container's CPU quota allows; None for no quota."""
    words = _read(root / "cpu.max").split()
    if not words:
        words = [_read(root / f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
        return max(1, int(words[0]) // int(words[1]))
    return None


def _sysctl(name: str) -> str:
    try:
        result = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


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
    """A computer, with what this process may use of it.

    Attributes:
        cpu: the processor's model name.
        cores: physical cores available, within CPU affinity and container quota.
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
    """Detect this computer. Never fails: what cannot be detected is empty or None."""
    processor = detect_processor()
    return Machine(
        cpu=processor.model,
        cores=processor.cores,
        flags=processor.flags,
        memory_mb=detect_memory_mb(),
        os=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {sys.version.split()[0]}",
        packages=_installed(),
    )


def _installed() -> tuple[tuple[str, str], ...]:
    """Read the versions from package metadata, importing nothing."""
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
