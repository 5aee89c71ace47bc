"""TensorRT installations: CUDA calls, the library's version, its log and progress."""

import dataclasses
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from edgeclip.runtime.bundle.engine_records import sm
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.tensorrt_library import (
    CudaBuffers,
    MessageLog,
    PhaseBars,
    TensorRtLibrary,
    call,
    create,
    gpu_capability,
    gpu_name,
    make_monitor,
    open_library,
)
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
        ("jetson-orin-nano", "tensorrt", "on a Jetson it comes with JetPack"),
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
    assert "on a Jetson 'edgeclip[jetpack6]' or 'edgeclip[jetpack7]'" in done.stdout


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


def test_messages_are_kept_by_severity(rtx: TensorRtLibrary) -> None:
    log = MessageLog(rtx.module)
    severity = rtx.module.ILogger.Severity
    assert log.summary() == "it gives no reason"
    log.logger.log(severity.INFO, "nothing to see")
    log.logger.log(severity.WARNING, "odd\n  shapes")
    assert log.summary() == "odd shapes"
    for _ in range(2):
        log.logger.log(severity.ERROR, "out of memory")
    log.logger.log(severity.INTERNAL_ERROR, "x" * 1000)
    assert log.summary() == "out of memory; " + "x" * 500
    log.clear()
    assert log.summary() == "it gives no reason"


def test_a_process_has_one_logger(rtx: TensorRtLibrary) -> None:
    one, other = MessageLog(rtx.module), MessageLog(rtx.module)
    assert one.logger is other.logger  # TensorRT keeps a pointer to the first
    error = rtx.module.ILogger.Severity.ERROR
    one.logger.log(error, "no memory")
    assert one.summary() == other.summary() == "no memory"
    del other
    one.clear()
    one.logger.log(error, "again")
    assert one.summary() == "again"


@pytest.mark.parametrize("raised", [TypeError("factory function returned nullptr"), RuntimeError()])
def test_what_cannot_be_made_is_an_error_with_its_reason(
    raised: Exception, rtx: TensorRtLibrary
) -> None:
    log = MessageLog(rtx.module)

    def make() -> None:
        log.logger.log(rtx.module.ILogger.Severity.ERROR, "CUDA initialization failure 35")
        raise raised

    with pytest.raises(EngineError, match="cannot start: CUDA initialization failure 35: check"):
        create(rtx, make, log)


def test_many_messages_are_cut_short(rtx: TensorRtLibrary) -> None:
    log = MessageLog(rtx.module)
    for number in range(20):
        log.logger.log(rtx.module.ILogger.Severity.ERROR, f"fault {number}")
    assert log.summary().endswith("fault 7; and 12 more")


def test_bars_nest_and_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bars = PhaseBars("building it")
    bars.start("all", None, 2)
    bars.start("parts", "all", 4)
    for done in (1, 4):
        bars.step("parts", done)
    bars.finish("parts")
    bars.start("never finished", "all", 3)
    bars.close()
    bars.step("never finished", 2)  # TensorRT may speak of it once more
    text = capsys.readouterr().err
    assert "building it:   0%" in text
    assert "  parts: " in text
    assert not bars._bars


def test_nothing_is_drawn_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bars = PhaseBars("building it")
    bars.start("all", None, 2)
    bars.close()
    assert capsys.readouterr().err == ""


class Recorder:
    """Writes down what it is told; raises at a step past `most`."""

    def __init__(self, most: int = 100) -> None:
        self.told: list[tuple[object, ...]] = []
        self._most = most

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.told.append(("start", phase, parent, steps))

    def step(self, phase: str, done: int) -> None:
        if done > self._most:
            raise ValueError("the display broke")
        self.told.append(("step", phase, done))

    def finish(self, phase: str) -> None:
        self.told.append(("finish", phase))


def test_monitor_passes_phases_on_and_cancels(rtx: TensorRtLibrary) -> None:
    recorder, cancel = Recorder(), threading.Event()
    monitor = make_monitor(rtx.module, recorder, cancel)
    monitor.phase_start("all", None, 2)
    assert monitor.step_complete("all", 0)
    cancel.set()
    assert not monitor.step_complete("all", 1)
    monitor.phase_finish("all")
    assert recorder.told == [
        ("start", "all", None, 2),
        ("step", "all", 1),
        ("step", "all", 2),
        ("finish", "all"),
    ]


def test_broken_display_does_not_reach_tensorrt(rtx: TensorRtLibrary) -> None:
    recorder = Recorder(most=0)
    monitor = make_monitor(rtx.module, recorder, threading.Event())
    assert monitor.step_complete("all", 0)
    monitor.phase_finish("all")
    assert recorder.told == []
