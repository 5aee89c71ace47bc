"""Measure the roofline of this machine, and compute how far each layer is from it.

Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures" (2009). Compute peaks come from matrix products that the device's own
engine runs; memory bandwidth from large numpy arrays on a CPU, from large weights elsewhere.
"""

import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.measurement import LayerProfile, LayerTime, Roofline
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.profiles.sensors.interference import InterferenceWatch
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_memory_mb
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

Form = Literal["fp32", "fp16", "int8", "symmetric_int8"]
Limit = Literal["compute", "memory", "overhead"]

GRAPHS = Path(__file__).with_name("graphs")
INPUT = "factor"  # float32 [1]
PRODUCTS = 4  # matrix products in a graph, one after the other
# The smallest takes about a millisecond on a CPU: on a busy machine only such short runs are
# not interrupted. fp16 has no size that fp32 lacks.
PRODUCT_SIZES: dict[Form, tuple[int, ...]] = {
    "fp32": (256, 512, 1024, 2048, 4096),
    "fp16": (256, 1024, 4096),
    "int8": (256, 512, 1024, 2048),
    "symmetric_int8": (1024, 4096),
}
READING_SIZE = 8192  # 268 MB of weights, which no cache holds
FEWEST_RUNS = 5
# The very fastest run, which STREAM takes, has no interval; the tenth percentile is nearly as fast.
_PERCENTILE = 10
_CACHES = 32 << 20  # bytes, where the system does not tell; no array is smaller either
# Starting a node, and waking threads for it, takes some microseconds by itself, and profilers
# count in whole ones.
TOO_SHORT_MS = 0.01


def product_path(form: Form, size: int, folder: Path = GRAPHS) -> Path:
    """Path of the graph with products of [size, size] matrices; named as bundles name graphs."""
    return folder / f"product_{size}_{form}.onnx"


def reading_path(folder: Path = GRAPHS) -> Path:
    """Path of the graph that spends its time reading weights."""
    return folder / f"reading_{READING_SIZE}_fp32.onnx"


def measure_roofline(
    device: DeviceProfile, *, seconds: float, array_bytes: int | None = None
) -> Roofline:
    """Measure the compute peaks of the device's engine and the bandwidth of its memory.

    fp32 is always measured, fp16 and int8 where the device allows them; fp16 is left out where
    it is no faster: such an engine converts to fp32 and back. A peak is the rate of the fastest
    tenth of the runs at the best size, with the interval of this one process.

    Args:
        device: says which engine, and how many threads.
        seconds: about how long, loading not counted; nothing runs fewer than 5 times.
        array_bytes: size of each array that shows the CPU's memory bandwidth; by default four
            times the last-level caches.

    Raises:
        EngineError: the engine cannot run the graphs in fp32.
        InputError: `seconds` is not above 0.
        MissingExtraError: the engine's package is not installed.
    """
    if not seconds > 0:
        raise InputError(f"a roofline needs more than {seconds} seconds")
    with InterferenceWatch() as watch:
        precisions: list[Precision] = ["fp32"]
        precisions += [name for name in ("fp16", "int8") if name in device.precisions]
        share = seconds / (len(precisions) + 1)  # one more for memory
        peaks, notes = _measure_peaks(device, precisions, share)
        if device.on_cpu:
            bandwidth, how = cpu_bandwidth(device.threads, seconds=share, array_bytes=array_bytes)
        else:
            bandwidth = engine_bandwidth(_open(reading_path(), device), READING_SIZE, share)
            how = f"memory by reading {READING_SIZE**2 * 4 / 1e6:.0f} MB of weights"
    sizes = ", ".join(f"{name} at {size}" for name, (_, size) in peaks.items())
    products = f"{PRODUCTS} square products in a row by {device.engine} ({sizes})"
    return Roofline(
        threads=device.threads,
        peak_gflops=tuple((name, peak) for name, (peak, _) in peaks.items()),
        bandwidth_gb_s=bandwidth,
        method="; ".join([products, how, *notes, "rates: fastest tenth of runs"]),
        interference=watch.found,
    )


def timed_runs(run: Callable[[], object], seconds: float) -> NDArray[np.float64]:
    """Run once untimed, then for so long and at least 5 times: seconds of each run, [N]."""
    run()
    ends = [time.perf_counter()]
    while len(ends) <= FEWEST_RUNS or ends[-1] - ends[0] < seconds:
        run()
        ends.append(time.perf_counter())
    return np.diff(ends)


