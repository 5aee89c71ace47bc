"""Find the fastest way to run a bundle's towers here: engine, precision, threads and batch.

A way that gives other embeddings than the bundle recorded is left out. A short look at all others
leaves the few that can be the fastest; these are loaded several times and timed interleaved.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_loads import LoadableTarget, measure_loads
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    repeat_rows,
    run_first,
    run_interleaved,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_processor, has_bfloat16
from edgeclip.runtime.errors import BundleError, EngineError, MissingExtraError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.towers.tower_runner import (
    TowerRunner,
    choose_precision,
    usable_precisions,
)
from edgeclip.runtime.towers.tuning import TunedTower, way_to_run

Goal = Literal["latency", "throughput"]
Values = NDArray[Any]

_BATCHES: dict[Goal, tuple[int, ...]] = {"latency": (1,), "throughput": (8, 16, 32)}
_GLANCE = Workload(
    name="glance",
    description="a few runs of every way",
    batch_sizes=(1,),
    min_warmup_runs=3,
    max_warmup_seconds=0.3,
    repeats=10,
    seconds_per_batch=1,
    cold_starts=0,
)
_CONTEST = replace(_GLANCE, name="contest", description="runs of the few fastest", repeats=40)
_SECONDS = 24.0  # for the timed runs of the reference and one equally slow way
_NEAR = 1.3  # a way whose fastest run at the glance takes longer than this times the least is out
_FINALISTS = 4
# The usual way stays unless another is faster by more: the same engine loaded again differs so.
_WORTH = 0.98


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run a tower: a precision on a device, with so many rows at a time."""

    device: DeviceProfile
    precision: Precision
    batch: int

    def __str__(self) -> str:
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        return way_to_run(self.device, self.precision) + rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedWay:
    """A way, and what it takes.

    Attributes:
        ms_per_row: median time of a batch over its rows; the interval is of the mean over loads,
            and the value itself where it was only glanced at.
        ratio: its time to that of the usual way, over the loads; None for that way itself, and
            for those that were only glanced at.
        finalist: whether it was timed in the contest.
    """

    way: Way
    ms_per_row: Interval
    ratio: Interval | None
    finalist: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerTuning:
    """What was found for a tower.

    Attributes:
        usual: the way that runs without tuning.
        chosen: the fastest; the usual one where nothing is faster by more than 2%.
        timed: all ways that were right, the fastest first.
        left_out: (way, reason) of the others.
    """

    tower: Tower
    usual: Way
    chosen: TimedWay
    timed: tuple[TimedWay, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def choice(self) -> TunedTower:
        """What is kept of it."""
        way = self.chosen.way
        device = way.device
        if way.batch > 1:
            device = replace(device, batch_best=way.batch, batch_max=way.batch)
        return TunedTower(
            tower=self.tower,
            precision=way.precision,
            device=device,
            batch=way.batch,
            ms_per_row=self.chosen.ms_per_row.value,
        )


def devices_here(device: DeviceProfile) -> tuple[DeviceProfile, ...]:
    """Return profiles for each engine of this CPU, on all its cores, half of them, and one.

    OpenVINO's come where it is installed, in bfloat16 where the processor has it.

    Args:
        device: the profile of this machine, which is the first of them.
    """
    engines = [device]
    if importlib.util.find_spec("openvino") is not None:
        engines.append(replace(device, engine="openvino"))
        if has_bfloat16(detect_processor().flags):
            engines.append(replace(device, engine="openvino", bfloat16=True))
    threads = sorted({device.threads, max(1, device.threads // 2), 1}, reverse=True)
    return tuple(replace(item, threads=count) for item in engines for count in threads)


def tune_tower(
    bundle: Bundle,
    tower: Tower,
    devices: Sequence[DeviceProfile],
    goal: Goal = "latency",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TowerTuning:
    """Find the fastest way to run a tower.

    Args:
        bundle: an opened bundle; its golden inputs are run.
        tower: a tower that it has.
        devices: the first one's own choice of a precision is the usual way.
        goal: the least time of one input, or the most rows per second.
        progress: called with steps done and steps in all.

    Raises:
        BundleError: the first device allows none of the tower's precisions.
        EngineError: the usual way fails or gives wrong embeddings.
        MissingExtraError: its engine is not installed.
    """
    first = devices[0]
    usual = Way(
        first, choose_precision(bundle.manifest.tower(tower), first), _batches(goal, first)[0]
    )
    ways = [usual, *(way for way in _ways(bundle, tower, devices, goal) if way != usual)]
    steps = len(ways) + 1 + len(ways) // 2  # the contest takes about half as long as the glances
    least, left_out = dict[Way, float](), list[tuple[str, str]]()
    inputs = bundle.golden().inputs(tower)
    for number, way in enumerate(ways, start=1):
        try:
            least[way] = _glance(bundle, tower, inputs, way)
        except (BundleError, EngineError, MissingExtraError) as error:
            if way == usual:
                raise
            left_out.append((str(way), str(error)))
        progress(number, steps)
    best = min(least.values())
    near = [way for way in sorted(least, key=least.__getitem__) if least[way] <= _NEAR * best]
    finalists = list(dict.fromkeys([usual, *near[:_FINALISTS]]))
    timed = time_ways(bundle, tower, finalists)
    progress(steps, steps)
    out = [
        TimedWay(
            way=way,
            ms_per_row=Interval(ms, ms, ms),
            ratio=None,
            finalist=False,
        )
        for way, ms in least.items()
        if way not in finalists
    ]
    ordered = sorted(timed, key=lambda item: item.ms_per_row.value)
    own = next(item for item in timed if item.way == usual)
    worth = ordered[0].ms_per_row.value <= _WORTH * own.ms_per_row.value
    return TowerTuning(
        tower=tower,
        usual=usual,
        chosen=ordered[0] if worth else own,
        timed=(*ordered, *sorted(out, key=lambda item: item.ms_per_row.value)),
        left_out=tuple(left_out),
    )


def _batches(goal: Goal, device: DeviceProfile) -> tuple[int, ...]:
    sizes = tuple(size for size in _BATCHES[goal] if size <= device.batch_max)
    return (device.static_batch,) if device.static_batch else sizes or (device.batch_max,)


def _ways(
    bundle: Bundle, tower: Tower, devices: Sequence[DeviceProfile], goal: Goal
) -> Iterator[Way]:
    for device in devices:
        for precision in usable_precisions(bundle.manifest.tower(tower), device):
            for batch in _batches(goal, device):
                yield Way(device, precision, batch)


def _whole_batch(inputs: Values, batch: int) -> Callable[[int], Values]:
    """Return a `make_batch` for `run_first`, of so many rows of the inputs."""
    return repeat_rows(repeat_rows(inputs)(batch)[None])


def _glance(bundle: Bundle, tower: Tower, inputs: Values, way: Way) -> float:
    """Load one way alone, for memory's sake, and return its least time of a row in ms."""
    runner = TowerRunner(bundle, tower, way.precision, way.device)
    run, make_batch = partial(run_first, runner.run), _whole_batch(inputs, way.batch)
    target = BenchmarkTarget(str(way), run, make_batch)
    (found,) = run_interleaved([target], _GLANCE)
    return min(found.times.wall_ms) / way.batch


def time_ways(bundle: Bundle, tower: Tower, ways: Sequence[Way]) -> list[TimedWay]:
    """Load ways several times and time them interleaved; ratios are to the first of them.

    Raises:
        BundleError, EngineError, MissingExtraError: one cannot be loaded.
    """

    def load(way: Way) -> Callable[[Values], object]:
        return partial(run_first, TowerRunner(bundle, tower, way.precision, way.device).run)

    inputs = bundle.golden().inputs(tower)
    targets = [
        LoadableTarget(str(way), partial(load, way), _whole_batch(inputs, way.batch))
        for way in ways
    ]
    measured = measure_loads(
        targets, _CONTEST, part=tower, reference=str(ways[0]), seconds=_SECONDS
    )
    return [
        TimedWay(
            way=way,
            ms_per_row=item.latency.p50_ms.scaled(1 / way.batch),
            ratio=None
            if item.ratio is None
            else item.ratio.ratio.scaled(ways[0].batch / way.batch),
            finalist=True,
        )
        for way, item in zip(ways, measured, strict=True)
    ]
