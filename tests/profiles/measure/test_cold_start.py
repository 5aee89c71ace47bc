import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeclip.profiles.measure.cold_start import _intervals, main, measure_cold_start
from edgeclip.profiles.sensors.machine_state import peak_memory_mb
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import EngineError, InputError
from tests.data_file import save_with_data

PIXELS = {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}


def test_processes_tell_means_and_intervals(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    model = tiny_bundle / "onnx" / "vision_model.onnx"
    start = measure_cold_start(model, PIXELS, device=cpu_device, processes=2)
    assert start.processes == 2
    assert start.file_bytes == model.stat().st_size
    assert min(start.import_ms, start.load_ms, start.first_run_ms) > 0
    found = start.intervals
    assert found is not None
    for ms, told in (
        (start.import_ms, found.import_ms),
        (start.load_ms, found.load_ms),
        (start.first_run_ms, found.first_run_ms),
    ):
        assert told.low < told.value < told.high
        assert ms == pytest.approx(told.value, rel=0.05)
    assert start.total_ms == found.total_ms.value


def test_weights_beside_the_graph_count(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    path = tmp_path / "vision.onnx"
    size = save_with_data(tiny_bundle / "onnx" / "vision_model.onnx", path)
    start = measure_cold_start(path, PIXELS, device=cpu_device, processes=1)
    assert start.file_bytes == size


def test_the_clock_starts_before_anything_is_imported(tiny_bundle: Path) -> None:
    script = """
import sys, time
seen, clock = [], time.perf_counter
def looked_at():
    seen.append({"numpy", "yaml", "onnxruntime"} & set(sys.modules))
    return clock()
time.perf_counter = looked_at
from edgeclip.profiles.measure.cold_start import main
assert main(sys.argv[1:]) == 0
print(sorted(seen[0]), len(seen[-1]))
"""
    words = [str(tiny_bundle / "onnx" / "vision_model.onnx"), "--device", "x86-avx2"]
    words += ["--input", "pixel_values=float32:1x3x8x8"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] 3"


def test_one_process_tells_of_no_other(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    model = tiny_bundle / "onnx" / "vision_model.onnx"
    start = measure_cold_start(model, PIXELS, device=cpu_device, processes=1)
    assert start.load_ms > 0
    assert start.intervals is None


def test_intervals_are_student_s_over_processes() -> None:
    runs = [
        {"import_ms": ms, "load_ms": 2 * ms, "first_run_ms": 1.0} for ms in (90.0, 100.0, 110.0)
    ]
    found = _intervals(runs)
    logs = np.log([90.0, 100.0, 110.0])
    half = 4.302653 * logs.std(ddof=1) / np.sqrt(3)  # of two degrees of freedom
    assert found.import_ms.value == pytest.approx(np.exp(logs.mean()))
    assert found.import_ms.high == pytest.approx(np.exp(logs.mean() + half))
    assert found.first_run_ms.low == pytest.approx(1.0)
    assert found.load_ms.value < found.total_ms.value < found.load_ms.value + 120


def test_says_why_a_process_failed(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"broken\.onnx failed: .*cannot load"):
        measure_cold_start(broken, PIXELS, device=cpu_device, processes=1)


def test_refuses_a_missing_file_and_no_processes(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    with pytest.raises(InputError, match="not a file"):
        measure_cold_start(tmp_path / "none.onnx", PIXELS, device=cpu_device)
    with pytest.raises(InputError, match="at least 1"):
        measure_cold_start(tmp_path, PIXELS, device=cpu_device, processes=0)


@pytest.mark.parametrize("item", ["pixel_values", "x=float32:1xA", "x=nonsense:1x3", "x=float32:"])
def test_input_must_say_name_type_and_shape(item: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.onnx", "--input", item, "--device", "x86-avx2"]) == 2
    assert "write NAME=DTYPE:SHAPE" in capsys.readouterr().err


@pytest.mark.skipif(peak_memory_mb() is None, reason="peak memory is not reported here")
def test_a_child_does_not_inherit_its_parent_s_peak() -> None:
    """`ru_maxrss` would: it counts the parent's pages between fork and exec."""
    ballast = np.ones(30_000_000)  # 240 MB
    here = peak_memory_mb()
    script = (
        "from edgeclip.profiles.sensors.machine_state import peak_memory_mb; "
        "print(peak_memory_mb())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert here is not None
    assert here > ballast.nbytes / 1e6
    assert 5 < float(done.stdout) < 150


def test_peak_memory_is_none_where_nothing_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, **_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory_mb() is None
