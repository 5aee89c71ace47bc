"""Make a candidate, judge it on held-out pairs, and time it on the device."""

import hashlib
import math
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

from edgeclip.compress.data.sources import Source
from edgeclip.export.gates.gates import data_record
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
from edgeclip.export.graph.tune_passes import ABTiming, Opener, ab_benchmark, ab_benchmark_each
from edgeclip.export.quantizing.config import (
    Config,
    Float16,
    Kept,
    Smoothing,
    StaticInt8,
    key,
    precision_of,
)
from edgeclip.export.quantizing.fp16 import stored_in_half
from edgeclip.export.quantizing.mixed_fp16 import find_islands, hold_inputs
from edgeclip.export.quantizing.node_groups import (
    Gains,
    NodeGroup,
    counted_gains,
    measured_gains,
    node_groups,
)
from edgeclip.export.quantizing.quantization_candidate import (
    Point,
    PointLatency,
    PointStore,
    key_of,
)
from edgeclip.export.quantizing.search_task import JudgedPairs, SearchTask
from edgeclip.export.quantizing.sensitivity import Probe, Sensitivity, measure_damage
from edgeclip.export.quantizing.smooth import search_alphas
from edgeclip.export.quantizing.write_config import apply_transforms, write_config
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import OUTPUT_NAMES, Precision, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed


class PreparedPairs:
    """Pairs with their prepared inputs and what fp32 makes of them, each when it is needed."""

    def __init__(self, task: SearchTask, judged: JudgedPairs, path: Path) -> None:
        self._task, self._judged, self._path = task, judged, path

    @cached_property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """Batches of the searched tower's inputs."""
        return hold_inputs(self._batches(self._judged.pairs, self._task.tower), self._path)

    @cached_property
    def others(self) -> FloatArray:
        """The other tower's embeddings, as torch computes them: float32 [N, dim]."""
        (other,) = (tower for tower in TOWERS if tower != self._task.tower)
        batches = self._batches(self._judged.pairs, other)
        (found,) = embed_all(batches, [torch_embedder(self._task.student, other)])
        return found

    @cached_property
    def labelled(self) -> tuple[NDArray[Any], ...]:
        """Batches of the labelled pictures that are not among the pairs."""
        zero = self._judged.zero_shot
        if zero is None or self._task.tower != "image" or self._rows is not None:
            return ()
        path = self._path.with_name(f"{self._path.name}-labelled")
        return hold_inputs(self._batches(zero.source, "image"), path)

    @cached_property
    def _reference(self) -> tuple[FloatArray, FloatArray | None]:
        return self._embed(self._task.graph)

    @property
    def _rows(self) -> tuple[int, ...] | None:
        zero = self._judged.zero_shot
        return None if zero is None else zero.rows_of(self._judged.pairs)

    def judge(self, graph: TowerGraph) -> tuple[GateRecord, ...]:
        """Hold a graph against the tower in fp32.

        Raises:
            EngineError: it cannot be run.
        """
        task, precision = self._task, graph.precision
        right, right_labelled = self._reference
        found, labelled = (right, right_labelled) if precision == "fp32" else self._embed(graph)
        (other,) = (tower for tower in TOWERS if tower != task.tower)
        by_precision: dict[Precision, FloatArray] = {}
        if right_labelled is not None and labelled is not None:
            by_precision = {"fp32": right_labelled, precision: labelled}
        judged = judge_alone(
            task.tower,
            precision,
            {
                (task.tower, "fp32"): right,
                (task.tower, precision): found,
                (other, "fp32"): self.others,
            },
            task.bounds[precision],
            GateInputs(
                data=data_record(self._judged.pairs),
                zero_shot=self._judged.zero_shot,
                labelled=by_precision or None,
            ),
        )
        return tuple(item.record for item in judged)

    def _embed(self, graph: TowerGraph) -> tuple[FloatArray, FloatArray | None]:
        """Embeddings of the pairs and of the labelled pictures, if there are any."""
        with stored_in_half([graph], self._task.device) as (shown,):
            embed = open_embedder(self._task, shown)
            (found,) = embed_all(iter(self.inputs), [embed])
            if self._task.tower != "image" or self._judged.zero_shot is None:
                return found, None
            if self._rows is not None:
                return found, found[list(self._rows)]
            (labelled,) = embed_all(iter(self.labelled), [embed])
            return found, labelled

    def _batches(self, source: Source, tower: Tower) -> Iterator[NDArray[Any]]:
        student = self._task.student
        return tower_inputs(source, tower, student.spec, student.text_tokenizer)


def open_embedder(task: SearchTask, graph: TowerGraph) -> Embedder:
    """Open a graph with what runs graphs while they are judged.

    Raises:
        EngineError: it cannot be loaded.
    """
    return graph_embedder(graph, task.student.spec.image, task.runner)


SEARCHING = Workload(
    name="search",
    description="latency at batch 1, enough to tell configs a few percent apart",
    batch_sizes=(1,),
    min_warmup_runs=5,
    max_warmup_seconds=1,
    repeats=100,
    seconds_per_batch=1,
    cold_starts=0,
)
_SECONDS_OF_RACE = 6.0  # see `time_each_twice`


