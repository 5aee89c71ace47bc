"""Make a quantized candidate, judge it on held-out pairs, and time it on this machine."""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source, relevance_of
from edgeclip.export.gates.gates import data_record, is_missed
from edgeclip.export.gates.judge_precisions import GateInputs, judge_alone
from edgeclip.export.graph.calibration import CalibrationData, calibration_data
from edgeclip.export.graph.embedders import (
    TOWERS,
    Embedder,
    TowerGraph,
    embed_all,
    graph_embedder,
    torch_embedder,
    tower_inputs,
)
from edgeclip.export.graph.graph_io import graph_files, load_graph, write_unchecked
from edgeclip.export.quantizing.config import (
    Config,
    Float16,
    NodeNames,
    SmoothingAlphas,
    StaticInt8,
    key,
    precision_of,
)
from edgeclip.export.quantizing.fp16 import emulated_fp16
from edgeclip.export.quantizing.mixed_fp16 import cache_inputs, find_islands
from edgeclip.export.quantizing.node_groups import (
    Gains,
    NodeGroup,
    counted_gains,
    measured_gains,
    node_groups,
)
from edgeclip.export.quantizing.quantization_candidate import (
    CandidateLatency,
    QuantizationCandidate,
    RecordStore,
    key_of,
)
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.search_task import (
    MAX_TEST_JUDGEMENTS,
    JudgedPairs,
    SearchTask,
)
from edgeclip.export.quantizing.sensitivity import (
    Sensitivity,
    SensitivityInputs,
    measure_sensitivity,
)
from edgeclip.export.quantizing.smoothquant import apply_smoothing, search_alphas
from edgeclip.profiles.measure.interleaved_loads import LoadableTarget, Loader, measure_loads
from edgeclip.profiles.measure.interleaved_runs import repeat_rows
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.spec import OUTPUT_NAMES, Precision, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

