"""One config of a tower: made, judged on held-out pairs, timed on the device."""

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

from edgeclip.export.calibrate import CalibrationData, calibration_data
from edgeclip.export.embed_pairs import tower_inputs
from edgeclip.export.graph import graph_files, load_graph, write_unchecked
from edgeclip.export.quantizing.config import (
    Config,
    Float16,
    Kept,
    Smoothing,
    StaticInt8,
    key,
    precision_of,
)
from edgeclip.export.quantizing.group_gains import Gains, counted_gains, measured_gains
from edgeclip.export.quantizing.judge_pairs import PreparedPairs, open_embedder
from edgeclip.export.quantizing.mixed_fp16 import find_islands
from edgeclip.export.quantizing.node_groups import NodeGroup, node_groups
from edgeclip.export.quantizing.point import Point, PointLatency, key_of
from edgeclip.export.quantizing.point_latency import measure_latency, race
from edgeclip.export.quantizing.point_store import PointStore
from edgeclip.export.quantizing.search_task import SearchTask
from edgeclip.export.quantizing.sensitivity import Probe, Sensitivity, measure_damage
from edgeclip.export.quantizing.smooth import search_alphas
from edgeclip.export.quantizing.transform import apply_transforms
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.spec import OUTPUT_NAMES
from edgeclip.runtime.tower_feed import tower_feed

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
