import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.profiles.layers.roofline import (
    FEWEST_RUNS,
    PRODUCT_SIZES,
    TOO_SHORT_MS,
    LayerDistance,
    cpu_bandwidth,
    engine_bandwidth,
    far_larger_than_caches,
    layer_distances,
    measure_peak,
    measure_roofline,
    peak_of,
    peak_rate,
    timed_runs,
)
from edgeclip.profiles.record.measurement import LayerProfile, LayerTime, Roofline
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.device.machine import detect_memory_mb
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

MIB = 1 << 20


def test_runs_are_timed_until_the_seconds_are_over() -> None:
    ran: list[None] = []
    start = time.perf_counter()
    times = timed_runs(lambda: ran.append(None), seconds=0.02)
    elapsed = time.perf_counter() - start
    assert len(ran) == len(times) + 1  # one is not timed
    assert elapsed >= 0.02
    assert 0 < times.sum() <= elapsed


def test_however_slow_it_runs_five_times() -> None:
    assert len(timed_runs(lambda: sum(range(10**4)), seconds=1e-9)) == FEWEST_RUNS


def test_a_peak_is_the_rate_of_the_fastest_tenth() -> None:
    found = peak_rate(np.tile([*[2.0] * 8, 1.0, 1.0], 10), amount=10.0)
    assert found.value == pytest.approx(10.0)
    assert found.low <= found.value <= found.high
    steady = peak_rate(np.full(40, 0.5), amount=3.0)
    assert [steady.low, steady.value, steady.high] == pytest.approx([6, 6, 6])
    few = peak_rate(np.full(20, 0.5), amount=3.0)
    assert [few.low, few.value, few.high] == [6, 6, math.inf]  # at least so much