def measure_latency(
    reference: Opener,
    candidate: Opener,
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload = SEARCHING,
) -> PointLatency:
    """Time both in turns, twice; for arguments and errors see `ab_benchmark`.

    Figures are the geometric means of both measurements, and intervals hold those of both.
    """
    return _latency(ab_benchmark(reference, candidate, values, tower=tower, workload=workload))


def race(
    reference: Opener,
    candidates: Sequence[Opener],
    values: NDArray[Any],
    *,
    tower: Tower,
    workload: Workload = SEARCHING,
) -> tuple[PointLatency, ...]:
    """Time all in the same rounds, and for longer; otherwise as `measure_latency`."""
    found = ab_benchmark_each(
        reference, candidates, values, tower=tower, workload=workload, seconds=_SECONDS_OF_RACE
    )
    return tuple(map(_latency, found))


def _latency(found: Sequence[ABTiming]) -> PointLatency:
    return PointLatency(
        ratio=_joined([item.ratio for item in found]),
        ms=_joined([item.candidate.latency.p50_ms for item in found]),
        reference_ms=_joined([item.reference.latency.p50_ms for item in found]),
        contended=any(item.reference.contended or item.candidate.contended for item in found),
    )


def _joined(intervals: Sequence[Interval]) -> Interval:
    return Interval(
        value=math.exp(float(np.mean([math.log(item.value) for item in intervals]))),
        low=min(item.low for item in intervals),
        high=max(item.high for item in intervals),
    )


