"""Ranges of activations, found by running a tower on calibration data, and kept for reuse."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

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

_TOGETHER = 32  # values of one batch that are held in memory

Visit = Callable[[str, NDArray[Any]], None]


def observe(
    model: onnx.ModelProto, names: Sequence[str], data: CalibrationData, visit: Visit
) -> None:
    """Call `visit(name, values)` for each of some values, batch by batch.

    Memory holds one batch of at most `_TOGETHER` values, so the data is run once for each so
    many.

    Args:
        model: a graph with one input, and its weights in memory.
        names: what to look at; the graph's input may be among them.
        data: what the graph is run on.
        visit: keeps no reference to what it gets, or memory grows with the data.

    Raises:
        EngineError: the graph cannot be run here.
    """
    given = model.graph.input[0].name
    values = GraphValues(model, {}, open_engine_here)
    inner = [name for name in dict.fromkeys(names) if name != given]
    for start in range(0, len(inner), _TOGETHER):
        run_batches(values.cut(inner[start : start + _TOGETHER]), data, visit)
    if given in names:
        for index in range(data.count):
            visit(given, data.batch(index))


def run_batches(model: onnx.ModelProto, data: CalibrationData, visit: Visit) -> None:
    """Run a graph on all batches, and call `visit(name, values)` for each of its outputs.

    Raises:
        EngineError: the graph cannot be run here.
    """
    given = [item.name for item in model.graph.input]
    with tempfile.TemporaryDirectory() as folder, progress_bar("calibrating") as step:
        path = Path(folder) / "observed.onnx"
        write_unchecked(model, path)
        engine = open_engine_here(path)
        for index in range(data.count):
            for name, values in engine.run(dict.fromkeys(given, data.batch(index))).items():
                visit(name, values)
            step(index + 1, data.count)


def open_engine_here(path: Path) -> Engine:
    """Load a graph on this machine's CPU.

    Raises:
        EngineError: it cannot be loaded.
    """
    return open_engine(path, device=load_device(THIS_MACHINE))


BINS = 4096  # on each side of 0; a power of two, because they are joined in pairs

_BLOCK = 2**16  # values that are counted at a time
_LEAST = 1 / 64  # of the larger extreme, that a cut keeps
_CANDIDATES = 128  # cuts that are tried
_ROUNDS = 2  # of looking for one end of a range while the other stays
_NOTHING = 1e-4  # the probability of what a quantized histogram says cannot be


@dataclass(frozen=True, slots=True)
class Range:
    """The values from `low` to `high`, as a quantizer is to hold them."""

    low: float
    high: float

    @property
    def bound(self) -> float:
        """The larger of the absolute values."""
        return max(-self.low, self.high, 0.0)

    def with_zero(self) -> "Range":
        """Return the range widened to hold 0, as every quantizer's must."""
        return Range(min(self.low, 0.0), max(self.high, 0.0))

    def within(self, other: "Range") -> "Range":
        """Return what both have in common."""
        return Range(max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True, slots=True)
class Levels:
    """What an integer can be: from `lowest` to `highest`, one of which may be 0's own.

    `symmetric` ones put 0 at 0. The others put it where low and high ask for it.
    """

    lowest: int
    highest: int
    symmetric: bool

    @property
    def count(self) -> int:
        """How many there are."""
        return self.highest - self.lowest + 1

    def grid(self, kept: Range) -> tuple[float, int, int]:
        """Return the step of a range, and the least and largest multiple of it that there is."""
        kept = kept.with_zero()
        if self.symmetric:
            return kept.bound / self.highest, self.lowest, self.highest
        step = (kept.high - kept.low) / (self.count - 1)
        zero = round(self.lowest - kept.low / step) if step > 0 else 0
        return step, self.lowest - zero, self.highest - zero

    def round(self, values: NDArray[np.floating], kept: Range) -> NDArray[np.float64]:
        """Return what a quantizer with this range makes of values."""
        step, least, most = self.grid(kept)
        if step == 0:
            return np.zeros(values.shape)
        return np.asarray(np.clip(np.rint(values / step), least, most) * step)


SIGNED = Levels(-127, 127, symmetric=True)
UNSIGNED = Levels(0, 255, symmetric=False)


class Histogram:
    """How often values fell where, in a fixed number of bins around 0.

    The bins become wider as values grow: they are joined in pairs, so every count stays
    exact. Memory does not depend on how much is added.
    """

    def __init__(self, bins: int = BINS) -> None:
        self._bins = bins
        self._counts = np.zeros(2 * bins, np.int64)
        self._limit = 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, values: NDArray[np.floating]) -> None:
        """Count some more, of any shape.

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
    def seen(self) -> Range:
        """The extremes; 0 to 0 if nothing was added."""
        return Range(self._low, self._high) if self._low <= self._high else Range(0.0, 0.0)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many fell into each bin: int64 [2 * bins]."""
        return self._counts

    @property
    def edges(self) -> Values:
        """Where the bins begin and end: float64 [2 * bins + 1], rising."""
        limit = self._limit or 1.0
        return np.linspace(-limit, limit, 2 * self._bins + 1)

    def _widen(self, bound: float) -> None:
        if self._limit == 0:
            if bound > 0:
                # All that came before is 0, whose bin begins at 0 whatever the limit.
                self._limit = bound
            return
        while self._limit < bound:
            half = self._bins // 2
            joined = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros_like(self._counts)
            self._counts[half : half + 2 * half] = joined
            self._limit *= 2


