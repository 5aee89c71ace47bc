"""How large the values inside a tower become, found by running it on calibration data."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import (
    TensorsData,
    create_calibrator,
    save_tensors_data,
)

from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import PRODUCTS, constant_names, data_path, load_graph
from edgeclip.export.quantizing.observe import observe
from edgeclip.export.quantizing.ranging import (
    SIGNED,
    UNSIGNED,
    Histogram,
    Levels,
    Range,
    cut_information,
    cut_share,
    cut_squared_error,
)
from edgeclip.runtime.progress import progress_bar

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
