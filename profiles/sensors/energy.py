"""Measure the energy of a run with RAPL, amd_energy, NVML or a Jetson's INA3221 power monitor.

Sources: Linux's powercap and hwmon interfaces (Documentation/power/powercap, Documentation/hwmon),
NVIDIA's "NVML API Reference Guide", and the Jetson Linux Developer Guide for the names of rails.
"""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from edgeclip.profiles.record.measurement import Energy
from edgeclip.profiles.sensors.machine_state import listing, read_line, read_number
from edgeclip.profiles.sensors.nvml import NvmlGpu, this_gpu
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import estimate_mean

_ROOT = Path("/")
_FEWEST_BLOCKS = 3
_MOVES_WITHIN_S = 0.5  # the slowest counter, a GPU's, moves about ten times a second
_RAPL_LEAST_S = 0.2  # its counters move about once a millisecond
_NVML_LEAST_S = 2.0  # the counter moves about ten times a second, the power is a mean of one second
_NVML_PERIOD_S = 0.05
_JETSON_LEAST_S = 0.5
_JETSON_PERIOD_S = 0.02  # a reading takes about a millisecond on the bus
# The INA3221 rails that together supply a whole Jetson module; the first set that is complete.
_JETSON_MODULES = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
T = TypeVar("T")


class MeterError(EdgeClipError):
    """An energy sensor that cannot be read, or whose values are impossible."""


class EnergyMeter(Protocol):
    """An energy sensor.

    Attributes:
        name: such as "RAPL packages".
        covers: what it measures, such as "processor packages".
        least_s: the shortest time, in seconds, that it measures well.
    """

    @property
    def name(self) -> str: ...

    @property
    def covers(self) -> str: ...

    @property
    def least_s(self) -> float: ...

    def joules_during(self, work: Callable[[], object]) -> float:
        """Do `work` and return the energy spent meanwhile, in joules.

        Raises:
            MeterError: the sensor cannot be read.
            Exception: whatever `work` raises.
        """


@dataclass(frozen=True, slots=True)
class EnergyCounter:
    """One energy counter.

    Attributes:
        read: returns its value.
        range: where it starts again at 0; None if it never does.
    """

    read: Callable[[], int]
    range: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterMeter:
    """An `EnergyMeter` that adds up energy counters.

    Attributes:
        counters: at least one counter; none may start again twice between two readings.
        per_joule: counts in one joule.
    """

    name: str
    covers: str
    least_s: float
    counters: tuple[EnergyCounter, ...]
    per_joule: float

    def joules_during(self, work: Callable[[], object]) -> float:
        """Do `work` and return the energy that the counters rose by."""
        before = self._read()
        work()
        pairs = zip(self.counters, before, self._read(), strict=True)
        return sum(self._difference(*pair) for pair in pairs) / self.per_joule

    def moves(self, within_s: float = _MOVES_WITHIN_S) -> bool:
        """Tell whether any counter moves; in many virtual machines they are there, but stand still.

        Args:
            within_s: how long to wait for it, in seconds.
        """
        before, end = self._read(), time.monotonic() + within_s
        while time.monotonic() < end:
            time.sleep(0.005)
            if self._read() != before:
                return True
        return False

    def _read(self) -> list[int]:
        try:
            return [counter.read() for counter in self.counters]
        except (OSError, ValueError) as error:
            raise MeterError(f"{self.name} cannot be read: {error}") from error

    def _difference(self, counter: EnergyCounter, before: int, after: int) -> int:
        if counter.range is not None:
            return (after - before) % counter.range
        if after < before:
            raise MeterError(f"{self.name} fell from {before} to {after}: measure again")
        return after - before


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerMeter:
    """An `EnergyMeter` that samples a power sensor in a thread and integrates over time.

    Attributes:
        watts: reads the sensor once.
        period_s: time between two readings, in seconds.
    """

    name: str
    covers: str
    least_s: float
    watts: Callable[[], float]
    period_s: float

    def joules_during(self, work: Callable[[], object]) -> float:
        """Do `work` and return its duration times the mean power."""
        samples, failures, ended = [self._sample()], list[MeterError](), threading.Event()

        def sample_until_ended() -> None:
            try:
                while not ended.wait(self.period_s):
                    samples.append(self._sample())
            except MeterError as error:
                failures.append(error)

        thread = threading.Thread(target=sample_until_ended, name="power samples", daemon=True)
        thread.start()
        began = time.perf_counter()
        try:
            work()
        finally:
            seconds = time.perf_counter() - began
            ended.set()
            thread.join()
        if failures:
            raise failures[0]
        samples.append(self._sample())
        return seconds * mean_over_time(samples)

    def _sample(self) -> tuple[float, float]:
        """Return (time in seconds, power in watts)."""
        began = time.perf_counter()
        try:
            watts = self.watts()
        except (OSError, ValueError) as error:
            raise MeterError(f"{self.name} cannot be read: {error}") from error
        return (began + time.perf_counter()) / 2, watts


