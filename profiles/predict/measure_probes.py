"""Time a set of probes here, and derive what each block costs; carry costs between devices."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from edgeclip.profiles.measure.interleaved_runs import no_garbage_collection, round_order
from edgeclip.profiles.predict.measured_device import Carried, CheckTime, MeasuredDevice, PieceCost
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.probe_set import CheckTower, GraphInput, Probe, ProbeSet
from edgeclip.profiles.predict.tower_shapes import Kind, Piece
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.profiles.sensors.interference import InterferenceWatch
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.console import Progress
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision

FEWEST_ROUNDS = 5
_MEMORY = 2**30  # of loaded weights at a time, in bytes
_TURN_MS = 20.0  # that one turn should last
_FEWEST_RUNS, _MOST_RUNS = 4, 20  # in one turn
_WARM_RUNS = 3

Item = Probe | CheckTower
Run = Callable[[], object]


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
        few: only the few that `carry_over` needs.
        progress: called after each round.

    Raises:
        InputError: too few rounds, or the device allows none of the probes.
        EngineError: a graph cannot be loaded or run.
    """
    if rounds < FEWEST_ROUNDS:
        raise InputError(f"give at least {FEWEST_ROUNDS} rounds, got {rounds}")
    items = _chosen(probes, device, few)
    groups = list(_groups(items))
    samples: dict[str, Values] = {}
    with InterferenceWatch() as watch:
        for number, group in enumerate(groups):
            step = _step(progress, number, len(groups), rounds)
            samples |= _time_group(probes, group, device, rounds, step)
    return MeasuredDevice(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
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


def _time_group(
    probes: ProbeSet,
    group: Sequence[Item],
    device: DeviceProfile,
    rounds: int,
    step: Callable[[int], None],
) -> dict[str, Values]:
    """Load some probes and time them; their memory is free again when this returns."""
    runs = {item.name: _runner(probes, item.graph, device) for item in group}
    return time_in_turns(runs, rounds, step)


def time_in_turns(
    runs: Mapping[str, Run], rounds: int, step: Callable[[int], None] = lambda done: None
) -> dict[str, Values]:
    """Milliseconds of one run, by name, one value a round: [rounds].

    A round's value is the median of the later half of the turn's runs.

    Args:
        runs: what to time.
        rounds: how many.
        step: told of each round that is done.
    """
    names = list(runs)
    found = {name: np.empty(rounds) for name in names}
    with no_garbage_collection():
        repeats = {name: _repeats(runs[name]) for name in names}
        for number in range(rounds):
            for place in round_order(len(names), number):
                found[names[place]][number] = _turn(runs[names[place]], repeats[names[place]])
            step(number + 1)
    return found


def _turn(run: Run, repeats: int) -> float:
    """Milliseconds: the median of the later half of some runs."""
    times = np.empty(repeats)
    for at in range(repeats):
        began = time.perf_counter()
        run()
        times[at] = time.perf_counter() - began
    return 1e3 * float(np.median(times[repeats // 2 :]))


def _repeats(run: Run) -> int:
    """Warm up; say how many runs a turn has."""
    fastest = min(_turn(run, 1) for _ in range(_WARM_RUNS))
    return int(np.clip(_TURN_MS / max(fastest, 1e-6), _FEWEST_RUNS, _MOST_RUNS))


def _chosen(probes: ProbeSet, device: DeviceProfile, few: bool) -> tuple[Item, ...]:
    allowed: set[Precision] = {"fp32", *device.precisions}
    if probes.index.needs_vnni and not device.vnni:
        allowed.discard("int8")  # its products would overflow, and are computed another way
    items: tuple[Item, ...] = (*probes.index.probes, *probes.index.checks)
    chosen = tuple(item for item in items if item.precision in allowed and (item.few or not few))
    if not chosen:
        raise InputError(
            f"device {device.name!r} allows none of these probes: write some for it with "
            "`edgeclip probes --device`"
        )
    return chosen


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Probes that are loaded together; one is always with what it is compared with."""
    group: list[Item] = []
    loaded = 0
    for family in _families(items):
        size = sum(item.graph.weight_bytes for item in family)
        if group and loaded + size > _MEMORY:
            yield group
            group, loaded = [], 0
        group, loaded = [*group, *family], loaded + size
    yield group


def _families(items: Sequence[Item]) -> list[list[Item]]:
    """Probes that are compared with each other, directly or not."""
    beyond = {item.name: item.beyond for item in items if isinstance(item, Probe)}

    def first(name: str) -> str:
        while (before := beyond.get(name)) is not None:
            name = before
        return name

    families: dict[str, list[Item]] = {}
    for item in items:
        families.setdefault(first(item.name), []).append(item)
    return list(families.values())


def _runner(probes: ProbeSet, graph: GraphInput, device: DeviceProfile) -> Run:
    engine = open_engine(probes.graph_path(graph), device=device)
    feeds = {graph.name: graph.value()}
    return lambda: engine.run(feeds)


def _cost(probe: Probe, samples: Mapping[str, Values]) -> PieceCost:
    """The time of one piece, round by round; noise can take that of a small one below 0."""
    beyond = 0.0 if probe.beyond is None else samples[probe.beyond]
    ms = (samples[probe.name] - beyond) / probe.count
    return PieceCost(
        probe=probe.name,
        piece=probe.piece,
        precision=probe.precision,
        ms=percentile_interval(ms, 50),
        samples_ms=tuple(round(float(value), 4) for value in ms),
        few=probe.few,
    )


def _step(progress: Progress | None, group: int, groups: int, rounds: int) -> Callable[[int], None]:
    def step(done: int) -> None:
        if progress is not None:
            progress(group * rounds + done, groups * rounds)

    return step


FEWEST_SHARED = 3
_SLOPE_PULL = 1.0  # squared logarithms of cost, as if so much of slope 1 had been seen
_LEVEL_PULL = 0.5  # pieces, as if so many had been seen on the line of all pieces
_LEAST_MS = 1e-4
_LIKE: dict[Kind, str] = {
    "image-stem": "stem",
    "conv-stem": "stem",
    "image-block": "block",
    "text-block": "block",
    "image-last": "last",
    "text-last": "last",
    "conv-block": "conv",
    "conv-down": "conv",
    "conv-head": "last",
}

Key = tuple[Piece, Precision]
Pair = tuple[str, float, float]  # what it is like; logarithms of both costs


@dataclass(frozen=True, slots=True)
class _Line:
    """log cost there = level + slope x (log cost here - centre)."""

    centre: float
    level: float
    slope: float

    def __call__(self, here: float) -> float:
        return self.level + self.slope * (here - self.centre)


def carry_over(source: MeasuredDevice, few: MeasuredDevice) -> MeasuredDevice:
    """The device of `few` with a cost for every piece of `source`.

    What `few` measured stays as it is. A precision of which it measured nothing is not carried
    over: it may compute it another way, or not at all.

    Raises:
        InputError: the two share fewer than `FEWEST_SHARED` pieces.
    """
    there = {(cost.piece, cost.precision): cost for cost in few.costs}
    here = {(cost.piece, cost.precision): cost for cost in source.costs}
    shared = [key for key in there if key in here]
    pairs = [_pair(here[key], there[key]) for key in shared]
    if len(pairs) < FEWEST_SHARED:
        raise InputError(
            f"{few.name!r} shares {len(pairs)} pieces with {source.name!r}, at least "
            f"{FEWEST_SHARED} are needed: measure the same probes on both"
        )
    lines = _lines(pairs)
    errors = [abs(math.expm1(_left_out(pairs, at))) for at in range(len(pairs))]
    carried = [
        _moved(cost, lines)
        for key, cost in here.items()
        if key not in there and cost.precision in few.precisions
    ]
    return replace(
        few,
        costs=(*few.costs, *carried),
        carried=Carried(
            source=source.name,
            probes=len(pairs),
            error=float(np.median(errors)),
            worst=max(errors),
        ),
    )


def _pair(here: PieceCost, there: PieceCost) -> Pair:
    return _like(here), _log(here), _log(there)


def _like(cost: PieceCost) -> str:
    return f"{_LIKE[cost.piece.kind]} {cost.precision}"


def _log(cost: PieceCost) -> float:
    return math.log(max(cost.ms.value, _LEAST_MS))


def _lines(pairs: Sequence[Pair]) -> dict[str, _Line]:
    """A line for each likeness, and one of all under the empty name."""
    everything = _line([(x, y) for _, x, y in pairs], None)
    names = {name for name, _, _ in pairs}
    return {"": everything} | {
        name: _line([(x, y) for other, x, y in pairs if other == name], everything)
        for name in names
    }


def _line(points: Sequence[tuple[float, float]], general: _Line | None) -> _Line:
    x, y = np.array(points).T
    centre = float(x.mean())
    slope_wanted = 1.0 if general is None else general.slope
    spread, common = float(((x - centre) ** 2).sum()), float(((x - centre) * (y - y.mean())).sum())
    slope = (common + _SLOPE_PULL * slope_wanted) / (spread + _SLOPE_PULL)
    level = float(y.mean())
    if general is not None:
        level = (level * len(x) + _LEVEL_PULL * general(centre)) / (len(x) + _LEVEL_PULL)
    return _Line(centre, level, max(0.0, slope))


def _left_out(pairs: Sequence[Pair], at: int) -> float:
    """Logarithmic error of one pair from the lines of the others."""
    name, here, there = pairs[at]
    lines = _lines([pair for other, pair in enumerate(pairs) if other != at])
    return lines.get(name, lines[""])(here) - there


def _moved(cost: PieceCost, lines: dict[str, _Line]) -> PieceCost:
    ms = math.exp(lines.get(_like(cost), lines[""])(_log(cost)))
    return replace(cost, ms=Interval(ms, ms, ms), samples_ms=(), few=False)


def measured_table(measured: MeasuredDevice) -> str:
    """A line for each piece that was measured, and for each whole tower; then what to beware of."""
    lines = [f"{measured.name}: {measured.machine.cpu}, {measured.device.threads} threads", ""]
    lines.append(f"{'piece':<12}{'precision':<10}{'width':>6}{'positions':>10}{'ms':>10}  interval")
    lines += [_table_line(cost) for cost in measured.costs if cost.samples_ms]
    lines += ["", *_checks(measured)]
    if measured.carried is not None:
        carried = measured.carried
        lines.append(
            f"The rest was carried over from {carried.source}: {carried.probes} pieces were "
            f"measured on both, and tell each other within {carried.error:.0%} (median; worst "
            f"{carried.worst:.0%})."
        )
    found = measured.interference
    if found is not None and found.disturbed:
        lines.append(f"DISTURBED: {'; '.join(found.reasons)}. Measure again on a quiet machine.")
    return "\n".join(lines)


def _table_line(cost: PieceCost) -> str:
    piece, ms = cost.piece, cost.ms
    return (
        f"{piece.kind:<12}{cost.precision:<10}{piece.width:>6}{piece.positions:>10}"
        f"{ms.value:>10.4f}  [{ms.low:.4f}, {ms.high:.4f}]"
    )


def _checks(measured: MeasuredDevice) -> list[str]:
    predictor = Predictor(measured)
    lines = []
    for precision in measured.precisions:
        found = predictor.checks(precision)
        if not found:
            continue
        errors = [abs(predicted / ms - 1) for predicted, ms in found]
        towers = "tower" if len(errors) == 1 else "towers"
        lines.append(
            f"{len(errors)} whole {towers} in {precision}: predicted within "
            f"{statistics.median(errors):.1%} (median; worst {max(errors):.1%})"
        )
    return lines
