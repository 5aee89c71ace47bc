"""Find a bundle's fastest configuration here: engine, precision, threads and batch.

One that gives other embeddings than the bundle recorded is left out. All others are screened by a
few runs; the few that can be the fastest are loaded several times and timed interleaved.
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
from edgeclip.runtime.towers.tuning import TunedTower, describe_config

Goal = Literal["latency", "throughput"]
Values = NDArray[Any]

_BATCHES: dict[Goal, tuple[int, ...]] = {"latency": (1,), "throughput": (8, 16, 32)}
_SCREENING = Workload(
    name="screening",
    description="a few runs of every configuration",
    batch_sizes=(1,),
    min_warmup_runs=3,
    max_warmup_seconds=0.3,
    repeats=10,
    seconds_per_batch=1,
    cold_starts=0,
)
_COMPARISON = replace(
    _SCREENING, name="comparison", description="runs of the few fastest", repeats=40
)
_SECONDS = 24.0  # for the timed runs of the reference and one equally slow configuration
_NEAR = 1.3  # what takes longer than so many times the least at the screening is not compared
_COMPARED = 4
# The default stays unless another is faster by more: the same engine loaded again differs so.
_WORTH = 0.98


@dataclass(frozen=True, slots=True)
class RunConfig:
    """How a tower is run: in which precision, on which device, with how many rows at a time."""

    device: DeviceProfile
    precision: Precision
    batch: int

    def __str__(self) -> str:
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        return describe_config(self.device, self.precision) + rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedConfig:
    """A configuration, and how long it takes.

    Attributes:
        ms_per_row: median time of a batch over its rows; the interval is of the mean over loads,
            and the value itself where it was only screened.
        ratio: its time to that of the default, over the loads; None for the default itself, and
            for those that were only screened.
        compared: whether it was loaded several times and timed interleaved.
    """

    config: RunConfig
    ms_per_row: Interval
    ratio: Interval | None
    compared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerTuning:
    """What was found for a tower.

    Attributes:
        default: what runs without tuning.
        chosen: the fastest; the default where nothing is faster by more than 2%.
        timed: all configurations that were right, the fastest first.
        left_out: (configuration, reason) of the others.
    """

    tower: Tower
    default: RunConfig
    chosen: TimedConfig
    timed: tuple[TimedConfig, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def choice(self) -> TunedTower:
        """What is kept of it."""
        config = self.chosen.config
        device = config.device
        if config.batch > 1:
            device = replace(device, batch_best=config.batch, batch_max=config.batch)
        return TunedTower(
            tower=self.tower,
            precision=config.precision,
            device=device,
            batch=config.batch,
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
    """Find the fastest configuration to run a tower.

    Args:
        bundle: an opened bundle; its golden inputs are run.
        tower: a tower that it has.
        devices: the first one's own choice of a precision is the default configuration.
        goal: the least time of one input, or the most rows per second.
        progress: called with steps done and steps in all.

    Raises:
        BundleError: the first device allows none of the tower's precisions.
        EngineError: the default configuration fails or gives wrong embeddings.
        MissingExtraError: its engine is not installed.
    """
    first = devices[0]
    default = RunConfig(
        first, choose_precision(bundle.manifest.tower(tower), first), _batches(goal, first)[0]
    )
    configs = [
        default,
        *(config for config in _configs(bundle, tower, devices, goal) if config != default),
    ]
    steps = len(configs) + 1 + len(configs) // 2  # comparing takes half as long as screening
    least, left_out = dict[RunConfig, float](), list[tuple[str, str]]()
    inputs = bundle.golden().inputs(tower)
    for number, config in enumerate(configs, start=1):
        try:
            least[config] = _screen(bundle, tower, inputs, config)
        except (BundleError, EngineError, MissingExtraError) as error:
            if config == default:
                raise
            left_out.append((str(config), str(error)))
        progress(number, steps)
    best = min(least.values())
    near = [
        config for config in sorted(least, key=least.__getitem__) if least[config] <= _NEAR * best
    ]
    compared = list(dict.fromkeys([default, *near[:_COMPARED]]))
    timed = time_configs(bundle, tower, compared)
    progress(steps, steps)
    out = [
        TimedConfig(
            config=config,
            ms_per_row=Interval(ms, ms, ms),
            ratio=None,
            compared=False,
        )
        for config, ms in least.items()
        if config not in compared
    ]
    ordered = sorted(timed, key=lambda item: item.ms_per_row.value)
    own = next(item for item in timed if item.config == default)
    worth = ordered[0].ms_per_row.value <= _WORTH * own.ms_per_row.value
    return TowerTuning(
        tower=tower,
        default=default,
        chosen=ordered[0] if worth else own,
        timed=(*ordered, *sorted(out, key=lambda item: item.ms_per_row.value)),
        left_out=tuple(left_out),
    )


def _batches(goal: Goal, device: DeviceProfile) -> tuple[int, ...]:
    sizes = tuple(size for size in _BATCHES[goal] if size <= device.batch_max)
    return (device.static_batch,) if device.static_batch else sizes or (device.batch_max,)


def _configs(
    bundle: Bundle, tower: Tower, devices: Sequence[DeviceProfile], goal: Goal
) -> Iterator[RunConfig]:
    for device in devices:
        for precision in usable_precisions(bundle.manifest.tower(tower), device):
            for batch in _batches(goal, device):
                yield RunConfig(device, precision, batch)


def _whole_batch(inputs: Values, batch: int) -> Callable[[int], Values]:
    """Return a `make_batch` for `run_first`, of so many rows of the inputs."""
    return repeat_rows(repeat_rows(inputs)(batch)[None])


def _screen(bundle: Bundle, tower: Tower, inputs: Values, config: RunConfig) -> float:
    """Load one configuration alone, for memory's sake, and return its least time of a row in ms."""
    runner = TowerRunner(bundle, tower, config.precision, config.device)
    run, make_batch = partial(run_first, runner.run), _whole_batch(inputs, config.batch)
    target = BenchmarkTarget(str(config), run, make_batch)
    (found,) = run_interleaved([target], _SCREENING)
    return min(found.times.wall_ms) / config.batch


def time_configs(bundle: Bundle, tower: Tower, configs: Sequence[RunConfig]) -> list[TimedConfig]:
    """Load configurations several times and time them interleaved; ratios are to the first of them.

    Raises:
        BundleError, EngineError, MissingExtraError: one cannot be loaded.
    """

    def load(config: RunConfig) -> Callable[[Values], object]:
        return partial(run_first, TowerRunner(bundle, tower, config.precision, config.device).run)

    inputs = bundle.golden().inputs(tower)
    targets = [
        LoadableTarget(str(config), partial(load, config), _whole_batch(inputs, config.batch))
        for config in configs
    ]
    measured = measure_loads(
        targets, _COMPARISON, part=tower, reference=str(configs[0]), seconds=_SECONDS
    )
    return [
        TimedConfig(
            config=config,
            ms_per_row=item.latency.p50_ms.scaled(1 / config.batch),
            ratio=None
            if item.ratio is None
            else item.ratio.ratio.scaled(configs[0].batch / config.batch),
            compared=True,
        )
        for config, item in zip(configs, measured, strict=True)
    ]
