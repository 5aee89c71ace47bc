"""Time a set of probes on this machine, and take from them what each piece costs.

The probes take turns, round by round, so that a probe and the one that it is compared with meet
the same disturbances. In its turn each runs several times, and only the later runs count: in
service, too, a tower mostly runs after itself, and finds its weights where the run before left
them. Right after another graph a small tower takes up to a fifth longer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.machine import detect_machine
from edgeclip.runtime.engine import open_engine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.measuring.interleave import no_garbage_collection, round_order
from edgeclip.runtime.measuring.timing_statistics import percentile_interval
from edgeclip.runtime.predicting.measured_device import CheckTime, MeasuredDevice, PieceCost
from edgeclip.runtime.predicting.probe_set import CheckTower, GraphInput, Probe, ProbeSet
from edgeclip.runtime.progress import Progress
from edgeclip.runtime.sensing.interference import InterferenceWatch
from edgeclip.runtime.spec import Precision

FEWEST_ROUNDS = 5
_MEMORY = 2**30  # of loaded weights at a time, in bytes
_TURN_MS = 20.0  # that one turn should last
_FEWEST_RUNS, _MOST_RUNS = 4, 20  # in one turn
_WARM_RUNS = 3

Item = Probe | CheckTower
Run = Callable[[], object]
Samples = NDArray[np.float64]


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
    samples: dict[str, Samples] = {}
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
) -> dict[str, Samples]:
    """Load some probes and time them; their memory is free again when this returns."""
    runs = {item.name: _runner(probes, item.graph, device) for item in group}
    return time_in_turns(runs, rounds, step)


def time_in_turns(
    runs: Mapping[str, Run], rounds: int, step: Callable[[int], None] = lambda done: None
) -> dict[str, Samples]:
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


def _cost(probe: Probe, samples: Mapping[str, Samples]) -> PieceCost:
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
