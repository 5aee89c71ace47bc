"""Time a set of probes on this machine, and derive what each block of a tower costs.

Where only a few were measured, the costs of the others are transferred from another measured
device. In logarithms the costs of two devices lie near a line for each family and precision.
Families of which few blocks were measured on both lean on the line of all blocks.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from edgeclip.profiles.measure.interleaved_runs import no_garbage_collection, round_order
from edgeclip.profiles.predict.measured_device import (
    BlockCost,
    CheckTime,
    MeasuredDevice,
    TransferAccuracy,
)
from edgeclip.profiles.predict.predict_latency import FAMILIES, LEVEL
from edgeclip.profiles.predict.probe_set import CheckTower, GraphInput, Probe, ProbeSet
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.profiles.sensors.interference import InterferenceWatch
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.console import Progress
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.percentiles import conformal_bound, conformal_level

FEWEST_ROUNDS = 5
_MEMORY = 2**30  # of loaded weights at a time, in bytes
_TURN_MS = 20.0  # that one turn should last
_FEWEST_RUNS, _MOST_RUNS = 4, 20  # in one turn
_WARM_UP_RUNS = 3


def measure_probes(
    probes: ProbeSet,
    *,
    device: DeviceProfile,
    name: str,
    command: str,
    rounds: int = 30,
    few: bool = False,
    progress: Progress | None = None,
) -> MeasuredDevice:
    """Time all probes that the device allows.

    Args:
        probes: what to run.
        device: the engine, its threads, and the precisions to measure.
        name: what to call the result.
        command: what was typed, for the record.
        rounds: samples of each probe, at least `FEWEST_ROUNDS`.
        few: only the few that `transfer_costs` needs.
        progress: called after each round.

    Raises:
        InputError: too few rounds, or the device allows none of the probes.
        EngineError: a graph cannot be loaded or run.
    """
    if rounds < FEWEST_ROUNDS:
        raise InputError(f"give at least {FEWEST_ROUNDS} rounds, got {rounds}")
    items = _allowed(probes, device, few)
    groups = list(_groups(items))
    samples: dict[str, Values] = {}
    with InterferenceWatch() as watch:
        for number, group in enumerate(groups):

            def after_round(done: int, before: int = number * rounds) -> None:
                if progress is not None:
                    progress(before + done, len(groups) * rounds)

            samples |= _time_group(probes, group, device, rounds, after_round)
    return MeasuredDevice(
        name=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        device=device,
        machine=detect_machine(),
        rounds=rounds,
        costs=tuple(_cost(item, samples) for item in items if isinstance(item, Probe)),
        checks=tuple(
            CheckTime(
                name=item.name,
                precision=item.precision,
                parts=item.parts,
                ms=percentile_interval(samples[item.name], 50),
            )
            for item in items
            if isinstance(item, CheckTower)
        ),
        before=watch.before,
        after=watch.after,
        interference=watch.found,
    )


def interleaved_times(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    after_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Values]:
    """Time several functions in alternating turns.

    Args:
        runs: what to time, by name.
        rounds: how many turns each has.
        after_round: called with the number of rounds that are done.

    Returns:
        Milliseconds by name [rounds]: of each turn the median of the later half of its runs.
    """
    names = list(runs)
    found = {name: np.empty(rounds) for name in names}
    with no_garbage_collection():
        repeats = {}
        for name in names:
            fastest = min(_turn_ms(runs[name], 1) for _ in range(_WARM_UP_RUNS))
            wanted = _TURN_MS / max(fastest, 1e-6)
            repeats[name] = int(np.clip(wanted, _FEWEST_RUNS, _MOST_RUNS))
        for number in range(rounds):
            for place in round_order(len(names), number):
                name = names[place]
                found[name][number] = _turn_ms(runs[name], repeats[name])
            after_round(number + 1)
    return found


def _turn_ms(run: Callable[[], object], repeats: int) -> float:
    times = np.empty(repeats)
    for at in range(repeats):
        began = time.perf_counter()
        run()
        times[at] = time.perf_counter() - began
    return 1e3 * float(np.median(times[repeats // 2 :]))


def _time_group(
    probes: ProbeSet,
    group: Sequence[Probe | CheckTower],
    device: DeviceProfile,
    rounds: int,
    after_round: Callable[[int], None],
) -> dict[str, Values]:
    """Load some probes and time them; their memory is free again when this returns."""

    def runner(graph: GraphInput) -> Callable[[], object]:
        engine, feeds = open_engine(probes.graph_path(graph), device=device), graph.feeds()
        return lambda: engine.run(feeds)

    runs = {item.name: runner(item.graph) for item in group}
    return interleaved_times(runs, rounds, after_round)


def _allowed(probes: ProbeSet, device: DeviceProfile, few: bool) -> tuple[Probe | CheckTower, ...]:
    allowed: set[Precision] = {"fp32", *device.precisions}
    if probes.index.needs_vnni and not device.vnni:
        allowed.discard("int8")  # its products would overflow, and are computed another way
    items: tuple[Probe | CheckTower, ...] = (*probes.index.probes, *probes.index.checks)
    chosen = tuple(item for item in items if item.precision in allowed and (item.few or not few))
    if not chosen:
        raise InputError(
            f"device {device.name!r} allows none of these probes: write some for it with "
            "`edgeclip probes --device`"
        )
    return chosen


def _groups(items: Sequence[Probe | CheckTower]) -> Iterator[list[Probe | CheckTower]]:
    """Yield probes that are loaded together; one is always with those it is compared with."""
    beyond = {item.name: item.beyond for item in items if isinstance(item, Probe)}
    families: dict[str, list[Probe | CheckTower]] = {}
    for item in items:
        first = item.name
        while (before := beyond.get(first)) is not None:
            first = before
        families.setdefault(first, []).append(item)
    group: list[Probe | CheckTower] = []
    loaded = 0
    for family in families.values():
        size = sum(item.graph.weight_bytes for item in family)
        if group and loaded + size > _MEMORY:
            yield group
            group, loaded = [], 0
        group, loaded = [*group, *family], loaded + size
    yield group


def _cost(probe: Probe, samples: Mapping[str, Values]) -> BlockCost:
    """The time of one block, round by round; noise can take that of a small one below 0."""
    beyond = 0.0 if probe.beyond is None else samples[probe.beyond]
    ms = (samples[probe.name] - beyond) / probe.count
    return BlockCost(
        probe=probe.name,
        piece=probe.piece,
        precision=probe.precision,
        ms=percentile_interval(ms, 50, least=-math.inf),
        samples_ms=tuple(round(float(value), 4) for value in ms),
        few=probe.few,
    )


FEWEST_SHARED = 3
_SLOPE_PULL = 1.0  # squared logarithms of cost, as if so much of the general slope had been seen
_LEVEL_PULL = 0.5  # blocks, as if so many had been seen on the line of all blocks
_LEAST_MS = 1e-4


class _Pair(NamedTuple):
    """Logarithms of what one block costs on both devices."""

    group: str
    source: float
    target: float


@dataclass(frozen=True, slots=True)
class _Line:
    """log target = level + slope x (log source - centre)."""

    centre: float
    level: float
    slope: float

    def __call__(self, source: float) -> float:
        return self.level + self.slope * (source - self.centre)


def transfer_costs(source: MeasuredDevice, few: MeasuredDevice) -> MeasuredDevice:
    """Return the device of `few` with a cost for every block of `source`.

    What `few` measured stays as it is. A precision of which it measured nothing is left out: the
    device may compute it another way, or not at all.

    Raises:
        InputError: the two share fewer than `FEWEST_SHARED` blocks.
    """
    targets = {(cost.piece, cost.precision): cost for cost in few.costs}
    sources = {(cost.piece, cost.precision): cost for cost in source.costs}
    pairs = [
        _Pair(_group(cost), _log_ms(sources[key]), _log_ms(cost))
        for key, cost in targets.items()
        if key in sources
    ]
    if len(pairs) < FEWEST_SHARED:
        raise InputError(
            f"{few.name!r} shares {len(pairs)} blocks with {source.name!r}, at least "
            f"{FEWEST_SHARED} are needed: measure the same probes on both"
        )
    errors = []
    for at, pair in enumerate(pairs):
        line = _line_of(pair.group, [*pairs[:at], *pairs[at + 1 :]])
        errors.append(abs(math.expm1(line(pair.source) - pair.target)))
    level = min(LEVEL, conformal_level(len(errors)))
    transferred = []
    for key, cost in sources.items():
        if key not in targets and cost.precision in few.precisions:
            ms = math.exp(_line_of(_group(cost), pairs)(_log_ms(cost)))
            moved = replace(cost, ms=Interval(ms, ms, ms), samples_ms=(), few=False)
            transferred.append(moved)
    return replace(
        few,
        costs=(*few.costs, *transferred),
        carried=TransferAccuracy(
            source=source.name,
            probes=len(pairs),
            error=float(np.median(errors)),
            bound=conformal_bound(np.array(errors), level),
            level=level,
        ),
    )


def _group(cost: BlockCost) -> str:
    return f"{FAMILIES[cost.piece.kind]} {cost.precision}"


def _log_ms(cost: BlockCost) -> float:
    return math.log(max(cost.ms.value, _LEAST_MS))


def _line_of(group: str, pairs: Sequence[_Pair]) -> _Line:
    """Fit the line of a group, which leans on that of all pairs; that alone without pairs."""
    general = _fit(pairs, None)
    own = [pair for pair in pairs if pair.group == group]
    return _fit(own, general) if own else general


def _fit(pairs: Sequence[_Pair], general: _Line | None) -> _Line:
    x, y = np.array([(pair.source, pair.target) for pair in pairs]).T
    centre, level = float(x.mean()), float(y.mean())
    spread, common = float(((x - centre) ** 2).sum()), float(((x - centre) * (y - level)).sum())
    pull = 1.0 if general is None else general.slope
    slope = (common + _SLOPE_PULL * pull) / (spread + _SLOPE_PULL)
    if general is not None:
        level = (level * len(x) + _LEVEL_PULL * general(centre)) / (len(x) + _LEVEL_PULL)
    return _Line(centre, level, max(0.0, slope))
