import shutil
import subprocess
import sys

import numpy as np
import pytest

from edgeclip.runtime.engines.tensorrt_library import CudaBuffers, call, gpu_capability, gpu_name
from edgeclip.runtime.errors import EngineError


def test_without_a_gpu_every_call_is_an_error_in_words() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    for attempt in (CudaBuffers, gpu_name, gpu_capability):
        with pytest.raises(EngineError, match=r"cuda\w+ failed: .*\(cudaError\w+\): .*NVIDIA"):
            attempt()
    with pytest.raises(EngineError, match=r"cudaMalloc failed"):
        call("cudaMalloc", 16)


def test_missing_cuda_bindings_names_the_extras() -> None:
    code = (
        "import sys; sys.modules['cuda'] = None\n"
        "from edgeclip.runtime.engines.tensorrt_library import gpu_name\n"
        "from edgeclip.runtime.errors import MissingExtraError\n"
        "try: gpu_name()\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'edgeclip[tensorrt]' or 'edgeclip[tensorrt-rtx]'" in done.stdout


@pytest.mark.gpu
def test_arrays_go_to_the_gpu_and_back() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    buffers = CudaBuffers()
    for size in (5, 1000, 3):  # grows once, is then kept
        array = np.arange(size, dtype=np.int64)
        buffers.send("a", array)
        back = buffers.fetch("a", array.shape, array.dtype)
        buffers.wait()
        np.testing.assert_array_equal(back, array)
    address = buffers.at_least("a", 8000)
    assert buffers.at_least("a", 1) == address
    buffers.close()
    buffers.close()


@pytest.mark.gpu
def test_too_much_memory_is_an_error_with_advice() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    buffers = CudaBuffers()
    with pytest.raises(EngineError, match=r"cudaErrorMemoryAllocation.*lower batch_max"):
        buffers.at_least("huge", 1 << 50)
    buffers.close()
