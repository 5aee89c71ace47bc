"""Roofline of this machine (Williams et al., 2009), and how far each layer is from it."""

import hashlib
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.measurement import LayerProfile, LayerTime, Roofline
from edgeclip.profiles.record.timing_statistics import paired_ratio, percentile_interval
from edgeclip.profiles.sensors.interference import InterferenceWatch
from edgeclip.runtime.device.device_profile import DevicePrecision, DeviceProfile
from edgeclip.runtime.device.machine import detect_memory_mb
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision

FEWEST_RUNS = 5
# A peak is what the machine can do when nothing is in its way. The very fastest run, which
# STREAM takes, has no interval; the tenth percentile has one and is nearly as fast.
_PERCENT = 10


def timed_runs(run: Callable[[], object], seconds: float) -> NDArray[np.float64]:
    """Run once untimed, then for so long and at least 5 times: seconds of each run, [N]."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    for runs in itertools.count(1):
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        times.append(end - start)
        if runs >= FEWEST_RUNS and end - began >= seconds:
            break
    return np.array(times)


def peak_rate(seconds: NDArray[np.float64], amount: float) -> Interval:
    """`amount` a second at the 10th percentile of run times [N], with its 95% interval.

    The interval is a block bootstrap's (see `timing_statistics`).
    """
    fast = percentile_interval(seconds, _PERCENT)
    return Interval(amount / fast.value, amount / fast.high, amount / fast.low)


_Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

_CPUS = Path("/sys/devices/system/cpu")
_TIMES_THE_CACHES = 4
_CACHES = 32 << 20  # bytes; where the system does not tell
_SMALLEST = 32 << 20
_PART_OF_MEMORY = 8  # the three arrays together take no more than an eighth


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The best of Copy, Add and Read in 10^9 bytes a second.

    Attributes:
        gb_s: with its 95% interval.
        kernel: which was best.
        array_bytes: of one array, all threads together.
    """

    gb_s: Interval
    kernel: str
    array_bytes: int


def _copy(arrays: _Arrays) -> object:
    np.copyto(arrays[0], arrays[1])
    return arrays[0]


def _add(arrays: _Arrays) -> object:
    return np.add(arrays[1], arrays[2], out=arrays[0])


def _read(arrays: _Arrays) -> object:
    return arrays[1].max()


# What runs, and how many arrays pass through memory.
_KERNELS: dict[str, tuple[Callable[[_Arrays], object], int]] = {
    "Copy": (_copy, 2),
    "Add": (_add, 3),
    "Read": (_read, 1),
}


def find_bandwidth(threads: int, *, seconds: float, array_bytes: int | None = None) -> Bandwidth:
    """Measure for about so many seconds; the arrays are split between the threads.

    Args:
        threads: that work at the same time; one alone may not reach what the memory gives.
        seconds: for all three kernels; each runs at least 5 times.
        array_bytes: of one of the three arrays; by default `far_larger_than_caches()`.
    """
    size = far_larger_than_caches() if array_bytes is None else array_bytes
    count = max(1, size // (threads * np.dtype(np.float32).itemsize))
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_filled, [count] * threads))
        moved = sum(part[0].nbytes for part in parts)
        for name, (kernel, arrays) in _KERNELS.items():
            times = timed_runs(_on_all(pool, kernel, parts), seconds / len(_KERNELS))
            found[name] = peak_rate(times, arrays * moved / 1e9)
    best = max(found, key=lambda name: found[name].value)
    return Bandwidth(found[best], best, moved)


