"""Measure every stage of every plan on this machine: the stages take turns, round by round."""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.machine import detect_machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.measuring.interleave import round_order
from edgeclip.runtime.planning.cut_set import WEIGHTS_NAME, CutPoint, CutSet
from edgeclip.runtime.planning.stage_times import Payload, StageSamples, StageTimes
from edgeclip.runtime.planning.stage_works import StageWork, StageWorks
from edgeclip.runtime.progress import Progress
from edgeclip.runtime.sensing.cpu_time import CpuSnapshot, CpuTime
from edgeclip.runtime.sensing.energy import find_meter, joules_of
from edgeclip.runtime.sensing.energy_meter import EnergyMeter

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile

# Of loaded halves at a time, in bytes of weights: the halves of one cut make one whole tower.
_MEMORY = 2**30
_WARM_ROUNDS = 5
_FEWEST_ROUNDS = 10


class StageSampler:
    """Runs stages in turn, once a round, and keeps how long each took.

    The order is rotated and reversed from round to round, so that each stage takes each place
    equally often.

    Args:
        works: the stages.
        pictures: how many there are; round i looks at picture i modulo that.
    """

    def __init__(self, works: Sequence[StageWork], pictures: int) -> None:
        self._works, self._pictures = works, pictures
        self._rounds: list[NDArray[np.float64]] = []

    def warm_up(self) -> None:
        """Run each stage a few times; the first run of a graph plans its memory."""
        for number in range(_WARM_ROUNDS):
            for work in self._works:
                work.run(number % self._pictures)

    def run_round(self) -> None:
        """Run each stage once."""
        number, times = len(self._rounds), np.empty(len(self._works))
        for place in round_order(len(self._works), number):
            start = time.perf_counter()
            self._works[place].run(number % self._pictures)
            times[place] = time.perf_counter() - start
        self._rounds.append(times)

    def samples(self, meter: EnergyMeter | None = None) -> list[StageSamples]:
        """What was measured in the rounds so far, at least one; energy where there is a meter."""
        return [
            StageSamples(
                stage=work.stage,
                ms=tuple(round(1e3 * float(value), 4) for value in column),
                joules=None if meter is None else joules_of(meter, functools.partial(work.run, 0)),
            )
            for work, column in zip(self._works, np.transpose(self._rounds), strict=True)
        ]


def measure_cuts(
    cuts: CutSet,
    *,
    device: "DeviceProfile",
    command: str,
    pictures: Sequence[Path] = (),
    rounds: int = 100,
    progress: Progress | None = None,
    altered: Callable[[StageWork], StageWork] = lambda work: work,
) -> StageTimes:
    """Measure all stages of both sides, what crosses, and what each codec costs.

    See `StageSampler`. Cuts are measured in groups whose weights fit into memory together.

    Args:
        cuts: what is measured.
        device: engine and threads.
        command: what the user typed, for the record.
        pictures: image files; those of the cut set by default.
        rounds: how many samples of each stage.
        progress: called after each round of each group.
        altered: puts another in the place of a stage, such as one for a slower device.

    Raises:
        InputError: no pictures, one that cannot be read, or fewer than 10 rounds.
        EngineError, CutSetError, MissingExtraError: see `CutHead`.
    """
    files = _files(cuts, pictures, rounds)
    all_works, meter = StageWorks(cuts, device, files), find_meter(device)
    payloads, stages = list[Payload](all_works.picture_payloads()), list[StageSamples]()
    groups = list(_groups(cuts))
    with _watched() as cpu:
        for number, group in enumerate(groups):
            works = list(all_works.of_pictures()) if number == 0 else []
            for point in group:
                made, crossing = all_works.of_cut(point)
                works += made
                payloads += crossing
            step = functools.partial(_step, progress, number, len(groups), rounds)
            stages += _sampled([*map(altered, works)], rounds, len(files), meter, step)
    denied, about = cpu[0], cuts.manifest
    return StageTimes(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=detect_machine(),
        device=device.name,
        bundle=about.bundle,
        space=about.space,
        precision=about.precision,
        rounds=rounds,
        pictures=len(files),
        stages=tuple(stages),
        payloads=tuple(payloads),
        waiting_share=denied.waiting_share,
        steal_share=denied.steal_share,
        contended=denied.contended,
        energy_sensor=None if meter is None else meter.name,
        on_cpu=device.on_cpu,
    )


def _files(cuts: CutSet, pictures: Sequence[Path], rounds: int) -> list[Path]:
    """The pictures to measure with, no more than there are rounds."""
    files = list(pictures or cuts.pictures)[:rounds]
    if not files:
        raise InputError(f"{cuts.path} has no pictures: give --pictures, a folder of some")
    if rounds < _FEWEST_ROUNDS:
        raise InputError(
            f"{rounds} rounds tell nothing of a 95th percentile: take {_FEWEST_ROUNDS} at least"
        )
    return files


def _sampled(
    works: Sequence[StageWork],
    rounds: int,
    pictures: int,
    meter: EnergyMeter | None,
    step: Callable[[int], None],
) -> list[StageSamples]:
    """Warm up, then run all rounds."""
    sampler = StageSampler(works, pictures)
    sampler.warm_up()
    for done in range(1, rounds + 1):
        sampler.run_round()
        step(done)
    return sampler.samples(meter)


def _groups(cuts: CutSet) -> Iterator[tuple[CutPoint, ...]]:
    """Cuts that are loaded together."""
    weights = next((f.bytes for f in cuts.manifest.files if f.path == WEIGHTS_NAME), 0)
    size = max(1, _MEMORY // max(1, weights))
    points = cuts.manifest.points
    for start in range(0, len(points), size):
        yield points[start : start + size]


@contextmanager
def _watched() -> Iterator[list[CpuTime]]:
    """Keep the garbage collector quiet; the list holds one entry when the block has ended."""
    found: list[CpuTime] = []
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    before = CpuSnapshot.take()
    began, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    try:
        yield found
    finally:
        if was_on:
            gc.enable()
    waiting, steal = CpuSnapshot.take().denied_since(before)
    found.append(
        CpuTime(
            wall_s=time.perf_counter() - began,
            thread_s=time.thread_time() - thread,
            process_s=time.process_time() - process,
            waiting_share=waiting,
            steal_share=steal,
        )
    )


def _step(progress: Progress | None, group: int, groups: int, rounds: int, done: int) -> None:
    if progress is not None:
        progress(group * rounds + done, groups * rounds)
