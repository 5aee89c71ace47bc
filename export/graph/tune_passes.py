"""Try each rewrite of a graph on this machine in an A/B benchmark, and keep what is faster."""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.embedders import TowerGraph, tower_inputs
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.graph_passes import GraphPass, passes_for
from edgeclip.export.graph.graph_values import relative_error
from edgeclip.export.graph.to_onnx import INTERCHANGE_FORM
from edgeclip.profiles.measure.interleaved_loads import LoadableTarget, load_ratio, measure_loads
from edgeclip.profiles.measure.interleaved_runs import repeat_rows
from edgeclip.profiles.record.timing_statistics import RatioEstimate, surely_below
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.towers.tower_runner import in_batches, tower_feed

_SECONDS = 4.0  # for the timed runs over all loads, if both graphs are equally slow
TUNING_WORKLOAD = Workload(
    name="tune",
    description="latency at batch 1, enough to tell whether a rewrite helps",
    batch_sizes=(1,),
    min_warmup_runs=3,
    max_warmup_seconds=1,
    repeats=60,
    seconds_per_batch=1,
    cold_starts=0,
)
# The largest relative error of an output: summing in another order gives about 1e-7 in fp32.
MAX_RELATIVE_ERROR = 1e-5
# What a pass must save: the same graph again comes out up to 1% faster or slower, by where its
# memory lies (tests/benchmarks/graph_work.py).
MAX_TIME_RATIO = 0.99
_SAMPLES = 4  # inputs, on which a rewritten graph must give what it gave before

RunGraph = Callable[[NDArray[Any]], dict[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOutcome:
    """The outcome of trying one pass.

    Attributes:
        name: the pass.
        places: number of places where it changed the graph.
        ratio: time with the pass divided by time without, over loads of both; None if not
            measured.
        error: largest relative error of an output, compared with the graph as it was given; None
            if the pass changed nothing or the engine refused the result.
        kept: whether the graph now has the pass.
    """

    name: str
    places: int
    ratio: Interval | None
    error: float | None
    kept: bool

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "left out"
        if self.places == 0:
            return f"{self.name}: nothing to do"
        if self.error is None:
            return f"{self.name}: {verdict}, the engine cannot run it"
        if self.ratio is None:
            return f"{self.name}: {verdict}, not exact (relative error {self.error:.1g})"
        took = f"{self.ratio.value:.3f} [{self.ratio.low:.3f}, {self.ratio.high:.3f}]"
        return f"{self.name}: {verdict}, {self.places} places, {took} of the time"


def tune_graph(
    path: Path,
    device: DeviceProfile,
    inputs: Mapping[str, NDArray[Any]],
    *,
    tower: Tower,
    standard: bool = False,
    workload: Workload = TUNING_WORKLOAD,
    passes: Sequence[GraphPass] | None = None,
) -> tuple[PassOutcome, ...]:
    """Apply to a graph, one after another, the passes that make it faster on this machine.

    A pass is benchmarked against the graph with the passes kept before it, over several loads of
    both. It is kept only if the ratio is surely below `MAX_TIME_RATIO`, at 97.5%, and all outputs
    are as exact as rounding allows. The file is rewritten only if a pass is kept.

    Args:
        path: the graph, in fp32; other precisions are made of the result.
        device: its engine must run here.
        inputs: some of the tower's inputs [N, ...], by their one name; outputs are compared on all
            of them, and the first is timed.
        tower: the tower.
        standard: try only passes whose result is standard ONNX, for files that other runtimes
            read too.
        workload: how much to measure; slow towers are run less often.
        passes: the passes to try; None for all that suit the device.

    Raises:
        EngineError: the engine cannot run the graph as it is.
        ExportError: it cannot be read, or has several inputs.
    """
    if len(inputs) != 1:
        raise ExportError(f"{path.name} is tuned on one input, but {len(inputs)} are given")
    chosen = passes_for(device, standard=standard) if passes is None else tuple(passes)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        tuner = _PassTuner(path, Path(folder), device, inputs, tower, workload)
        for item in tqdm(chosen, desc="graph passes", disable=not sys.stderr.isatty()):
            outcomes.append(tuner.try_pass(item))
    if any(outcome.kept for outcome in outcomes):
        save_graph(tuner.model, path)
    return tuple(outcomes)


class _PassTuner:
    """Tries passes on a graph; holds the graph with the passes kept so far."""

    def __init__(
        self,
        path: Path,
        folder: Path,
        device: DeviceProfile,
        inputs: Mapping[str, NDArray[Any]],
        tower: Tower,
        workload: Workload,
    ) -> None:
        self.model = load_graph(path)
        self._path, self._folder, self._device, self._tower = path, folder, device, tower
        ((self._name, self._values),) = inputs.items()
        self._expected = self._open(path)(self._values)
        self._workload = workload

    def try_pass(self, item: GraphPass) -> PassOutcome:
        """Benchmark a pass, and keep its result if it is exact and faster."""
        changed, places = item.apply(self.model)
        if places == 0:
            return PassOutcome(name=item.name, places=0, ratio=None, error=None, kept=False)
        path = self._folder / f"{item.name}.onnx"
        save_graph(changed, path)
        error = self._error(path)
        ratio = self._ratio(path) if error is not None and error <= MAX_RELATIVE_ERROR else None
        kept = ratio is not None and surely_below([ratio], MAX_TIME_RATIO)[0]
        if kept:
            self.model, self._path = load_graph(path), path
        return PassOutcome(
            name=item.name,
            places=places,
            ratio=None if ratio is None else ratio.interval,
            error=error,
            kept=kept,
        )

    def _open(self, path: Path) -> RunGraph:
        engine = open_engine(path, device=self._device)

        def run(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
            return in_batches(
                lambda piece: engine.run({self._name: piece}),
                values,
                fixed_batch=self._device.static_batch,
            )

        return run

    def _error(self, path: Path) -> float | None:
        """Return the largest relative error of an output, None if the engine refuses."""
        try:
            found = self._open(path)(self._values)
        except EngineError:
            return None
        return max(
            relative_error(right, found[name]) if name in found else float("inf")
            for name, right in self._expected.items()
        )

    def _ratio(self, path: Path) -> RatioEstimate:
        """Time the changed graph and the present one in the same rounds of several loads."""
        make_batch = repeat_rows(self._values[:1])
        targets = [
            LoadableTarget(name, partial(self._open, file), make_batch)
            for name, file in (("present", self._path), ("changed", path))
        ]
        present, changed = measure_loads(
            targets, self._workload, part=self._tower, reference="present", seconds=_SECONDS
        )
        return load_ratio(changed, present)


def tune_tower(
    student: DualEncoder, graph: TowerGraph, device: DeviceProfile, sample: Source
) -> tuple[PassOutcome, ...]:
    """Apply to a tower's graph, in place, the passes that make it faster on this machine.

    Args:
        student: the model that the tower belongs to.
        graph: the tower's graph in fp32.
        device: its engine must run here.
        sample: pairs; the first few are run.

    Raises:
        EngineError: the graph cannot be run here.
        ExportError: it cannot be read.
    """
    values = next(tower_inputs(student, graph.tower, sample, count=_SAMPLES))
    return tune_graph(
        graph.path,
        device,
        tower_feed(values, graph.tower, graph.pixels, student.image_spec),
        tower=graph.tower,
        # Other runtimes read the text tower too, and an image tower in their form.
        standard=graph.pixels in (None, INTERCHANGE_FORM.pixels),
    )
