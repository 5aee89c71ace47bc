"""Find the ranges of activations by running a tower on calibration data, and cache them."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator, save_tensors_data

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import (
    PRODUCTS,
    constant_names,
    data_path,
    load_graph,
    sha256_graph,
    write_unchecked,
)
from edgeclip.export.graph.graph_values import GraphValues
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.engines.engine import Engine, open_engine

_VALUES_AT_ONCE = 32  # values of one batch that are held in memory
_BINS = 4096  # of a histogram, on each side of 0; a power of two, because they are joined in pairs
_BLOCK = 2**16  # values that are counted at a time

Bounds = Mapping[str, float]  # the largest absolute value of each activation, by its name


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The range of values from `low` to `high` that a quantizer represents."""

    low: float
    high: float

    @property
    def bound(self) -> float:
        """The largest absolute value."""
        return max(-self.low, self.high, 0.0)

    def with_zero(self) -> "ValueRange":
        """Return the range extended to include 0, as a quantizer's range must."""
        return ValueRange(min(self.low, 0.0), max(self.high, 0.0))

    def within(self, other: "ValueRange") -> "ValueRange":
        """Return the intersection of two ranges."""
        return ValueRange(max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True, slots=True)
class Levels:
    """The integers of a quantizer, from `lowest` to `highest`; symmetric ones have zero point 0."""

    lowest: int
    highest: int
    symmetric: bool

    def round(self, values: NDArray[np.floating], kept: ValueRange) -> Values:
        """Quantize and dequantize values with the scale and zero point of a range."""
        kept = kept.with_zero()
        if self.symmetric:
            scale, zero = kept.bound / self.highest, 0
        else:
            scale = (kept.high - kept.low) / (self.highest - self.lowest)
            zero = round(self.lowest - kept.low / scale) if scale > 0 else 0
        if scale == 0:
            return np.zeros(values.shape)
        whole = np.clip(np.rint(values / scale), self.lowest - zero, self.highest - zero)
        return np.asarray(whole * scale)


SIGNED = Levels(-127, 127, symmetric=True)
UNSIGNED = Levels(0, 255, symmetric=False)


class Histogram:
    """A histogram with a fixed number of bins around 0, whose range grows with the values.

    Bins are joined in pairs when the range doubles, so every count stays exact. Memory does not
    depend on how many values are added.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self._bins = bins
        self._counts = np.zeros(2 * bins, np.int64)
        self._limit = 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, values: NDArray[np.floating]) -> None:
        """Count values of any shape.

        Raises:
            ValueError: one of them is infinite or not a number.
        """
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("a value is infinite or not a number")
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._widen(max(-low, high))
        limit = self._limit or 1.0
        flat = values.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            # float64, in which bins of the smallest numbers have a width too.
            part = flat[start : start + _BLOCK].astype(np.float64)
            found, _ = np.histogram(part, 2 * self._bins, range=(-limit, limit))
            self._counts += found

    @property
    def seen(self) -> ValueRange:
        """The smallest and the largest value; 0 to 0 if nothing was added."""
        if self._low > self._high:
            return ValueRange(0.0, 0.0)
        return ValueRange(self._low, self._high)

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of values in each bin: int64 [2 * bins]."""
        return self._counts

    @property
    def edges(self) -> Values:
        """The ends of the bins, rising: float64 [2 * bins + 1]."""
        limit = self._limit or 1.0
        return np.linspace(-limit, limit, 2 * self._bins + 1)

    def _widen(self, bound: float) -> None:
        if self._limit == 0:
            if bound > 0:
                # All values before were 0, and their bin begins at 0 whatever the limit.
                self._limit = bound
            return
        while self._limit < bound:
            half = self._bins // 2
            joined = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros_like(self._counts)
            self._counts[half : half + 2 * half] = joined
            self._limit *= 2