def cut_share(histogram: Histogram, percentile: float, levels: Levels) -> Range:
    """Keep `percentile` % of the values; without symmetry, each end loses half of the rest."""
    counts, edges = histogram.counts, histogram.edges
    if counts.sum() == 0:
        return histogram.seen
    if levels.symmetric:
        middle = len(counts) // 2
        folded = counts[middle:] + counts[:middle][::-1]
        bound = _quantile(folded, edges[middle:], percentile / 100)
        return Range(-bound, bound).within(_balanced(histogram.seen))
    rest = (1 - percentile / 100) / 2
    kept = Range(_quantile(counts, edges, rest), _quantile(counts, edges, 1 - rest))
    return kept.within(histogram.seen).with_zero()


def cut_information(histogram: Histogram, levels: Levels) -> Range:
    """Keep what loses the least information: the smallest Kullback-Leibler divergence.

    Ranges from -T to T are tried, less what was never seen, if they have a bin for each level.
    """
    counts, edges = histogram.counts, histogram.edges
    seen = _balanced(histogram.seen) if levels.symmetric else histogram.seen.with_zero()
    if seen.bound == 0:
        return seen
    tried = [Range(-bound, bound).within(seen) for bound in _candidates(seen.bound)]
    if levels.symmetric:  # as the reference does: absolute values, and the levels for them
        middle = len(counts) // 2
        counts, edges = counts[middle:] + counts[:middle][::-1], edges[middle:]
        levels = Levels(0, levels.highest, symmetric=False)
    losses = [_divergence(counts, edges, kept, levels.count) for kept in tried]
    return tried[int(np.argmin(losses))]


def cut_squared_error(histogram: Histogram, levels: Levels) -> Range:
    """Keep what makes the mean squared error of the quantized values smallest."""
    seen = _balanced(histogram.seen) if levels.symmetric else histogram.seen.with_zero()
    if seen.bound == 0:
        return seen
    shares = _candidates(1.0)
    if levels.symmetric:
        tried = [Range(-share * seen.bound, share * seen.bound) for share in shares]
        return _best(histogram, tried, levels)
    best = _best(
        histogram, [Range(share * seen.low, share * seen.high) for share in shares], levels
    )
    for _ in range(_ROUNDS):
        before = best
        best = _best(histogram, [Range(best.low, share * seen.high) for share in shares], levels)
        best = _best(histogram, [Range(share * seen.low, best.high) for share in shares], levels)
        if best == before:
            break
    return best


def squared_error(histogram: Histogram, kept: Range, levels: Levels) -> float:
    """Return the mean squared error of the values when they are quantized with a range.

    Within a bin they are taken to be spread evenly, over which the error is integrated
    exactly: bins may be wider than a step, or narrower.
    """
    counts, edges = histogram.counts, histogram.edges
    total = counts.sum()
    step, least, most = levels.grid(kept)
    if total == 0:
        return 0.0
    if step == 0:
        whole = _cube(edges) / 3
    else:
        nearest = np.clip(np.rint(edges / step), least, most) * step
        whole = nearest * step**2 / 12 + _cube(edges - nearest) / 3
    return float(counts @ np.diff(whole) / (edges[1] - edges[0]) / total)


def _cube(values: Values) -> Values:
    return values * values * values  # many times as fast as **3


def _best(histogram: Histogram, tried: list[Range], levels: Levels) -> Range:
    return min(tried, key=lambda kept: squared_error(histogram, kept, levels))


def _candidates(bound: float) -> list[float]:
    """Bounds to try, the whole one first, down to the least."""
    return [float(item) for item in bound * np.geomspace(1, _LEAST, _CANDIDATES)]


def _balanced(seen: Range) -> Range:
    return Range(-seen.bound, seen.bound)


def _quantile(counts: NDArray[np.int64], edges: Values, share: float) -> float:
    """Return the value below which a share of the values lies."""
    below = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(share * below[-1], below, edges))


def _divergence(counts: NDArray[np.int64], edges: Values, kept: Range, levels: int) -> float:
    """Divergence of the clipped values from their quantized histogram, in nats.

    What is clipped goes to the last bin on its side. The histogram is quantized by joining
    its bins to `levels`, and spreading each evenly over those of its bins that hold
    something. Infinite if there are fewer bins than levels: nothing would be joined.
    """
    start = max(int(np.searchsorted(edges, kept.low, side="right")) - 1, 0)
    stop = int(np.searchsorted(edges, kept.high, side="left"))
    inside = counts[start:stop].astype(np.float64)
    filled = inside > 0
    if len(inside) < levels or not filled.any():
        return np.inf
    level = np.arange(len(inside)) * levels // len(inside)
    held = np.bincount(level, inside, minlength=levels)
    shared = np.bincount(level, filled, minlength=levels)
    spread = np.where(filled, held[level] / np.maximum(shared[level], 1), 0.0)
    inside[0] += counts[:start].sum()
    inside[-1] += counts[stop:].sum()
    right, found = inside / inside.sum(), spread / spread.sum()
    some = right > 0
    possible = np.maximum(found[some], _NOTHING / len(inside))
    return float(np.sum(right[some] * np.log(right[some] / possible)))