def peak_rate(seconds: NDArray[np.float64], amount: float) -> Interval:
    """`amount` a second at the 10th percentile of run times [N], with its 95% interval."""
    fast = percentile_interval(seconds, _PERCENTILE)
    highest = amount / fast.low if fast.low > 0 else math.inf
    return Interval(amount / fast.value, amount / fast.high, highest)


def _measure_peaks(
    device: DeviceProfile, precisions: list[Precision], seconds: float
) -> tuple[dict[Precision, tuple[Interval, int]], list[str]]:
    """Peak in 10^9 operations a second, and its size, by precision; and why one is missing."""
    peaks: dict[Precision, tuple[Interval, int]] = {}
    notes = []
    for precision in precisions:
        form: Form = "fp16" if precision == "fp16" else "fp32"
        if precision == "int8":
            form = "int8" if device.on_cpu else "symmetric_int8"
        try:
            peaks[precision] = measure_peak(device, form, seconds)
        except EngineError as error:
            if precision == "fp32":
                raise
            notes.append(f"{precision} not available: {error}")
    if "fp16" in peaks and peaks["fp16"][0].low < 1.1 * peaks["fp32"][0].value:
        del peaks["fp16"]
        notes.append("fp16 left out, since this engine does not compute it faster than fp32")
    return peaks, notes


def measure_peak(device: DeviceProfile, form: Form, seconds: float) -> tuple[Interval, int]:
    """Measure products of growing size; return the best 10^9 operations a second, and its size.

    A size that would not fit the time that is left ends the search.

    Raises:
        EngineError: the engine cannot run the graphs.
    """
    sizes = PRODUCT_SIZES[form]
    found: list[tuple[Interval, int]] = []
    left = seconds
    for number, size in enumerate(sizes):
        operations = 2 * PRODUCTS * size**3 / 1e9
        best = max((rate.value for rate, _ in found), default=float("inf"))
        if (FEWEST_RUNS + 1) * operations / best > left:
            break
        run = _runner(_open(product_path(form, size), device))
        times = timed_runs(run, left / (len(sizes) - number))
        left -= float(times.sum())
        found.append((peak_rate(times, operations), size))
    return max(found, key=lambda item: item[0].value)


def _runner(engine: Engine) -> Callable[[], object]:
    feed = {INPUT: np.ones(1, np.float32)}
    return lambda: engine.run(feed)


def _open(path: Path, device: DeviceProfile) -> Engine:
    """Open a graph on the device's engine; one of TensorRT is built first, and cached."""
    if device.engine not in ("tensorrt", "tensorrt-rtx"):
        return open_engine(path, device=device)
    from edgeclip.runtime.bundle.engine_records import GraphSource
    from edgeclip.runtime.engines.engine_cache import find_or_build
    from edgeclip.runtime.engines.tensorrt_library import open_library

    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return find_or_build(
        GraphSource(name=path.stem, content=content, sha256=sha256, text_length=None),
        device=device,
        library=open_library(device),
        check=lambda engine: (),
    )


def engine_bandwidth(engine: Engine, size: int, seconds: float) -> Interval:
    """10^9 bytes a second of an engine that reads float32 weights [size, size] again and again."""
    bytes_read = PRODUCTS * size * size * 4
    return peak_rate(timed_runs(_runner(engine), seconds), bytes_read / 1e9)


_Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
# What runs on arrays (a, b, c), and how many of them pass through memory.
_KERNELS: dict[str, tuple[Callable[[_Arrays], object], int]] = {
    "Copy": (lambda arrays: np.copyto(arrays[0], arrays[1]), 2),
    "Add": (lambda arrays: np.add(arrays[1], arrays[2], out=arrays[0]), 3),
    "Read": (lambda arrays: arrays[1].max(), 1),
}


