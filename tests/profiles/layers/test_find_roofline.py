import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.export.probes.built_in_graphs import reading_graph
from edgeclip.profiles.layers import roofline as bandwidth_module
from edgeclip.profiles.layers import roofline as roofline_module
from edgeclip.profiles.layers.roofline import (
    FEWEST_RUNS,
    PRODUCT_SIZES,
    Form,
    Peak,
    engine_bandwidth,
    far_larger_than_caches,
    find_bandwidth,
    find_peak,
    find_roofline,
    last_level_caches,
    peak_rate,
    timed_runs,
)
from edgeclip.profiles.sensors.interference import InterferenceWatch, judged
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import EdgeClipError, EngineError, InputError
from edgeclip.runtime.quality.intervals import Interval

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.runs = 0

    def run(self, *seconds: float) -> Callable[[], None]:
        """Takes these seconds in turns."""
        turns = itertools.cycle(seconds)

        def once() -> None:
            self.now += next(turns)
            self.runs += 1

        return once


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake


def test_runs_are_timed_until_the_seconds_are_over(clock: Clock) -> None:
    times = timed_runs(clock.run(0.25), seconds=2.0)
    assert times == pytest.approx([0.25] * 8)
    assert clock.runs == 9  # one is not timed


def test_however_slow_it_runs_five_times(clock: Clock) -> None:
    assert len(timed_runs(clock.run(100.0), seconds=0.001)) == FEWEST_RUNS


def test_a_peak_is_the_rate_of_the_fastest_tenth(clock: Clock) -> None:
    times = timed_runs(clock.run(*[2.0] * 8, 1.0, 1.0), seconds=199.0)
    found = peak_rate(times, amount=10.0)
    assert found.value == pytest.approx(10.0)
    assert found.low <= found.value <= found.high
    steady = peak_rate(np.full(20, 0.5), amount=3.0)
    assert [steady.low, steady.value, steady.high] == pytest.approx([6, 6, 6])


def cache(root: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


def test_caches_of_the_last_level_are_counted_once_each(tmp_path: Path) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        cache(tmp_path, cpu, 3, 3, "16384K", "0-1" if cpu < 2 else "2-3")
    assert last_level_caches(tmp_path) == 2 * 16 * MIB
    assert far_larger_than_caches(tmp_path) in range(32 * MIB, 128 * MIB + 1)


def test_a_device_without_a_third_level(tmp_path: Path) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        cache(tmp_path, cpu, 2, 2, "1M", "0-3")
    assert last_level_caches(tmp_path) == MIB


def test_unknown_caches_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_level_caches(tmp_path) is None
    cache(tmp_path, 0, 0, 1, "unknown", "0")
    assert last_level_caches(tmp_path) is None
    monkeypatch.setattr(bandwidth_module, "detect_memory_mb", lambda: None)
    assert far_larger_than_caches(tmp_path) == 128 * MIB


def test_arrays_leave_most_of_the_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path, 0, 0, 3, "256M", "0")
    monkeypatch.setattr(bandwidth_module, "detect_memory_mb", lambda: 2400)
    assert far_larger_than_caches(tmp_path) == 100_000_000


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_of_this_machine(threads: int) -> None:
    found = find_bandwidth(threads, seconds=0.03, array_bytes=MIB)
    assert 0 < found.gb_s.low <= found.gb_s.value <= found.gb_s.high < math.inf
    assert found.kernel in ("Copy", "Add", "Read")
    assert found.array_bytes == MIB // (4 * threads) * 4 * threads


def test_roofline_of_this_machine(cpu_device: DeviceProfile) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp32", "int8"))
    found = find_roofline(device, seconds=0.05, array_bytes=MIB)
    assert found.threads == device.threads
    peaks = dict(found.peak_gflops)
    assert list(peaks) == ["fp32", "int8"]
    for value in (*peaks.values(), found.bandwidth_gb_s):
        assert 0 < value.low <= value.value <= value.high < math.inf
    assert "by onnxruntime-cpu (fp32 at 256" in found.method
    assert "numpy's BLAS with" in found.method
    assert "1 MB" in found.method


def test_only_what_the_device_allows_is_measured(
    cpu_device: DeviceProfile, fake_peaks: list[str]
) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp32",))
    found = find_roofline(device, seconds=0.01, array_bytes=MIB)
    assert [name for name, _ in found.peak_gflops] == fake_peaks == ["fp32"]


