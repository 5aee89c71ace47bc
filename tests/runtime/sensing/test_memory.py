import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeclip.runtime.sensing.memory import memory_of_process, peak_memory_mb
from tests.runtime.sensing.fake_nvml import FakeNvml
from tests.runtime.sensing.kernel_trees import write_tree
from tests.runtime.sensing.test_nvml import BUSY, gpu_of


def test_peak_and_gpu_memory_of_a_process(tmp_path: Path) -> None:
    status = "Name:\tpython\nVmPeak:\t 900000 kB\nVmHWM:\t  500000 kB\nVmRSS:\t  400000 kB"
    write_tree(tmp_path, {"proc/42/status": status, "proc/44/status": "Name:\tkthreadd"})
    gpu = gpu_of(FakeNvml(BUSY))
    found = memory_of_process(42, tmp_path, gpu=gpu)
    assert (found.peak_mb, found.gpu_mb) == (512.0, 6000.0)
    unknown = memory_of_process(44, tmp_path, gpu=gpu)
    assert (unknown.peak_mb, unknown.gpu_mb) == (None, None)
    assert memory_of_process(45, tmp_path).gpu_mb is None


@pytest.mark.skipif(peak_memory_mb() is None, reason="peak memory is not reported here")
def test_this_process_and_a_child_of_it() -> None:
    here = memory_of_process().peak_mb
    assert here is not None
    assert here == pytest.approx(memory_of_process(os.getpid()).peak_mb, rel=0.05)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        there = memory_of_process(child.pid).peak_mb
        child.communicate(b"\n")
    if there is not None:  # /proc; elsewhere a process knows of itself alone
        assert 0 < there < here