def mean_over_time(samples: list[tuple[float, float]]) -> float:
    """Average at least two ordered (time, value) pairs by the trapezoidal rule."""
    area = sum(
        (end - start) * (first + last) / 2
        for (start, first), (end, last) in itertools.pairwise(samples)
    )
    return area / (samples[-1][0] - samples[0][0])


def find_meter(
    device: DeviceProfile, root: Path = _ROOT, *, gpu: NvmlGpu | None = None
) -> EnergyMeter | None:
    """Return the meter of `meter_or_reason`, or None if there is none."""
    found = meter_or_reason(device, root, gpu=gpu)
    return None if isinstance(found, str) else found


def meter_or_reason(
    device: DeviceProfile, root: Path = _ROOT, *, gpu: NvmlGpu | None = None
) -> EnergyMeter | str:
    """Find the energy sensor for what `device` runs its towers on, or say why there is none.

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


def rapl_meter(root: Path = _ROOT) -> CounterMeter | str:
    """Find the RAPL counters of the processor packages, or say why there are none.

    Other zones are left out: parts of a package (intel-rapl:0:0), and "psys", which holds the
    packages and more.

    Args:
        root: where `sys` is.
    """
    zones = listing(root / "sys/class/powercap", "intel-rapl:*")
    packages = [zone for zone in zones if (read_line(zone / "name") or "").startswith("package")]
    if not packages:
        return "no RAPL counters in /sys/class/powercap"
    files = [package / "energy_uj" for package in packages]
    ranges = [read_number(package / "max_energy_range_uj") for package in packages]
    return _microjoule_meter("RAPL packages", files, ranges)


def amd_energy_meter(root: Path = _ROOT) -> CounterMeter | str:
    """Find the amd_energy counters of the processor sockets, or say why there are none.

    Args:
        root: where `sys` is.
    """
    files = [
        chip / label.name.replace("_label", "_input")
        for chip in listing(root / "sys/class/hwmon", "hwmon*")
        if read_line(chip / "name") == "amd_energy"
        for label in listing(chip, "energy*_label")
        if (read_line(label) or "").startswith("Esocket")
    ]
    if not files:
        return "no amd_energy sensor"
    return _microjoule_meter("amd_energy sockets", files, [None] * len(files))


def _microjoule_meter(name: str, files: list[Path], ranges: list[int | None]) -> CounterMeter | str:
    """Make a meter of counters in microjoules, if all of them can be read and any moves."""
    counters = [
        EnergyCounter(partial(_read_integer, file), limit)
        for file, limit in zip(files, ranges, strict=True)
    ]
    try:
        for counter in counters:
            counter.read()
    except PermissionError:
        return f"{name} may not be read: run as root, or let others read {files[0]}"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    meter = CounterMeter(
        name=name,
        covers="processor packages",
        least_s=_RAPL_LEAST_S,
        counters=tuple(counters),
        per_joule=1e6,
    )
    return meter if meter.moves() else f"{name} stand still, as in many virtual machines"


def _read_integer(file: Path) -> int:
    return int(file.read_text())


def nvml_meter(gpu: NvmlGpu | None) -> CounterMeter | PowerMeter | str:
    """Return a meter of the GPU's energy counter, or else of its power, or why there is neither."""
    if gpu is None:
        return "no NVIDIA GPU that NVML knows"
    if gpu.energy_mj() is not None:
        meter = CounterMeter(
            name="NVML energy",
            covers="GPU board",
            least_s=_NVML_LEAST_S,
            counters=(EnergyCounter(lambda: _still_reported(gpu.energy_mj())),),
            per_joule=1e3,
        )
        if meter.moves():
            return meter
    if gpu.power_w():
        return PowerMeter(
            name="NVML power",
            covers="GPU board",
            least_s=_NVML_LEAST_S,
            watts=lambda: _still_reported(gpu.power_w()),
            period_s=_NVML_PERIOD_S,
        )
    return "this GPU reports neither energy nor power to NVML"


