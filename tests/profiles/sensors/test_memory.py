from pathlib import Path

import pytest

from edgeclip.profiles.sensors.clocks import peak_memory_mb
from tests.profiles.sensors.kernel_trees import write_tree


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ("Name:\tpython\nVmPeak:\t 900000 kB\nVmHWM:\t  500000 kB\nVmRSS:\t  400000 kB", 512.0),
        ("Name:\tkthreadd", None),
    ],
)
def test_the_peak_is_what_was_resident(tmp_path: Path, status: str, found: float | None) -> None:
    write_tree(tmp_path, {"proc/self/status": status})
    assert peak_memory_mb(tmp_path) == found


def test_none_without_proc(tmp_path: Path) -> None:
    assert peak_memory_mb(tmp_path) is None


@pytest.mark.skipif(peak_memory_mb() is None, reason="peak memory is not reported here")
def test_the_peak_does_not_fall() -> None:
    before = peak_memory_mb()
    ballast = bytearray(b"1") * 50_000_000
    after = peak_memory_mb()
    assert before is not None
    assert after is not None
    assert after >= max(before, len(ballast) / 1e6)