def far_larger_than_caches(root: Path = _CPUS) -> int:
    """Bytes of an array of four times all last-level caches, if memory allows it."""
    wanted = max(_SMALLEST, _TIMES_THE_CACHES * (last_level_caches(root) or _CACHES))
    memory = detect_memory_mb()
    return wanted if memory is None else min(wanted, memory * 10**6 // (3 * _PART_OF_MEMORY))


def last_level_caches(root: Path = _CPUS) -> int | None:
    """Bytes of all caches of the last level; None where the system does not tell.

    Source: Documentation/ABI/testing/sysfs-devices-system-cpu of Linux. Processors that
    share a cache name the same list of processors.
    """
    found: dict[tuple[int, str], int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((folder / "level").read_text())
            shared = (folder / "shared_cpu_list").read_text().strip()
            found[level, shared] = _size((folder / "size").read_text().strip())
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _size(text: str) -> int:
    """Bytes of "32768K" or "1M"."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    unit = units.get(text[-1:])
    return int(text) if unit is None else int(text[:-1]) * unit


def _filled(count: int) -> _Arrays:
    """Three arrays that the calling thread touches first, so that they lie near it."""
    a, b, c = (np.full(count, value, np.float32) for value in (0, 1, 2))
    return a, b, c


def _on_all(
    pool: ThreadPoolExecutor, kernel: Callable[[_Arrays], object], parts: Sequence[_Arrays]
) -> Callable[[], object]:
    if len(parts) == 1:
        return lambda: kernel(parts[0])
    return lambda: list(pool.map(kernel, parts))


Form = Literal["fp32", "fp16", "int8", "symmetric_int8"]

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
_BLAS_SIZE = 512
_CLEARLY_FASTER = 0.9
_HALF_AND_FULL: tuple[Form, Form] = ("fp16", "fp32")


def product_path(form: Form, size: int, folder: Path = GRAPHS) -> Path:
    """The graph of products of that size; its name ends like that of a bundle's graph."""
    return folder / f"product_{size}_{form}.onnx"


def reading_path(folder: Path = GRAPHS) -> Path:
    """The graph whose work is to read its weights."""
    return folder / f"reading_{READING_SIZE}_fp32.onnx"


@dataclass(frozen=True, slots=True)
class Peak:
    """The best rate of one precision in 10^9 operations a second, and at which size."""

    gflops: Interval
    size: int


def find_roofline(
    device: DeviceProfile, *, seconds: float, array_bytes: int | None = None
) -> Roofline:
    """Measure the peaks of the device's engine and of the memory behind it.

    fp32 is always measured, fp16 and int8 where the device allows them. fp16 is left out where
    it is no faster than fp32: such an engine converts to fp32 and back. A peak is the rate of
    the fastest tenth of the runs at the best size, with the block bootstrap's interval.

    Args:
        device: says which engine, and how many threads.
        seconds: about how long; loading is not counted, a size that would take too long is
            left out, and nothing runs fewer than 5 times.
        array_bytes: of each array that shows the CPU's memory bandwidth; by default four
            times the last-level caches.

    Raises:
        EngineError: the engine cannot run the graphs in fp32.
        InputError: `seconds` is not above 0.
        MissingExtraError: the engine's package is not installed.
    """
    if not seconds > 0:
        raise InputError(f"a roofline needs more than {seconds} seconds")
    with InterferenceWatch() as watch:
        measured = _measure(device, seconds, array_bytes)
    return replace(measured, interference=watch.found)


def _measure(device: DeviceProfile, seconds: float, array_bytes: int | None) -> Roofline:
    precisions = _precisions(device)
    share = seconds / (len(precisions) + 2)  # one for memory, one for the second opinion
    peaks, notes = _peaks(device, precisions, share)
    bandwidth, how = _bandwidth(device, share, array_bytes)
    sizes = ", ".join(f"{name} at {peak.size}" for name, peak in peaks.items())
    method = [f"{PRODUCTS} square products in a row by {device.engine} ({sizes})", how, *notes]
    if device.on_cpu:
        method.append(_second_opinion(device.threads, share))
    return Roofline(
        threads=device.threads,
        peak_gflops=tuple((name, peak.gflops) for name, peak in peaks.items()),
        bandwidth_gb_s=bandwidth,
        method="; ".join([*method, "rates are those of the fastest tenth of the runs"]),
    )


def engine_bandwidth(engine: Engine, size: int, seconds: float) -> Interval:
    """10^9 bytes a second of an engine that reads float32 weights [size, size] again and again."""
    bytes_read = PRODUCTS * size * size * 4
    return peak_rate(timed_runs(_run(engine), seconds), bytes_read / 1e9)


def _precisions(device: DeviceProfile) -> tuple[DevicePrecision, ...]:
    others: tuple[DevicePrecision, ...] = ("fp16", "int8")
    return ("fp32", *(item for item in others if item in device.precisions))


def _peaks(
    device: DeviceProfile, precisions: tuple[DevicePrecision, ...], seconds: float
) -> tuple[dict[DevicePrecision, Peak], list[str]]:
    """Peaks by precision, and why one is missing."""
    peaks: dict[DevicePrecision, Peak] = {}
    notes = []
    for precision in precisions:
        try:
            peaks[precision] = find_peak(device, _form(device, precision), seconds)
        except EngineError as error:
            if precision == "fp32":
                raise
            notes.append(f"{precision} not available: {error}")
    if "fp16" in peaks and not _is_faster_in_half(device, peaks["fp16"].size, seconds / 2):
        del peaks["fp16"]
        notes.append("fp16 left out, since this engine does not compute it faster than fp32")
    return peaks, notes


def _form(device: DeviceProfile, precision: DevicePrecision) -> Form:
    if precision == "int8":
        return "int8" if device.on_cpu else "symmetric_int8"
    return "fp16" if precision == "fp16" else "fp32"


def find_peak(device: DeviceProfile, form: Form, seconds: float) -> Peak:
    """The best size of a form, from small to large while one fits the time that is left.

    Raises:
        EngineError: the engine cannot run the graphs.
    """
    sizes = PRODUCT_SIZES[form]
    best: Peak | None = None
    left = seconds
    for number, size in enumerate(sizes):
        operations = 2 * PRODUCTS * size**3 / 1e9
        if best is not None and (FEWEST_RUNS + 1) * operations / best.gflops.value > left:
            break
        engine = _open(product_path(form, size), device)
        times = timed_runs(_run(engine), left / (len(sizes) - number))
        left -= float(times.sum())
        found = Peak(peak_rate(times, operations), size)
        if best is None or found.gflops.value > best.gflops.value:
            best = found
    assert best is not None  # every form has a size
    return best


def _is_faster_in_half(device: DeviceProfile, size: int, seconds: float) -> bool:
    """Whether fp16 surely takes less than 0.9 of the time of fp32, both taking turns."""
    runs = [_run(_open(product_path(form, size), device)) for form in _HALF_AND_FULL]
    times: list[list[float]] = [[], []]

    def round_of_both() -> None:
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)

    timed_runs(round_of_both, seconds)
    half, full = (np.array(found[1:]) for found in times)  # the first is for warming up
    return paired_ratio(half, full).high < _CLEARLY_FASTER


def _run(engine: Engine) -> Callable[[], object]:
    feed = {INPUT: np.ones(1, np.float32)}
    return lambda: engine.run(feed)


def _open(path: Path, device: DeviceProfile) -> Engine:
    """The device's engine of a graph; TensorRT's is built first, and kept for the next time."""
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
        gate=lambda engine: (),
        say=lambda line: print(f"edgeclip: {line}", file=sys.stderr, flush=True),
    )