_PROBED = 256  # inputs that damage is measured on; its ranking hardly changes with more


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement(JsonRecord):
    """The last judgement of a config, on the test pairs."""

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a judgement"
    MEND: ClassVar[str] = "delete it and search again"

    config: str
    records: tuple[GateRecord, ...]

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return all(record.passed for record in self.records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings(JsonRecord):
    """What was found for a config by looking at the tower itself.

    Attributes:
        smoothing: LayerNorms with their alphas.
        islands: nodes that fp16 leaves in fp32.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "findings"
    MEND: ClassVar[str] = "delete it and search again"

    smoothing: Smoothing = ()
    islands: Kept = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Raced(JsonRecord):
    """What configs took in the same rounds, in their order."""

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a race"
    MEND: ClassVar[str] = "delete it and search again"

    latencies: tuple[PointLatency, ...]


class TowerTrial:
    """Measures configs of one tower, each only once.

    Args:
        task: the tower and the data.
        store: where points are kept.
        cache: a folder for the ranges that calibration finds.
        scratch: a folder for prepared inputs, which goes with this object.
    """

    def __init__(self, task: SearchTask, store: PointStore, cache: Path, scratch: Path) -> None:
        self.task = task
        self._store, self._cache = store, cache
        self._steering = PreparedPairs(task, task.steering, scratch / "steering")
        self._test = PreparedPairs(task, task.test, scratch / "test")

    @cached_property
    def groups(self) -> tuple[NodeGroup, ...]:
        """What can be quantized in the tower.

        Raises:
            ExportError: nothing.
        """
        return node_groups(self.task.graph.path)

    def knows(self, config: Config) -> bool:
        """Whether a point is there already."""
        return self._store.find(Point, key_of(config)) is not None

    def point(self, config: Config) -> Point:
        """Return a config's point, measured if it must be; it is kept before this returns.

        Raises:
            ExportError: the config cannot be made of the graph.
            EngineError: the result cannot be run.
        """
        return self._store.remember(Point, key_of(config), lambda: self._measure(config))

    def damage(self, config: StaticInt8) -> Sensitivity:
        """Measure what each group suffers with the ranges of a config.

        Raises:
            ExportError, EngineError: see `point`.
        """
        return self._store.remember(Sensitivity, key(config), lambda: self._damage(config))

    def gains(self, config: StaticInt8) -> Gains:
        """Measure, or count, what quantizing each group saves.

        Raises:
            ExportError, EngineError: see `point`.
        """
        return self._store.remember(Gains, key(config), lambda: self._gains(config))

    def smoothed(self, config: StaticInt8) -> StaticInt8:
        """Return the config with the smoothing that suits it best, which may be none.

        Raises:
            ExportError: the graph cannot be read.
        """

        def look() -> Findings:
            source = self.task.graph.path
            return Findings(smoothing=search_alphas(source, self._data, config))

        found = self._store.remember(Findings, key(config), look)
        return replace(config, smoothing=found.smoothing)

    def with_islands(self, config: Float16) -> Float16:
        """Return the config with the nodes in fp32 without which it misses its gates.

        Raises:
            ExportError: it misses them whatever stays in fp32.
        """

        def look() -> Findings:
            task = self.task
            bounds = task.bounds["fp16"]
            islands = find_islands(task.graph.path, self._data, bounds=bounds, cache=self._cache)
            return Findings(islands=islands)

        return replace(config, islands=self._store.remember(Findings, key(config), look).islands)

    def race(self, configs: Sequence[Config]) -> tuple[PointLatency, ...]:
        """Time configs and fp32 in the same rounds, on the device that this machine must be.

        Raises:
            ExportError, EngineError: see `point`.
        """
        what = "\n".join(map(key, configs))
        return self._store.remember(Raced, what, lambda: self._race(configs)).latencies

    def judge(self, config: Config) -> Judgement:
        """Judge a config on the test pairs.

        Raises:
            ExportError, EngineError: see `point`.
        """
        what = f"{key(config)}\n{self.task.test.identity}"
        return self._store.remember(Judgement, what, lambda: self._judge(config))

    @cached_property
    def _data(self) -> CalibrationData:
        task = self.task
        batch = task.device.static_batch
        return calibration_data(task.student, task.ranges, task.graph.pixels, batch=batch)

    @cached_property
    def _single(self) -> NDArray[Any]:
        """One input, [1, ...]: of a text with its own length, not that of a batch."""
        task, student = self.task, self.task.student
        tokenizer = student.text_tokenizer
        return next(tower_inputs(task.steering.pairs, task.tower, student.spec, tokenizer, count=1))

    @contextmanager
    def _made(self, config: Config) -> Iterator[TowerGraph]:
        """Write a config's graph for as long as the block lasts."""
        precision = precision_of(config)
        with tempfile.TemporaryDirectory(prefix="edgeclip-point-") as folder:
            # The runtime reads the precision from a file's name.
            path = Path(folder) / f"{self.task.tower}_{precision}.onnx"
            write_config(self.task.graph.path, path, config, self._data, cache=self._cache)
            yield replace(self.task.graph, precision=precision, path=path)

    def _measure(self, config: Config) -> Point:
        began = time.monotonic()
        with self._made(config) as graph:
            records = self._steering.judge(graph)
            latency = self._latency(graph)
            size = sum(path.stat().st_size for path in graph_files(graph.path))
        return Point(
            config=config,
            bytes=size,
            latency=latency,
            records=records,
            seconds=time.monotonic() - began,
        )

    def _judge(self, config: Config) -> Judgement:
        with self._made(config) as graph:
            return Judgement(config=key(config), records=self._test.judge(graph))

    def _latency(self, graph: TowerGraph) -> PointLatency | None:
        task = self.task
        if task.workload is None:
            return None
        return measure_latency(
            lambda: open_embedder(task, task.graph),
            lambda: open_embedder(task, graph),
            self._single,
            tower=task.tower,
            workload=task.workload,
        )

    def _race(self, configs: Sequence[Config]) -> Raced:
        task = self.task
        assert task.workload is not None
        with ExitStack() as stack:
            graphs = [stack.enter_context(self._made(config)) for config in configs]
            first, *others = (partial(open_embedder, task, each) for each in (task.graph, *graphs))
            found = race(first, others, self._single, tower=task.tower, workload=task.workload)
        return Raced(latencies=found)

    def _damage(self, config: StaticInt8) -> Sensitivity:
        task, spec = self.task, self.task.student.spec
        probe = Probe(
            inputs=_first(self._steering.inputs, _PROBED),
            others=self._steering.others[:_PROBED],
            logit_scale=spec.logit_scale,
            feed=lambda values: tower_feed(values, task.tower, task.graph.pixels, spec.image),
            output=OUTPUT_NAMES[task.tower],
            batch=task.device.static_batch,
            threads=task.runner.threads,
        )
        with self._made(config) as graph:
            source = self._float_form(config, graph.path.with_name("float.onnx"))
            return measure_damage(source, graph.path, self.groups, probe, config=key(config))

    def _float_form(self, config: StaticInt8, path: Path) -> Path:
        """Return the float graph that a config quantizes, written to `path` if it is another."""
        source = self.task.graph.path
        if not (config.smoothing or config.equalised):
            return source
        write_unchecked(apply_transforms(load_graph(source), config, self._data), path)
        return path

    def _gains(self, config: StaticInt8) -> Gains:
        task = self.task
        values = np.repeat(self._single, task.device.static_batch or 1, axis=0)
        feed = tower_feed(values, task.tower, task.graph.pixels, task.student.spec.image)
        if task.workload is None:
            return counted_gains(task.graph.path, self.groups, feed, task.runner)
        with self._made(config) as graph:
            return measured_gains(task.graph.path, graph.path, self.groups, feed, task.runner)


@contextmanager
def open_trial(task: SearchTask, folder: Path) -> Iterator[TowerTrial]:
    """Open a trial whose points are kept in a folder, for the next run to go on with.

    Raises:
        OSError: the folder cannot be made.
    """
    of_pairs = hashlib.sha256(f"{task.ranges.identity}:{task.tower}".encode()).hexdigest()[:12]
    cache = folder / f"ranges-{of_pairs}"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgeclip-search-") as scratch:
        yield TowerTrial(task, PointStore(folder, task.identity), cache, Path(scratch))


def _first(batches: Sequence[NDArray[Any]], count: int) -> list[NDArray[Any]]:
    """The first `count` inputs, in their batches."""
    found: list[NDArray[Any]] = []
    for batch in batches:
        if count <= 0:
            break
        found.append(batch[:count])
        count -= len(batch)
    return found