def cpu_bandwidth(
    threads: int, *, seconds: float, array_bytes: int | None = None
) -> tuple[Interval, str]:
    """Measure the memory bandwidth that numpy reaches in several threads.

    Returns 10^9 bytes a second of the best of Copy, Add and Read, and how it was measured.
    `array_bytes` is of one of the three arrays, which are split between the threads.
    """
    size = far_larger_than_caches() if array_bytes is None else array_bytes
    count = max(1, size // (threads * np.dtype(np.float32).itemsize))

    def filled(_: int) -> _Arrays:
        """Three arrays that the calling thread touches first, so that they lie near it."""
        a, b, c = (np.full(count, value, np.float32) for value in (0, 1, 2))
        return a, b, c

    rates: dict[str, Interval] = {}
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(filled, range(threads)))
        moved = sum(part[0].nbytes for part in parts)
        for name, (kernel, arrays) in _KERNELS.items():

            def run(kernel: Callable[[_Arrays], object] = kernel) -> object:
                return kernel(parts[0]) if threads == 1 else list(pool.map(kernel, parts))

            rates[name] = peak_rate(timed_runs(run, seconds / len(_KERNELS)), arrays * moved / 1e9)
    best = max(rates, key=lambda name: rates[name].value)
    how = f"memory by {best}, the best of {', '.join(_KERNELS)} by numpy in {threads} threads, "
    return rates[best], how + f"arrays of {moved / 1e6:.0f} MB"


def far_larger_than_caches(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of an array of four times all last-level caches.

    Three such arrays together take no more than an eighth of the memory. Sizes are those of
    Linux (Documentation/ABI/testing/sysfs-devices-system-cpu); processors that share a cache
    name the same list of processors.
    """
    found: dict[tuple[int, str], int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for folder in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((folder / "level").read_text())
            shared = (folder / "shared_cpu_list").read_text().strip()
            size = (folder / "size").read_text().strip()  # such as 32768K
            found[level, shared] = int(size.rstrip("KMG")) * units.get(size[-1:], 1)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    caches = sum(size for (level, _), size in found.items() if level == last) or _CACHES
    wanted, memory = max(_CACHES, 4 * caches), detect_memory_mb()
    return wanted if memory is None else min(wanted, memory * 10**6 // (3 * 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """How far one layer is from the roofline; None where its shapes do not tell.

    Attributes:
        layer: its time, operations and bytes.
        precision: whose peak is its roof; in an int8 graph what is not quantized has fp32's.
        least_ms: that the roof allows: the longer of computing at the peak and moving its bytes
            at the full bandwidth.
        limit: what stops it first: computing, or memory; "overhead" where it is too short to
            tell anything but what starting a node costs.
    """

    layer: LayerTime
    precision: Precision
    least_ms: float | None
    limit: Limit | None

    @property
    def share(self) -> float | None:
        """Part of the roof that was reached; above 1 where data came from a cache."""
        return self.least_ms / self.layer.ms if self.least_ms and self.layer.ms > 0 else None


def layer_distances(
    layers: LayerProfile, roofline: Roofline, precision: Precision
) -> tuple[LayerDistance, ...]:
    """Compute each layer's distance from the roofline of the same machine and threads.

    The roof counts every operation like half a multiply-add. An `exp` or `erf` is dearer, so
    that layers of these stay far below it, and only products come near.
    """
    found = []
    for layer in layers.layers:
        own = _computed_in(layer, precision)
        peak = peak_of(roofline, own)
        computing = layer.flops / peak / 1e6 if layer.flops and peak else None
        moving = layer.bytes / roofline.bandwidth_gb_s.value / 1e6 if layer.bytes else None
        least = max((ms for ms in (computing, moving) if ms is not None), default=None)
        if layer.flops and peak is None:
            least = None  # its roof is not known
        limit: Limit | None = None
        if layer.ms < TOO_SHORT_MS:
            limit = "overhead"
        elif least is not None and moving is not None:
            limit = "compute" if computing is not None and computing >= moving else "memory"
        found.append(LayerDistance(layer=layer, precision=own, least_ms=least, limit=limit))
    return tuple(found)


def peak_of(roofline: Roofline, precision: Precision) -> float | None:
    """10^9 operations a second; None where that precision was not measured.

    fp16 that was not measured is computed in fp32 (see `measure_roofline`).
    """
    peaks = {name: interval.value for name, interval in roofline.peak_gflops}
    return peaks.get(precision, peaks.get("fp32") if precision == "fp16" else None)


def _computed_in(layer: LayerTime, tower: Precision) -> Precision:
    """The precision of a layer: on the CPU operator names tell which nodes are quantized.

    `MatMulNBits` may round its activations too: its roof is the higher one.
    """
    if tower != "int8" or layer.provider != "CPUExecutionProvider":
        return tower
    named = layer.op.startswith(("QLinear", "QGemm", "QAttention", "MatMulNBits"))
    return "int8" if named or "Integer" in layer.op or "DynamicQuantize" in layer.op else "fp32"