Bounds = Mapping[str, float]
Method = Literal["minmax", "percentile", "entropy", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranging:
    """How the range of an activation follows from what calibration saw.

    Attributes:
        method: the extremes that were seen (minmax), a percentile, the cut that loses the
            least information (entropy), or the one with the smallest squared error (mse).
            On the built-in model they hardly differ: see tests/benchmarks/calibration.py.
        percentile: how much of what was seen the range keeps, %; of the percentile method.

    Raises:
        ValueError: no such method, or a percentile that is not above 50 and at most 100.
    """

    method: Method = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ValueError(f"method must be one of {known}, got {self.method!r}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile}")

    def cut(self, histogram: Histogram, levels: Levels) -> Range:
        """Return the range for values that will be quantized to `levels`."""
        match self.method:
            case "minmax":
                return histogram.seen
            case "percentile":
                return cut_share(histogram, self.percentile, levels)
            case "entropy":
                return cut_information(histogram, levels)
            case "mse":
                return cut_squared_error(histogram, levels)


EXTREMES = Ranging()


def activation_bounds(
    source: Path,
    data: CalibrationData,
    ranging: Ranging = EXTREMES,
    operators: Sequence[str] | None = None,
) -> Bounds:
    """Return the bound of the absolute value of each float activation, by its name.

    `operators` limits the search to what these operators read and give. The others than the
    extremes need that. They suit symmetric int8.

    Raises:
        ExportError: a value that is to be cut is infinite or not a number.
    """
    model = load_graph(source)
    bounds: dict[str, float] = {}
    nodes = [node for node in model.graph.node if operators is None or node.op_type in operators]
    if ranging == EXTREMES:
        bounds = _extreme_bounds(source, data, operators)
        # ONNX knows no types of what fused operators give, so these are not among them.
        nodes = [node for node in nodes if node.op_type in PRODUCTS]
    missing = [name for name in values_of(model, nodes) if name not in bounds]
    ranges = _cut_ranges(model, data, ranging, missing, SIGNED)
    return {**bounds, **{name: found.bound for name, found in ranges.items()}}


def activation_ranges(
    source: Path,
    data: CalibrationData,
    ranging: Ranging,
    nodes: Collection[str],
    levels: Levels = UNSIGNED,
) -> Mapping[str, Range]:
    """Return the range of each float value that the named nodes read or give, by its name.

    Memory does not grow with the data, whatever the method.

    Raises:
        ExportError: a value is infinite or not a number.
    """
    model = load_graph(source)
    chosen = [node for node in model.graph.node if node.name in nodes]
    return _cut_ranges(model, data, ranging, values_of(model, chosen), levels)


def save_ranges(ranges: Mapping[str, Range], path: Path) -> None:
    """Write ranges for `onnxruntime.quantization.quantize_static`.

    It takes them as its `calibration_cache_path`, with `CalibrationMethod.MinMax` and no
    reader, and then runs no calibration of its own.
    """
    found = {name: (np.float32(item.low), np.float32(item.high)) for name, item in ranges.items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, found), path)


def values_of(model: onnx.ModelProto, nodes: Collection[onnx.NodeProto]) -> list[str]:
    """Names of all that nodes read and give, in their order, less constants."""
    constants = constant_names(model)
    names = [name for node in nodes for name in (*node.input, *node.output)]
    return [name for name in dict.fromkeys(names) if name and name not in constants]


def _cut_ranges(
    model: onnx.ModelProto,
    data: CalibrationData,
    ranging: Ranging,
    names: Sequence[str],
    levels: Levels,
) -> dict[str, Range]:
    histograms: dict[str, Histogram] = {}

    def count(name: str, values: NDArray[Any]) -> None:
        if not np.issubdtype(values.dtype, np.floating):
            return
        try:
            histograms.setdefault(name, Histogram()).add(values)
        except ValueError as error:
            raise ExportError(f"no range can be found for {name}: {error}") from error

    observe(model, names, data, count)
    return {name: ranging.cut(histogram, levels) for name, histogram in histograms.items()}


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
    """Hold back ONNX Runtime's notes on calibration, and advice that `save_graph` follows."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            yield
    finally:
        logger.setLevel(level)


def cache_file(cache: Path, source: Path, *what: object) -> Path:
    """Return the file in a cache's folder for `what` of a graph, whose content is in its name."""
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
    """Return what `activation_bounds` does, from a file of the cache if it was asked before.

    `cache` is a folder that belongs to this calibration data alone; None for no cache.
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