def cache(root: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def most() -> int:
    """Bytes of an array that memory allows: three take an eighth."""
    memory = detect_memory_mb()
    return 10**18 if memory is None else memory * 10**6 // 24


def test_caches_of_the_last_level_are_counted_once_each(tmp_path: Path, most: int) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        cache(tmp_path, cpu, 3, 3, "16384K", "0-1" if cpu < 2 else "2-3")
    assert far_larger_than_caches(tmp_path) == min(most, 4 * 2 * 16 * MIB)


def test_a_device_without_a_third_level(tmp_path: Path, most: int) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        cache(tmp_path, cpu, 2, 2, "12M", "0-3")
    assert far_larger_than_caches(tmp_path) == min(most, 48 * MIB)


def test_unknown_caches_are_taken_to_be_large(tmp_path: Path, most: int) -> None:
    assert far_larger_than_caches(tmp_path) == min(most, 128 * MIB)
    cache(tmp_path, 0, 0, 1, "unknown", "0")
    assert far_larger_than_caches(tmp_path) == min(most, 128 * MIB)


def test_arrays_leave_most_of_the_memory_alone(tmp_path: Path, most: int) -> None:
    cache(tmp_path, 0, 0, 3, "64G", "0")
    assert far_larger_than_caches(tmp_path) == min(most, 256 << 30)


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_of_this_machine(threads: int) -> None:
    found, how = cpu_bandwidth(threads, seconds=0.03, array_bytes=MIB)
    assert 0 < found.low <= found.value <= found.high
    assert how.split()[2].rstrip(",") in ("Copy", "Add", "Read")
    assert how.endswith("arrays of 1 MB")


def test_roofline_of_this_machine(cpu_device: DeviceProfile) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp32", "int8"))
    found = measure_roofline(device, seconds=0.05, array_bytes=MIB)
    assert found.threads == device.threads
    peaks = dict(found.peak_gflops)
    assert list(peaks) == ["fp32", "int8"]
    for value in (*peaks.values(), found.bandwidth_gb_s):
        assert 0 < value.low <= value.value <= value.high
    assert "by onnxruntime-cpu (fp32 at 256" in found.method
    assert found.interference is not None


def test_only_what_the_device_allows_is_measured(cpu_device: DeviceProfile) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp32",))
    found = measure_roofline(device, seconds=0.01, array_bytes=MIB)
    assert [name for name, _ in found.peak_gflops] == ["fp32"]


def test_fp16_has_no_size_that_fp32_lacks() -> None:
    assert set(PRODUCT_SIZES["fp16"]) <= set(PRODUCT_SIZES["fp32"])
    for sizes in PRODUCT_SIZES.values():
        assert list(sizes) == sorted(sizes)


def test_a_larger_size_that_does_not_fit_the_time_is_left_out(cpu_device: DeviceProfile) -> None:
    _, size = measure_peak(cpu_device, "fp32", seconds=1e-6)
    assert size == 256


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_no_time_is_refused(cpu_device: DeviceProfile, seconds: float) -> None:
    with pytest.raises(InputError, match="more than"):
        measure_roofline(cpu_device, seconds=seconds)


@pytest.mark.parametrize("name", ["h200", "jetson-orin-nano", "rtx-4000-ada"])
def test_a_device_that_is_not_here_says_so(name: str) -> None:
    """No GPU is needed to ask for one; there must be a sentence, whatever is missing."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EdgeClipError):
        measure_roofline(load_device(name), seconds=0.01)


def test_an_engine_shows_how_fast_it_reads(cpu_device: DeviceProfile) -> None:
    """What is done on a GPU with the large graph, here with a small one."""
    pytest.importorskip("torch", reason="only the runtime is installed")
    from edgeclip.export.probes.built_in_graphs import reading_graph

    content = reading_graph(256).SerializeToString()
    engine = open_engine(Path("reading_fp32.onnx"), device=cpu_device, content=content)
    found = engine_bandwidth(engine, 256, seconds=0.01)
    assert 0 < found.low <= found.value < math.inf


# --- Distances


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def roofline(bandwidth: float = 20.0, **peaks: float) -> Roofline:
    return Roofline(
        threads=2,
        peak_gflops=tuple((name, exactly(peak)) for name, peak in peaks.items()),
        bandwidth_gb_s=exactly(bandwidth),
        method="by hand",
    )


def layer(
    ms: float,
    flops: float | None,
    moved: float | None,
    *,
    op: str = "MatMul",
    provider: str = "CPUExecutionProvider",
) -> LayerTime:
    return LayerTime(
        name=f"the {op}", op=op, provider=provider, ms=ms, share=0.5, flops=flops, bytes=moved
    )


def profile(*layers: LayerTime) -> LayerProfile:
    total = sum(item.ms for item in layers)
    return LayerProfile(source="by hand", runs=1, total_ms=total, plain_ms=total, layers=layers)


def distance(layer: LayerTime, roof: Roofline, precision: Precision = "fp32") -> LayerDistance:
    (found,) = layer_distances(profile(layer), roof, precision)
    return found


def test_a_large_product_is_limited_by_computing() -> None:
    found = distance(layer(25.0, 2e9, 12e6), roofline(fp32=100.0))
    assert found.least_ms == pytest.approx(20)
    assert found.share == pytest.approx(0.8)
    assert found.limit == "compute"


def test_a_product_with_one_row_is_limited_by_memory() -> None:
    """1 x 1024 by 1024 x 1024: every weight is read for one multiply-add."""
    flops, moved = 2.0 * 1024**2, 4.0 * 1024**2
    found = distance(layer(1.0, flops, moved), roofline(fp32=100.0))
    assert found.least_ms == found.share == pytest.approx(moved / 20e6)
    assert found.limit == "memory"


def test_what_moves_data_is_compared_with_the_bandwidth() -> None:
    for flops in (None, 0.0):
        found = distance(layer(1.0, flops, 10e6, op="Transpose"), roofline(fp32=100.0))
        assert found.share == pytest.approx(0.5)
        assert found.limit == "memory"


def test_what_shapes_do_not_tell_stays_unknown() -> None:
    nothing, no_bytes = layer_distances(
        profile(layer(1.0, None, None), layer(1.0, 50e6, None)), roofline(fp32=100.0), "fp32"
    )
    assert (nothing.share, nothing.limit, nothing.least_ms) == (None, None, None)
    assert no_bytes.share == pytest.approx(0.5)
    assert no_bytes.limit is None  # memory may be the side that holds it


def test_a_short_layer_tells_nothing_but_overhead() -> None:
    assert distance(layer(TOO_SHORT_MS / 2, 1e3, 1e3), roofline(fp32=100.0)).limit == "overhead"


def test_a_layer_that_took_no_time_reaches_no_share() -> None:
    found = distance(layer(0.0, 1e3, 1e3), roofline(fp32=100.0))
    assert (found.share, found.limit) == (None, "overhead")


@pytest.mark.parametrize(
    ("op", "precision"),
    [
        ("QLinearMatMul", "int8"),
        ("MatMulIntegerToFloat", "int8"),
        ("DynamicQuantizeMatMul", "int8"),
        ("QGemm", "int8"),
        ("MatMul", "fp32"),  # attention's own products stay in float
        ("Softmax", "fp32"),
    ],
)
def test_layers_of_an_int8_graph_have_the_roof_of_what_they_compute_in(
    op: str, precision: Precision
) -> None:
    found = distance(layer(10.0, 1e9, 1e3, op=op), roofline(fp32=100.0, int8=400.0), "int8")
    assert found.precision == precision
    assert found.least_ms == pytest.approx(2.5 if precision == "int8" else 10)


def test_another_engine_names_its_layers_otherwise() -> None:
    tensorrt = layer(1.0, 1e9, 1e3, op="gemm", provider="TensorRT")
    assert distance(tensorrt, roofline(fp32=100.0, int8=400.0), "int8").precision == "int8"


def test_fp16_without_a_peak_is_computed_in_fp32_and_int8_is_not() -> None:
    roof = roofline(fp32=100.0)
    assert peak_of(roof, "fp16") == 100
    assert peak_of(roofline(fp32=100.0, fp16=150.0), "fp16") == 150
    assert peak_of(roof, "int8") is None
    found = distance(layer(1.0, 1e9, 1e3, op="QLinearMatMul"), roof, "int8")
    assert (found.least_ms, found.share, found.limit) == (None, None, None)


maybe = st.none() | st.just(0.0) | st.floats(1e-6, 1e12, allow_nan=False)


@given(
    ms=st.floats(0, 1e6),
    flops=maybe,
    moved=maybe,
    peak=st.floats(1e-3, 1e6),
    bandwidth=st.floats(1e-3, 1e5),
)
def test_the_roof_allows_no_less_than_either_side_needs(
    ms: float, flops: float | None, moved: float | None, peak: float, bandwidth: float
) -> None:
    found = distance(layer(ms, flops, moved), roofline(bandwidth, fp32=peak))
    sides = [x / rate / 1e6 for x, rate in ((flops, peak), (moved, bandwidth)) if x]
    assert found.least_ms == (pytest.approx(max(sides)) if sides else None)
    assert (found.share is None) == (not sides or ms == 0)
    assert found.limit != "compute" or found.least_ms == pytest.approx(sides[0])