def percentile_range(histogram: Histogram, percentile: float, levels: Levels) -> ValueRange:
    """Return the range that holds `percentile` % of the values.

    A symmetric range cuts absolute values; another one loses half of the rest at each end.
    """
    counts, edges, seen = histogram.counts, histogram.edges, histogram.seen
    if counts.sum() == 0:
        return seen
    if levels.symmetric:
        middle = len(counts) // 2
        folded = counts[middle:] + counts[:middle][::-1]
        bound = min(_quantile(folded, edges[middle:], percentile / 100), seen.bound)
        return ValueRange(-bound, bound)
    rest = (1 - percentile / 100) / 2
    kept = ValueRange(_quantile(counts, edges, rest), _quantile(counts, edges, 1 - rest))
    return kept.within(seen).with_zero()


def _quantile(counts: NDArray[np.int64], edges: Values, share: float) -> float:
    """Return the value below which a share of the values lies."""
    below = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(share * below[-1], below, edges))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranging:
    """How the range of an activation is derived from the values seen in calibration.

    Attributes:
        method: the extremes (minmax), or a percentile, which cuts off rare outliers.
        percentile: how many of the values the range holds, %; of the percentile method.

    Raises:
        ValueError: an unknown method, or a percentile that is not above 50 and at most 100.
    """

    method: Literal["minmax", "percentile"] = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.method not in ("minmax", "percentile"):
            raise ValueError(f"method must be minmax or percentile, got {self.method!r}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile}")

    def range_of(self, histogram: Histogram, levels: Levels) -> ValueRange:
        """Return the range for values that will be quantized to `levels`."""
        if self.method == "minmax":
            return histogram.seen
        return percentile_range(histogram, self.percentile, levels)


EXTREMES = Ranging()


def activation_bounds(
    source: Path,
    data: CalibrationData,
    ranging: Ranging = EXTREMES,
    operators: Sequence[str] | None = None,
) -> Bounds:
    """Return the largest absolute value of each float activation, by its name.

    They suit symmetric int8. `operators` limits the search to the inputs and outputs of these
    operators, which a method other than minmax requires.

    Raises:
        ExportError: a value is infinite or not a number, with a method other than minmax.
    """
    model = load_graph(source)
    bounds: dict[str, float] = {}
    nodes = [node for node in model.graph.node if operators is None or node.op_type in operators]
    if ranging == EXTREMES:
        bounds = _extreme_bounds(source, data, operators)
        # ONNX infers no types behind fused operators, so their outputs are missing there.
        nodes = [node for node in nodes if node.op_type in PRODUCTS]
    missing = [name for name in _values_of(model, nodes) if name not in bounds]
    ranges = _ranges(model, data, ranging, missing, SIGNED)
    return {**bounds, **{name: found.bound for name, found in ranges.items()}}


def activation_ranges(
    source: Path,
    data: CalibrationData,
    ranging: Ranging,
    nodes: Collection[str],
    levels: Levels = UNSIGNED,
) -> Mapping[str, ValueRange]:
    """Return the range of each float input and output of the named nodes, by its name.

    Memory does not grow with the data.

    Raises:
        ExportError: a value is infinite or not a number.
    """
    model = load_graph(source)
    chosen = [node for node in model.graph.node if node.name in nodes]
    return _ranges(model, data, ranging, _values_of(model, chosen), levels)


def save_ranges(ranges: Mapping[str, ValueRange], path: Path) -> None:
    """Write ranges as a calibration cache of `onnxruntime.quantization.quantize_static`.

    Given as its `calibration_cache_path`, with `CalibrationMethod.MinMax` and no reader, it then
    runs no calibration of its own.
    """
    found = {name: (np.float32(item.low), np.float32(item.high)) for name, item in ranges.items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, found), path)


def _values_of(model: onnx.ModelProto, nodes: Collection[onnx.NodeProto]) -> list[str]:
    """Return the names of all inputs and outputs of nodes, in order, without constants."""
    constants = constant_names(model)
    names = [name for node in nodes for name in (*node.input, *node.output)]
    return [name for name in dict.fromkeys(names) if name and name not in constants]


