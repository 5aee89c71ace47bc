"""What a graph computes inside while it runs on calibration data, some values at a time."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.cut_graph import GraphValues
from edgeclip.export.graph import write_unchecked
from edgeclip.profiles.device import THIS_MACHINE, load_device
from edgeclip.runtime.engine import Engine, open_engine
from edgeclip.runtime.progress import progress_bar

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