SEARCH_WORKLOAD = Workload(
    name="search",
    description="latency at batch 1 in each load, enough to tell configs a few percent apart",
    batch_sizes=(1,),
    min_warmup_runs=5,
    max_warmup_seconds=0.5,
    repeats=20,
    seconds_per_batch=1,
    cold_starts=0,
)
_SECONDS = 4.0  # for fp32 and one candidate, over all loads
_RACE_SECONDS = 12.0  # the same, where finalists are timed against each other
_SENSITIVITY_INPUTS = 256  # the ranking of groups hardly changes with more


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalJudgement(JsonRecord):
    """The gates of a config on the test pairs; `config` is its key."""

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a judgement"
    HINT: ClassVar[str] = "delete it and search again"

    config: str
    records: tuple[GateRecord, ...]

    def may_ship(self, *, accept_undecided: bool) -> bool:
        """Return whether no gate keeps it from being shipped."""
        return not any(
            is_missed(record, accept_undecided=accept_undecided) for record in self.records
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedNodes(JsonRecord):
    """Nodes that a search on the float graph found for a config.

    Attributes:
        smoothing: LayerNorms with their SmoothQuant alphas.
        islands: nodes that stay in fp32 in an fp16 graph.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "searched nodes"
    HINT: ClassVar[str] = "delete it and search again"

    smoothing: SmoothingAlphas = ()
    islands: NodeNames = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceLatencies(JsonRecord):
    """Latencies of configs that were timed in the same rounds, in the order of the configs."""

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a race"
    HINT: ClassVar[str] = "delete it and search again"

    latencies: tuple[CandidateLatency, ...]


class EvaluationPairs:
    """Prepared inputs of some pairs, and the gates of a graph on them.

    Inputs are decoded once, when they are first needed, and lie in files beside `path`.
    """

    def __init__(self, task: SearchTask, judged: JudgedPairs, path: Path) -> None:
        self._task, self._judged, self._path = task, judged, path
        (self._other_tower,) = (tower for tower in TOWERS if tower != task.tower)

    @cached_property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """Batches of the searched tower's inputs."""
        return cache_inputs(self._batches(self._judged.pairs, self._task.tower), self._path)

    @cached_property
    def others(self) -> FloatArray:
        """The other tower's embeddings, computed in torch: float32 [N, dim]."""
        batches = self._batches(self._judged.pairs, self._other_tower)
        (embeddings,) = embed_all(batches, [torch_embedder(self._task.student, self._other_tower)])
        return embeddings

    def judge(self, graph: TowerGraph, looks: int = 1) -> tuple[GateRecord, ...]:
        """Compare a graph with the tower in fp32, gate by gate; for `looks` see `judge_gates`.

        Raises:
            EngineError: the graph cannot be run.
        """
        task, precision = self._task, graph.precision
        reference, reference_labelled = self._reference
        found, labelled = self._reference if precision == "fp32" else self._embed(graph)
        by_precision: dict[Precision, FloatArray] = {}
        if reference_labelled is not None and labelled is not None:
            by_precision = {"fp32": reference_labelled, precision: labelled}
        outcomes = judge_alone(
            task.tower,
            precision,
            {
                (task.tower, "fp32"): reference,
                (task.tower, precision): found,
                (self._other_tower, "fp32"): self.others,
            },
            task.bounds[precision],
            GateInputs(
                data=data_record(self._judged.pairs),
                relevance=relevance_of(self._judged.pairs),
                zero_shot=self._judged.zero_shot,
                labelled=by_precision or None,
                clusters=self._judged.clusters,
            ),
            looks,
        )
        return tuple(item.record for item in outcomes)

    @cached_property
    def _reference(self) -> tuple[FloatArray, FloatArray | None]:
        return self._embed(self._task.graph)

    def _embed(self, graph: TowerGraph) -> tuple[FloatArray, FloatArray | None]:
        """Embed the pairs, and the labelled pictures if there are any."""
        zero_shot = self._judged.zero_shot
        with emulated_fp16([graph], self._task.device) as (runnable,):
            embed = open_embedder(self._task, runnable)
            (found,) = embed_all(iter(self.inputs), [embed])
            if self._task.tower != "image" or zero_shot is None:
                return found, None
            rows = zero_shot.rows_of(self._judged.pairs)
            if rows is not None:  # the labelled pictures are among the pairs
                return found, found[list(rows)]
            (labelled,) = embed_all(iter(self._labelled), [embed])
            return found, labelled

    @cached_property
    def _labelled(self) -> tuple[NDArray[Any], ...]:
        """Batches of the labelled pictures."""
        assert self._judged.zero_shot is not None
        path = self._path.with_name(f"{self._path.name}-labelled")
        return cache_inputs(self._batches(self._judged.zero_shot.source, "image"), path)

    def _batches(self, source: Source, tower: Tower) -> Iterator[NDArray[Any]]:
        student = self._task.student
        return tower_inputs(student, tower, source)


def open_embedder(task: SearchTask, graph: TowerGraph) -> Embedder:
    """Open a graph on the engine that judges candidates.

    Raises:
        EngineError: it cannot be loaded.
    """
    return graph_embedder(graph, task.student.spec.image, task.judging_device)


def time_candidates(
    reference: Loader,
    candidates: Sequence[Loader],
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload = SEARCH_WORKLOAD,
    seconds: float = _SECONDS,
) -> tuple[CandidateLatency, ...]:
    """Time candidates and the reference in the same rounds of several loads: see `measure_loads`.

    Args:
        reference, candidates: functions that load an engine and return what runs a batch.
        values: some of the tower's inputs [N, ...]; the first is timed.
        tower: the tower.
        workload: how much to measure in each load; slow towers are run less often.
        seconds: time for the runs of the reference and one equally slow candidate.

    Raises:
        EngineError: an engine fails.
    """
    make_batch = repeat_rows(values[:1])
    loaders = (reference, *candidates)
    targets = [LoadableTarget(str(at), load, make_batch) for at, load in enumerate(loaders)]
    base, *others = measure_loads(
        targets, workload, part=tower, reference=targets[0].name, seconds=seconds
    )
    return tuple(_latency(item, base) for item in others)


def _latency(item: Measurement, base: Measurement) -> CandidateLatency:
    return CandidateLatency(
        load_ratios=tuple(
            float(np.median(np.divide(ours, theirs)))
            for ours, theirs in zip(item.samples_ms, base.samples_ms, strict=True)
        ),
        ms=item.latency.p50_ms,
        reference_ms=base.latency.p50_ms,
        contended=bool(item.contended or base.contended),
    )


class CandidateEvaluator:
    """Make, judge and time configs of one tower; every result is kept in files and reused.

    Args:
        task: the tower and the data.
        store: where results are kept.
        cache: a folder for calibration ranges.
        scratch: a folder for prepared inputs, deleted with this object.
    """

    def __init__(self, task: SearchTask, store: RecordStore, cache: Path, scratch: Path) -> None:
        self.task = task
        self._store, self._cache = store, cache
        self._steering = EvaluationPairs(task, task.steering, scratch / "steering")
        self._test = EvaluationPairs(task, task.test, scratch / "test")

    @cached_property
    def groups(self) -> tuple[NodeGroup, ...]:
        """The groups of products that can be quantized.

        Raises:
            ExportError: there is none.
        """
        return node_groups(self.task.graph.path)

    def is_known(self, config: Config) -> bool:
        """Return whether a config was measured before."""
        return self._store.load(QuantizationCandidate, key_of(config)) is not None

    def evaluate(self, config: Config) -> QuantizationCandidate:
        """Make a config's graph, judge it on the steering pairs and time it; save the result.

        Raises:
            ExportError: the config cannot be made of the graph.
            EngineError: the result cannot be run.
        """

        def measure() -> QuantizationCandidate:
            began = time.monotonic()
            with self._written(config) as graph:
                return QuantizationCandidate(
                    config=config,
                    bytes=sum(path.stat().st_size for path in graph_files(graph.path)),
                    records=self._steering.judge(graph),
                    latency=self._time(graph),
                    seconds=time.monotonic() - began,
                )

        return self._store.load_or_make(QuantizationCandidate, key_of(config), measure)

    def damage(self, config: StaticInt8) -> Sensitivity:
        """Measure the error that each group causes alone, with the ranges of a config.

        Raises:
            ExportError, EngineError: see `evaluate`.
        """
        return self._store.load_or_make(Sensitivity, key(config), lambda: self._damage(config))

    def gains(self, config: StaticInt8) -> Gains:
        """Measure the time that quantizing each group saves; count operations for other devices.

        Raises:
            ExportError, EngineError: see `evaluate`.
        """
        return self._store.load_or_make(Gains, key(config), lambda: self._gains(config))

    def with_smoothing(self, config: StaticInt8) -> StaticInt8:
        """Return the config with the SmoothQuant alphas that suit it best, which may be none.

        Raises:
            ExportError: the graph cannot be read.
        """

        def look() -> SearchedNodes:
            source = self.task.graph.path
            return SearchedNodes(smoothing=search_alphas(source, self._data, config))

        found = self._store.load_or_make(SearchedNodes, key(config), look)
        return replace(config, smoothing=found.smoothing)

    def with_islands(self, config: Float16) -> Float16:
        """Return the config with the fp32 nodes that it needs to pass its gates.

        Raises:
            ExportError: it fails them even with every node in fp32.
        """

        def look() -> SearchedNodes:
            task = self.task
            bounds = task.bounds["fp16"]
            islands = find_islands(task.graph.path, self._data, bounds=bounds, cache=self._cache)
            return SearchedNodes(islands=islands)

        found = self._store.load_or_make(SearchedNodes, key(config), look)
        return replace(config, islands=found.islands)

    def race(self, configs: Sequence[Config]) -> tuple[CandidateLatency, ...]:
        """Time configs and fp32 in the same rounds; this machine must be the device.

        Raises:
            ExportError, EngineError: see `evaluate`.
        """

        def measure() -> RaceLatencies:
            task = self.task
            assert task.workload is not None
            with ExitStack() as stack:
                graphs = [stack.enter_context(self._written(config)) for config in configs]
                latencies = time_candidates(
                    partial(open_embedder, task, task.graph),
                    [partial(open_embedder, task, graph) for graph in graphs],
                    self._single,
                    tower=task.tower,
                    workload=task.workload,
                    seconds=_RACE_SECONDS,
                )
            return RaceLatencies(latencies=latencies)

        what = "\n".join(map(key, configs))
        return self._store.load_or_make(RaceLatencies, what, measure).latencies

    def judge_on_test(self, config: Config) -> FinalJudgement:
        """Judge a config on the test pairs, as one of `MAX_TEST_JUDGEMENTS` that may be.

        Raises:
            ExportError, EngineError: see `evaluate`.
        """

        def judge() -> FinalJudgement:
            with self._written(config) as graph:
                records = self._test.judge(graph, MAX_TEST_JUDGEMENTS)
                return FinalJudgement(config=key(config), records=records)

        what = f"{key(config)}\n{self.task.test.identity}"
        return self._store.load_or_make(FinalJudgement, what, judge)

    @cached_property
    def _data(self) -> CalibrationData:
        task = self.task
        batch = task.device.static_batch
        return calibration_data(task.student, task.ranges, task.graph.pixels, batch=batch)

    @cached_property
    def _single(self) -> NDArray[Any]:
        """One input, [1, ...]; a text has its own length, not that of a batch."""
        task, student = self.task, self.task.student
        return next(tower_inputs(student, task.tower, task.steering.pairs, count=1))

    @contextmanager
    def _written(self, config: Config) -> Iterator[TowerGraph]:
        """Write a config's graph to a file that lasts as long as the block."""
        precision = precision_of(config)
        with tempfile.TemporaryDirectory(prefix="edgeclip-candidate-") as folder:
            # The runtime reads the precision from a file's name.
            path = Path(folder) / f"{self.task.tower}_{precision}.onnx"
            quantize_graph(self.task.graph.path, path, config, self._data, cache=self._cache)
            yield replace(self.task.graph, precision=precision, path=path)

    def _time(self, graph: TowerGraph) -> CandidateLatency | None:
        task = self.task
        if task.workload is None:
            return None
        (latency,) = time_candidates(
            partial(open_embedder, task, task.graph),
            [partial(open_embedder, task, graph)],
            self._single,
            tower=task.tower,
            workload=task.workload,
        )
        return latency

    def _damage(self, config: StaticInt8) -> Sensitivity:
        task, spec = self.task, self.task.student.spec
        inputs = SensitivityInputs(
            inputs=_first(self._steering.inputs, _SENSITIVITY_INPUTS),
            others=self._steering.others[:_SENSITIVITY_INPUTS],
            logit_scale=spec.logit_scale,
            feed=lambda values: tower_feed(values, task.tower, task.graph.pixels, spec.image),
            output=OUTPUT_NAMES[task.tower],
            batch=task.device.static_batch,
            threads=task.judging_device.threads,
        )
        with self._written(config) as graph:
            source = task.graph.path
            if config.smoothing:  # the float graph that was quantized is the smoothed one
                model = load_graph(source)
                apply_smoothing(model, config.smoothing, self._data)
                source = graph.path.with_name("float.onnx")
                write_unchecked(model, source)
            return measure_sensitivity(source, graph.path, self.groups, inputs, config=key(config))

    def _gains(self, config: StaticInt8) -> Gains:
        task = self.task
        values = np.repeat(self._single, task.device.static_batch or 1, axis=0)
        feed = tower_feed(values, task.tower, task.graph.pixels, task.student.spec.image)
        if task.workload is None:
            return counted_gains(task.graph.path, self.groups, feed, task.judging_device)
        with self._written(config) as graph:
            return measured_gains(
                task.graph.path, graph.path, self.groups, feed, task.judging_device
            )


@contextmanager
def open_evaluator(task: SearchTask, folder: Path) -> Iterator[CandidateEvaluator]:
    """Open an evaluator whose results are kept in a folder, so that a later run continues there.

    Raises:
        OSError: the folder cannot be made.
    """
    of_pairs = hashlib.sha256(f"{task.ranges.identity}:{task.tower}".encode()).hexdigest()[:12]
    cache = folder / f"ranges-{of_pairs}"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgeclip-search-") as scratch:
        yield CandidateEvaluator(task, RecordStore(folder, task.identity), cache, Path(scratch))


def _first(batches: Sequence[NDArray[Any]], count: int) -> list[NDArray[Any]]:
    """Return the first `count` inputs, in their batches."""
    found: list[NDArray[Any]] = []
    for batch in batches:
        if count <= 0:
            break
        found.append(batch[:count])
        count -= len(batch)
    return found