def _bandwidth(
    device: DeviceProfile, seconds: float, array_bytes: int | None
) -> tuple[Interval, str]:
    """Of the memory that the engine computes in, and how it was measured."""
    if not device.on_cpu:
        engine = _open(reading_path(), device)
        megabytes = READING_SIZE**2 * 4 / 1e6
        how = f"memory by products of one row with {megabytes:.0f} MB of weights"
        return engine_bandwidth(engine, READING_SIZE, seconds), how
    found = find_bandwidth(device.threads, seconds=seconds, array_bytes=array_bytes)
    how = (
        f"memory by {found.kernel}, the best of Copy, Add and Read by numpy in "
        f"{device.threads} threads on arrays of {found.array_bytes / 1e6:.0f} MB"
    )
    return found.gb_s, how


def _second_opinion(threads: int, seconds: float) -> str:
    """What numpy's BLAS reaches in fp32: another library on the same processor."""
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal((_BLAS_SIZE, _BLAS_SIZE), np.float32) for _ in range(2))
    out = np.empty_like(a)
    with _blas_threads(threads):
        times = timed_runs(lambda: np.matmul(a, b, out=out), seconds)
    found = peak_rate(times, 2 * _BLAS_SIZE**3 / 1e9)
    held = f"{threads} threads" if importlib.util.find_spec("threadpoolctl") else "its own threads"
    return f"numpy's BLAS with {held} reaches {found.value:.0f} GFLOP/s in fp32 at {_BLAS_SIZE}"


def _blas_threads(threads: int) -> AbstractContextManager[object]:
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # it is an extra's, and this is a second opinion only
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(limits=threads, user_api="blas")
    return limits


Limit = Literal["compute", "memory", "overhead"]

