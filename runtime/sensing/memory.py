"""Memory that this process holds."""

import sys
from pathlib import Path

from edgeclip.runtime.sensing.kernel_files import read_line

_ROOT = Path("/")


def peak_memory_mb(root: Path = _ROOT) -> float | None:
    """The most memory this process held so far, in MB of 10^6 bytes; None if not reported.

    Of a GPU's own memory it tells nothing. Linux's VmHWM is preferred to `ru_maxrss`, which a
    child inherits: a small process started by one that holds torch would report torch's memory.

    Args:
        root: where `proc` is.
    """
    words = (read_line(root / "proc/self/status") or "").partition("VmHWM:")[2].split()
    if words and words[0].isdecimal():
        return int(words[0]) * 1024 / 1e6
    if sys.platform == "darwin" and root == _ROOT:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes there
    return None