def _ranges(
    model: onnx.ModelProto,
    data: CalibrationData,
    ranging: Ranging,
    names: Sequence[str],
    levels: Levels,
) -> dict[str, ValueRange]:
    histograms: dict[str, Histogram] = {}

    def count(name: str, values: NDArray[Any]) -> None:
        if not np.issubdtype(values.dtype, np.floating):
            return
        try:
            histograms.setdefault(name, Histogram()).add(values)
        except ValueError as error:
            raise ExportError(f"no range can be found for {name}: {error}") from error

    observe(model, names, data, count)
    return {name: ranging.range_of(item, levels) for name, item in histograms.items()}


def observe(
    model: onnx.ModelProto,
    names: Sequence[str],
    data: CalibrationData,
    visit: Callable[[str, NDArray[Any]], None],
) -> None:
    """Run a graph on all batches, and call `visit(name, array)` for some of its values.

    The data is run once for each `_VALUES_AT_ONCE` values, so that memory stays bounded.

    Args:
        model: a graph with one input, and its weights in memory.
        names: the values to visit; the graph's input may be among them.
        data: what the graph is run on.
        visit: must keep no reference to the array, or memory grows with the data.

    Raises:
        EngineError: the graph cannot be run here.
    """
    given = model.graph.input[0].name
    values = GraphValues(model, {}, open_engine_here)
    inner = [name for name in dict.fromkeys(names) if name != given]
    for start in range(0, len(inner), _VALUES_AT_ONCE):
        part = values.cut(inner[start : start + _VALUES_AT_ONCE])
        inputs = [item.name for item in part.graph.input]
        with tempfile.TemporaryDirectory() as folder, progress_bar("calibrating") as step:
            path = Path(folder) / "observed.onnx"
            write_unchecked(part, path)
            engine = open_engine_here(path)
            for index in range(data.count):
                outputs = engine.run(dict.fromkeys(inputs, data.batch(index)))
                for name, array in outputs.items():
                    visit(name, array)
                step(index + 1, data.count)
    if given in names:
        for index in range(data.count):
            visit(given, data.batch(index))


def open_engine_here(path: Path) -> Engine:
    """Load a graph on this machine's CPU.

    Raises:
        EngineError: it cannot be loaded.
    """
    return open_engine(path, device=load_device(THIS_MACHINE))


def _extreme_bounds(
    source: Path, data: CalibrationData, operators: Sequence[str] | None
) -> dict[str, float]:
    reader = data.reader(onnx.load(source, load_external_data=False).graph.input[0].name)
    with tempfile.TemporaryDirectory() as folder, quiet(), progress_bar("calibrating") as step:
        calibrator = create_calibrator(
            source,
            operators,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            use_external_data_format=data_path(source).exists(),
        )
        for index in range(data.count):  # batch by batch, or memory grows with the data
            reader.set_range(index, index + 1)
            calibrator.collect_data(reader)
            step(index + 1, data.count)
        ranges = calibrator.compute_data()
        return {
            name: float(np.abs(np.concatenate([np.ravel(end) for end in found.range_value])).max())
            for name, found in ranges.items()
        }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence ONNX Runtime's log and printed advice on calibration, while the block lasts."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            yield
    finally:
        logger.setLevel(level)


def cache_file(cache: Path, source: Path, *what: object) -> Path:
    """Return the cache file for `what` of a graph; its name holds a hash of the graph's content."""
    parts = "\n".join([onnxruntime.__version__, sha256_graph(source), *map(str, what)])
    return cache / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"


def cached_bounds(
    source: Path,
    data: CalibrationData,
    ranging: Ranging = EXTREMES,
    operators: Sequence[str] | None = None,
    *,
    cache: Path | None,
) -> Bounds:
    """Return `activation_bounds`, from the cache if they were found before.

    `cache` is a folder used with this calibration data only; None for no cache.
    """
    if cache is None:
        return activation_bounds(source, data, ranging, operators)
    path = cache_file(cache, source, "bounds", ranging, operators)
    if path.exists():
        bounds: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return bounds
    found = activation_bounds(source, data, ranging, operators)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(dict(found)), encoding="utf-8")
    return found