def _still_reported(value: T | None) -> T:
    if value is None:
        raise ValueError("the driver no longer reports it")
    return value


def jetson_meter(root: Path = _ROOT) -> PowerMeter | str:
    """Return a meter of a Jetson module's INA3221 power monitor, or why there is none.

    Args:
        root: where `sys` is.
    """
    rails = _jetson_rails(root)
    if not rails:
        return "no INA3221 power monitor"
    names = next((names for names in _JETSON_MODULES if rails.keys() >= set(names)), None)
    if names is None:
        return f"the INA3221 measures rails of an unknown board: {', '.join(sorted(rails))}"

    def watts() -> float:
        microwatts = 0
        for millivolts, milliamperes in (rails[name] for name in names):
            microwatts += int(millivolts.read_text()) * int(milliamperes.read_text())
        return microwatts / 1e6

    try:
        now = watts()
    except (OSError, ValueError) as error:
        return f"the INA3221 cannot be read: {error}"
    if now <= 0:
        return f"the INA3221 reads {now} W, which is impossible"
    return PowerMeter(
        name=f"INA3221 {' + '.join(names)}",
        covers="module (CPU, GPU and memory)",
        least_s=_JETSON_LEAST_S,
        watts=watts,
        period_s=_JETSON_PERIOD_S,
    )


def _jetson_rails(root: Path) -> dict[str, tuple[Path, Path]]:
    """Find the files of (millivolts, milliamperes) of each rail by its label.

    Channels without a label are sums of others, and have no current of their own.
    """
    found = {}
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        if read_line(chip / "name") != "ina3221":
            continue
        for number in (1, 2, 3):
            label = read_line(chip / f"in{number}_label")
            if label and label != "NC":  # not connected
                found[label] = (chip / f"in{number}_input", chip / f"curr{number}_input")
    return found


def measure_energy(
    meter: EnergyMeter, run: Callable[[], object], *, seconds: float, blocks: int
) -> Energy:
    """Measure the energy of one call of `run`, idle power included, from blocks of calls.

    The idle power is read first, for as long as a block takes; a GPU that has just worked may not
    have calmed down by then. The interval is Student's t over the blocks, which are taken as
    independent: it does not hold what another process, or a warmer machine, would add.

    Args:
        meter: see `find_meter`.
        run: embeds one image or text; warmed up before.
        seconds: duration of all blocks together. Each lasts `meter.least_s` at least, and one call.
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
    joules = np.array([_joules_per_call(meter, run, each) for _ in range(blocks)])
    if joules.min() <= 0:
        raise MeterError(f"{meter.name} stood still while there was work to do")
    found = estimate_mean(joules).interval
    return Energy(
        sensor=meter.name,
        covers=meter.covers,
        joules=Interval(found.value, max(0.0, found.low), found.high),
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
    """Measure the energy of one call of `run` with the device's own sensor, or say why not.

    Args:
        device, root, gpu: see `meter_or_reason`.
        run, seconds, blocks: see `measure_energy`.

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


def joules_of(meter: EnergyMeter, run: Callable[[], object]) -> float | None:
    """Return the mean energy of one call of `run` from calls during `meter.least_s`.

    None if the sensor cannot be read, or stood still.
    """
    try:
        return _joules_per_call(meter, run, meter.least_s) or None
    except MeterError:
        return None


def _joules_per_call(meter: EnergyMeter, run: Callable[[], object], seconds: float) -> float:
    """Return the mean energy of a call, from calls for `seconds`, and from one at least."""
    calls = 0

    def work() -> None:
        nonlocal calls
        end = time.perf_counter() + seconds
        while calls == 0 or time.perf_counter() < end:
            run()
            calls += 1

    return meter.joules_during(work) / calls
