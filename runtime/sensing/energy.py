"""Energy of one run: which sensor tells it on a device, and how it is measured."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.intervals import bootstrap
from edgeclip.runtime.measuring.measurement import Energy
from edgeclip.runtime.sensing.energy_jetson import jetson_meter
from edgeclip.runtime.sensing.energy_meter import EnergyMeter, MeterError
from edgeclip.runtime.sensing.energy_nvml import nvml_meter
from edgeclip.runtime.sensing.energy_rapl import amd_energy_meter, rapl_meter
from edgeclip.runtime.sensing.nvml import NvmlGpu, this_gpu

_ROOT = Path("/")
_FEWEST_BLOCKS = 3


def find_meter(
    device: DeviceProfile, root: Path = _ROOT, *, gpu: NvmlGpu | None = None
) -> EnergyMeter | None:
    """The sensor for what `device` runs its towers on; None if none can be read here."""
    found = meter_or_reason(device, root, gpu=gpu)
    return None if isinstance(found, str) else found


def meter_or_reason(
    device: DeviceProfile, root: Path = _ROOT, *, gpu: NvmlGpu | None = None
) -> EnergyMeter | str:
    """The same, or why there is none, for a person.

    For an engine on a GPU that is the GPU's board, for one on the CPU the processor's packages.
    On a Jetson it is the whole module for both.

    Args:
        device: its engine decides.
        root: where `sys` is: another one than `/` for a copy of a machine's.
        gpu: the first one of this machine by default, where `root` is its own.
    """
    if gpu is None and root == _ROOT and not device.on_cpu:
        gpu = this_gpu()
    sources: list[Callable[[], EnergyMeter | str]] = [partial(nvml_meter, gpu)]
    if device.on_cpu:
        sources = [partial(rapl_meter, root), partial(amd_energy_meter, root)]
    sources.append(partial(jetson_meter, root))
    reasons = []
    for source in sources:
        found = source()
        if not isinstance(found, str):
            return found
        reasons.append(found)
    return "; ".join(reasons)


def joules_of(meter: EnergyMeter, run: Callable[[], object]) -> float | None:
    """Energy of one call of `run`, idle power included, from calls for some time.

    None where the sensor fell silent or stood still.
    """
    try:
        return _joules_each(meter, run, meter.least_s) or None
    except MeterError:
        return None


def measure_energy(
    meter: EnergyMeter, run: Callable[[], object], *, seconds: float, blocks: int
) -> Energy:
    """Energy of one call of `run`, idle power included, from blocks of calls.

    Before them the same sensor is read for as long as a block takes while nothing is done; a GPU
    that has just worked may not have calmed down by then. The interval is that of the mean of the
    blocks, drawn with replacement.

    Args:
        meter: see `find_meter`.
        run: embeds one image or text; warmed up before.
        seconds: of all blocks together. Each lasts `meter.least_s` at least, and one call.
        blocks: 3 at least, and better 10: intervals of few are too narrow.

    Raises:
        InputError: too few blocks.
        MeterError: the sensor cannot be read, or stands still.
        Exception: whatever `run` raises.
    """
    if blocks < _FEWEST_BLOCKS:
        raise InputError(f"{blocks} blocks tell no interval of energy: take {_FEWEST_BLOCKS}")
    each = max(seconds / blocks, meter.least_s)
    began = time.perf_counter()
    idle = meter.joules_during(lambda: time.sleep(each))
    idle_watts = idle / (time.perf_counter() - began)
    joules = np.array([_joules_each(meter, run, each) for _ in range(blocks)])
    if joules.min() <= 0:
        raise MeterError(f"{meter.name} stood still while there was work to do")
    return Energy(
        sensor=meter.name,
        covers=meter.covers,
        joules=bootstrap(joules),
        idle_watts=idle_watts if idle_watts > 0 else None,
    )


def energy_or_reason(
    device: DeviceProfile,
    run: Callable[[], object],
    *,
    seconds: float,
    blocks: int,
    root: Path = _ROOT,
    gpu: NvmlGpu | None = None,
) -> Energy | str:
    """`measure_energy` with the device's own sensor, or why there is none, for a person.

    Raises:
        InputError: too few blocks.
        Exception: whatever `run` raises.
    """
    meter = meter_or_reason(device, root, gpu=gpu)
    if isinstance(meter, str):
        return meter
    try:
        return measure_energy(meter, run, seconds=seconds, blocks=blocks)
    except MeterError as error:
        return str(error)


def _joules_each(meter: EnergyMeter, run: Callable[[], object], seconds: float) -> float:
    """Mean energy of a call, from calls for `seconds`, and from one at least."""
    calls = 0

    def work() -> None:
        nonlocal calls
        end = time.perf_counter() + seconds
        while calls == 0 or time.perf_counter() < end:
            run()
            calls += 1

    return meter.joules_during(work) / calls