@pytest.fixture
def fake_peaks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Peaks without running: fp32 reaches 100, fp16 103, int8 fails. Their forms, as asked."""
    asked: list[str] = []

    def peak(device: DeviceProfile, form: Form, seconds: float) -> Peak:
        asked.append(form)
        if "int8" in form:
            raise EngineError("no such kernel")
        return Peak(Interval(100, 95, 105) if form == "fp32" else Interval(103, 99, 110), 512)

    monkeypatch.setattr(roofline_module, "find_peak", peak)
    return asked


@pytest.mark.parametrize("faster", [True, False])
def test_half_precision_counts_only_where_it_is_faster(
    faster: bool,
    cpu_device: DeviceProfile,
    fake_peaks: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline_module, "_is_faster_in_half", lambda *_: faster)
    device = dataclasses.replace(cpu_device, precisions=("fp32", "fp16", "int8"))
    found = find_roofline(device, seconds=0.01, array_bytes=MIB)
    assert fake_peaks == ["fp32", "fp16", "int8"]
    fp32, fp16 = ("fp32", Interval(100, 95, 105)), ("fp16", Interval(103, 99, 110))
    assert found.peak_gflops == ((fp32, fp16) if faster else (fp32,))
    assert ("fp16 left out" in found.method) is not faster
    assert "int8 not available: no such kernel" in found.method


@pytest.mark.parametrize(("half", "full", "faster"), [(1.0, 2.0, True), (1.9, 2.0, False)])
def test_half_and_full_precision_take_turns(
    half: float,
    full: float,
    faster: bool,
    clock: Clock,
    cpu_device: DeviceProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    class Fake:
        name = "fake"

        def __init__(self, form: str) -> None:
            self._form = form

        def run(self, feeds: object) -> dict[str, Any]:
            asked.append(self._form)
            clock.now += half if self._form == "fp16" else full
            return {}

    monkeypatch.setattr(
        roofline_module, "_open", lambda path, device: Fake(path.stem.split("_")[-1])
    )
    assert roofline_module._is_faster_in_half(cpu_device, 256, seconds=20.0) is faster
    assert asked[:4] == ["fp16", "fp32", "fp16", "fp32"]


def test_half_precision_has_no_size_that_full_precision_lacks() -> None:
    assert set(PRODUCT_SIZES["fp16"]) <= set(PRODUCT_SIZES["fp32"])
    for sizes in PRODUCT_SIZES.values():
        assert list(sizes) == sorted(sizes)


@pytest.mark.parametrize("disturbed", [True, False, None])
def test_a_disturbed_roofline_says_so(
    disturbed: bool | None,
    cpu_device: DeviceProfile,
    fake_peaks: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = {True: 0.4, False: 0.01, None: None}[disturbed]
    monkeypatch.setattr(
        InterferenceWatch,
        "__exit__",
        lambda watch, *_: setattr(watch, "found", judged(others_share=share)),
    )
    device = dataclasses.replace(cpu_device, precisions=("fp32",))
    found = find_roofline(device, seconds=0.01, array_bytes=MIB).interference
    assert found is not None
    assert found.disturbed is disturbed
    assert ("other programs used 40% of the processors" in found.reasons) is bool(disturbed)


def test_a_larger_size_that_does_not_fit_the_time_is_left_out(cpu_device: DeviceProfile) -> None:
    assert find_peak(cpu_device, "fp32", seconds=1e-6).size == 256


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_no_time_is_refused(cpu_device: DeviceProfile, seconds: float) -> None:
    with pytest.raises(InputError, match="more than"):
        find_roofline(cpu_device, seconds=seconds)


@pytest.mark.parametrize("name", ["h200", "jetson-orin-nano", "rtx-4000-ada"])
def test_a_device_that_is_not_here_says_so(name: str) -> None:
    """No GPU is needed to ask for one; there must be a sentence, whatever is missing."""
    if _has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EdgeClipError):
        find_roofline(load_device(name), seconds=0.01)


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def test_an_engine_shows_how_fast_it_reads(cpu_device: DeviceProfile) -> None:
    """What is done on a GPU with the large graph, here with a small one."""
    content = reading_graph(256).SerializeToString()
    engine = open_engine(Path("reading_fp32.onnx"), device=cpu_device, content=content)
    found = engine_bandwidth(engine, 256, seconds=0.01)
    assert 0 < found.low <= found.value < math.inf
