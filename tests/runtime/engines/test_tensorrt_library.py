import dataclasses
import subprocess
import sys

import pytest

from edgeclip.runtime.bundle.engine_records import sm
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary, open_library
from edgeclip.runtime.errors import EngineError

ORIN = load_device("jetson-orin-nano")
FULL = TensorRtLibrary("tensorrt", "10.3.0", object())


def test_opens_what_is_installed(rtx: TensorRtLibrary) -> None:
    assert rtx.name == "tensorrt-rtx"
    assert rtx.version == rtx.module.__version__
    assert rtx.major == int(rtx.version.split(".")[0])
    assert rtx.title == f"TensorRT-RTX {rtx.version}"


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])
def test_rtx_builds_for_its_gpus_anywhere(
    rtx: TensorRtLibrary, ada: DeviceProfile, capability: str
) -> None:
    device = dataclasses.replace(ada, compute_capability=capability, precisions=("fp16",))
    assert rtx.why_not_build(device) is None


def test_rtx_does_not_build_for_other_gpus(rtx: TensorRtLibrary) -> None:
    assert "does not build for compute capability 8.7" in str(rtx.why_not_build(ORIN))
    assert "has no NVIDIA GPU" in str(rtx.why_not_build(load_device("x86-avx2")))


def test_full_tensorrt_builds_on_the_device_only() -> None:
    """No machine has this capability, so it is refused with a GPU and without one."""
    device = dataclasses.replace(ORIN, compute_capability="99.9")
    reason = FULL.why_not_build(device)
    assert reason is not None
    assert reason.startswith("TensorRT 10.3.0 builds ")


def test_device_of_another_engine() -> None:
    with pytest.raises(EngineError, match="runs on onnxruntime-cpu: choose one whose engine is"):
        open_library(load_device("x86-avx2"))


def test_other_major_version_names_both(rtx: TensorRtLibrary, ada: DeviceProfile) -> None:
    device = dataclasses.replace(ada, tensorrt_major=99)
    with pytest.raises(EngineError, match=rf"tensorrt_major 99, but {rtx.title} is installed"):
        open_library(device)


@pytest.mark.parametrize(
    ("device", "module", "expected"),
    [
        ("jetson-orin-nano", "tensorrt", "'edgeclip[tensorrt]'; on a Jetson it comes with"),
        ("rtx-4000-ada", "tensorrt_rtx", "pip install 'edgeclip[tensorrt-rtx]'"),
    ],
)
def test_missing_library_names_the_extra(device: str, module: str, expected: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from edgeclip.runtime.device.device_profile import load_device\n"
        "from edgeclip.runtime.errors import MissingExtraError\n"
        "from edgeclip.runtime.engines.tensorrt_library import open_library\n"
        f"try: open_library(load_device({device!r}))\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert expected in done.stdout


def test_short_name_of_a_capability() -> None:
    assert sm("8.9") == "sm89"
    assert sm("12.0") == "sm120"


@pytest.mark.gpu
def test_full_tensorrt_builds_for_the_gpu_at_hand() -> None:
    from edgeclip.runtime.engines.tensorrt_library import gpu_capability

    pytest.importorskip("cuda.bindings.runtime")
    device = dataclasses.replace(
        ORIN, compute_capability=gpu_capability(), precisions=("fp32", "fp16")
    )
    assert FULL.why_not_build(device) is None
