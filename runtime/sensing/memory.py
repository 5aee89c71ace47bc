"""Memory that a process holds, on the processor's side and on the GPU's."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeclip.runtime.sensing.kernel_files import read_line
from edgeclip.runtime.sensing.nvml import NvmlGpu, this_gpu

_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """In MB of 10^6 bytes; None where it is not told.

    Attributes:
        peak_mb: the most that was resident so far. On a Jetson, whose GPU shares the memory, some
            of the GPU's is not part of it.
        gpu_mb: of the GPU's own memory, now.
    """

    peak_mb: float | None
    gpu_mb: float | None


def memory_of_process(
    pid: int | None = None, root: Path = _ROOT, *, gpu: NvmlGpu | None = None
) -> Memory:
    """Look at a process that runs.

    Args:
        pid: of which; this one by default.
        root: where `proc` is.
        gpu: the first one of this machine by default, where `root` is its own.
    """
    if gpu is None and root == _ROOT:
        gpu = this_gpu()
    number = os.getpid() if pid is None else pid
    return Memory(
        peak_mb=peak_memory_mb(pid, root), gpu_mb=None if gpu is None else gpu.memory_mb(number)
    )


def peak_memory_mb(pid: int | None = None, root: Path = _ROOT) -> float | None:
    """The most memory a process held so far, in MB of 10^6 bytes; None if not reported.

    Linux's VmHWM is preferred to `ru_maxrss`, which a child inherits: a small process
    started by one that holds torch would report torch's memory.

    Args:
        pid: of which; this one by default.
        root: where `proc` is.
    """
    status = read_line(root / "proc" / ("self" if pid is None else str(pid)) / "status") or ""
    words = status.partition("VmHWM:")[2].split()
    if words and words[0].isdecimal():
        return int(words[0]) * 1024 / 1e6
    if sys.platform == "darwin" and pid is None and root == _ROOT:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes there
    return None
