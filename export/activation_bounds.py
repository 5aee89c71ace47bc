"""How large the values inside a tower become, found by running it on calibration data."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.graph import data_path
from edgeclip.runtime.progress import progress_bar

Bounds = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranging:
    """How the range of an activation follows from what calibration saw.

    Attributes:
        method: the extremes that were seen, a percentile, or the cut that loses the least
            information (entropy). On the built-in model the extremes are as exact as the
            best percentile, and entropy is worse: see tests/benchmarks/calibration.py.
        percentile: how much of what was seen the range keeps, %; of the percentile method.

    Raises:
        ValueError: a percentile that is not above 50 and at most 100.
    """

    method: CalibrationMethod = CalibrationMethod.MinMax
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile}")


EXTREMES = Ranging()


def activation_bounds(
    source: Path,
    data: CalibrationData,
    ranging: Ranging = EXTREMES,
    operators: Sequence[str] | None = None,
) -> Bounds:
    """Return the bound of the absolute value of each float activation, by its name.

    `operators` limits the search to what these operators read and give. All but the extremes
    need that: they hold every activation of a batch in memory.
    """
    reader = data.reader(onnx.load(source, load_external_data=False).graph.input[0].name)
    with tempfile.TemporaryDirectory() as folder, quiet(), progress_bar("calibrating") as step:
        calibrator = create_calibrator(
            source,
            operators,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=ranging.method,
            use_external_data_format=data_path(source).exists(),
            extra_options={"percentile": ranging.percentile},
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
