"""What this machine computes and moves at most: large products, and memory beyond the caches.

The peak is what the device's own engine reaches, not what a data sheet says: a product of
large matrices is the best that it can be given. Each graph takes one number and gives one, so
that on a GPU no copy to or from it is counted. They are written by
`python -m edgeclip.export.write_probe_graphs`.
"""

import hashlib
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgeclip.profiles.device import DevicePrecision, DeviceProfile
from edgeclip.runtime.engine import Engine, open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.inspecting.find_bandwidth import find_bandwidth
from edgeclip.runtime.inspecting.peak_rate import FEWEST_RUNS, peak_rate, timed_runs
from edgeclip.runtime.inspecting.roofline import Roofline
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.timing_statistics import paired_ratio
from edgeclip.runtime.sensing.interference import InterferenceWatch

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
    from edgeclip.runtime.engine_key import GraphSource
    from edgeclip.runtime.engine_store import find_or_build
    from edgeclip.runtime.tensorrt_library import open_library

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