# Starting a node, and waking threads for it, takes some microseconds by itself, and profilers
# count in whole ones.
TOO_SHORT_MS = 0.01
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """One layer beside the roof above it; None is what its shapes do not tell.

    Attributes:
        name, op: of the layer.
        ms: that it took.
        share_of_time: of the sum of all layers.
        precision: whose peak is its roof; in an int8 graph what is not quantized has fp32's.
        intensity: operations a byte.
        achieved_gflops: 10^9 operations a second.
        attainable_gflops: min(peak, intensity * bandwidth), the roof.
        achieved_gb_s: 10^9 bytes a second.
        least_ms: that the roof allows.
        share: of the roof that was reached, `least_ms / ms`; of the bandwidth where there are
            no operations. Above 1 where data came from a cache: the roof is that of the
            memory.
        limit: what stops it first: computing, or memory; "overhead" where it is too short to
            tell anything but what starting a node costs.
    """

    name: str
    op: str
    ms: float
    share_of_time: float
    precision: Precision
    intensity: float | None
    achieved_gflops: float | None
    attainable_gflops: float | None
    achieved_gb_s: float | None
    least_ms: float | None
    share: float | None
    limit: Limit | None


def distances(
    layers: LayerProfile, roofline: Roofline, precision: Precision
) -> tuple[LayerDistance, ...]:
    """Each layer's distance from the roofline, in the order of `layers`.

    The roof counts every operation like half a multiply-add. An `exp` or `erf` is dearer, so
    that layers of these stay far below it, and only products come near.

    Args:
        layers: of a tower at batch 1. Those of ONNX Runtime on a GPU are the host's times,
            which say nothing here.
        roofline: of the same machine and threads.
        precision: of the tower.
    """
    return tuple(_distance(layer, roofline, precision) for layer in layers.layers)


def peak_of(roofline: Roofline, precision: Precision) -> float | None:
    """10^9 operations a second; None where that precision was not measured.

    fp16 that was not measured is computed in fp32 (see `find_roofline`).
    """
    peaks = {name: interval.value for name, interval in roofline.peak_gflops}
    return peaks.get(precision, peaks.get("fp32") if precision == "fp16" else None)


def _distance(layer: LayerTime, roofline: Roofline, tower: Precision) -> LayerDistance:
    precision = _precision_of(layer, tower)
    peak, bandwidth = peak_of(roofline, precision), roofline.bandwidth_gb_s.value
    flops, moved = layer.flops or None, layer.bytes or None
    intensity = flops / moved if flops and moved else None
    attainable = None
    if flops and peak is not None:
        attainable = peak if intensity is None else min(peak, intensity * bandwidth)
    computing = flops / peak / 1e6 if flops and peak is not None else None
    moving = moved / bandwidth / 1e6 if moved else None
    least = max((ms for ms in (computing, moving) if ms is not None), default=None)
    if flops and attainable is None:
        least = None  # its roof is not known
    return LayerDistance(
        name=layer.name,
        op=layer.op,
        ms=layer.ms,
        share_of_time=layer.share,
        precision=precision,
        intensity=intensity,
        achieved_gflops=_rate(flops, layer.ms),
        attainable_gflops=attainable,
        achieved_gb_s=_rate(moved, layer.ms),
        least_ms=least,
        share=least / layer.ms if least is not None and layer.ms > 0 else None,
        limit=_limit(layer.ms, computing, moving, knows_roof=least is not None),
    )


def _precision_of(layer: LayerTime, tower: Precision) -> Precision:
    """ONNX Runtime's names tell on the CPU which nodes of an int8 graph are quantized.

    `MatMulNBits` may round its activations too: its roof is the higher one.
    """
    if tower != "int8" or layer.provider != _CPU:
        return tower
    quantized = layer.op.startswith(("QLinear", "QGemm", "QAttention", "MatMulNBits")) or (
        "Integer" in layer.op or "DynamicQuantize" in layer.op
    )
    return "int8" if quantized else "fp32"


def _rate(amount: float | None, ms: float) -> float | None:
    """10^9 a second."""
    return amount / ms / 1e6 if amount is not None and ms > 0 else None


def _limit(
    ms: float, computing: float | None, moving: float | None, *, knows_roof: bool
) -> Limit | None:
    if ms < TOO_SHORT_MS:
        return "overhead"
    if not knows_roof or moving is None:
        return None
    return "compute" if computing is not None and computing >= moving else "memory"
