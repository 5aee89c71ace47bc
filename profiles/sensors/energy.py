"""Energy of a run, from RAPL, NVML, or a Jetson's power monitor."""

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
from edgeclip.profiles.sensors.clocks import listing, read_line, read_number
from edgeclip.profiles.sensors.nvml import NvmlGpu, this_gpu
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.quality.intervals import bootstrap

_PATIENCE_S = 0.5  # the slowest counter, a GPU's, moves about ten times a second


class MeterError(EdgeClipError):
    """A sensor of energy that cannot be read, or tells what cannot be."""


class EnergyMeter(Protocol):
    """A sensor of energy, with whatever else it covers while it is read.

    Attributes:
        name: such as "RAPL packages".
        covers: what it counts, such as "processor packages".
        least_s: of shorter times than this it tells little.
    """

    @property
    def name(self) -> str: ...

    @property
    def covers(self) -> str: ...

    @property
    def least_s(self) -> float: ...

    def joules_during(self, work: Callable[[], object]) -> float:
        """Do `work`, and tell the energy that went by meanwhile.

        Raises:
            MeterError: the sensor cannot be read.
            Exception: whatever `work` raises.
        """


@dataclass(frozen=True, slots=True)
class Counter:
    """One counter: how to read it, and where it starts again at 0; None if it never does."""

    read: Callable[[], int]
    range: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedEnergy:
    """An `EnergyMeter` of counters that are added up.

    Attributes:
        counters: at least one; must be read before they start again twice.
        per_joule: how much they count in a joule.
    """

    name: str
    covers: str
    least_s: float
    counters: tuple[Counter, ...]
    per_joule: float

    def joules_during(self, work: Callable[[], object]) -> float:
        """See `EnergyMeter`."""
        before = self._read()
        work()
        pairs = zip(self.counters, before, self._read(), strict=True)
        return sum(self._spent(*each) for each in pairs) / self.per_joule

    def moves(self, patience_s: float = _PATIENCE_S) -> bool:
        """Whether it counts at all; in many virtual machines it is there, and stands still."""
        before, end = self._read(), time.monotonic() + patience_s
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

    def _spent(self, counter: Counter, before: int, after: int) -> int:
        if counter.range is not None:
            return (after - before) % counter.range
        if after < before:
            raise MeterError(f"{self.name} fell from {before} to {after}: measure again")
        return after - before


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledPower:
    """An `EnergyMeter` of a sensor that tells power: a thread asks it, and the mean counts.

    Attributes:
        watts: asks once.
        period_s: between two questions.
    """

    name: str
    covers: str
    least_s: float
    watts: Callable[[], float]
    period_s: float

    def joules_during(self, work: Callable[[], object]) -> float:
        """See `EnergyMeter`."""
        samples, failures, ended = [self._sample()], list[MeterError](), threading.Event()

        def ask() -> None:
            try:
                while not ended.wait(self.period_s):
                    samples.append(self._sample())
            except MeterError as error:
                failures.append(error)

        thread = threading.Thread(target=ask, name="power samples", daemon=True)
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
        """When, in seconds, and how many watts."""
        began = time.perf_counter()
        try:
            watts = self.watts()
        except (OSError, ValueError) as error:
            raise MeterError(f"{self.name} cannot be read: {error}") from error
        return (began + time.perf_counter()) / 2, watts


def mean_over_time(samples: list[tuple[float, float]]) -> float:
    """The mean of (time, value), at least two of them in order, by the trapezoidal rule."""
    area = sum(
        (end - start) * (first + last) / 2
        for (start, first), (end, last) in itertools.pairwise(samples)
    )
    return area / (samples[-1][0] - samples[0][0])


_JETSON_LEAST_S = 0.5
_JETSON_PERIOD_S = 0.02  # a reading takes about a millisecond on the bus
# Rails that are the whole module together, the first that are all there.
_MODULES = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)

Rail = tuple[Path, Path]  # files of millivolts and milliamperes


def jetson_meter(root: Path = Path("/")) -> SampledPower | str:
    """The module's power monitor, or why there is no such meter.

    Args:
        root: where `sys` is.
    """
    rails = _rails(root)
    if not rails:
        return "no INA3221 power monitor"
    names = next((names for names in _MODULES if rails.keys() >= set(names)), None)
    if names is None:
        return f"the INA3221 measures rails of an unknown board: {', '.join(sorted(rails))}"
    chosen = [rails[name] for name in names]
    try:
        now = _watts(chosen)
    except (OSError, ValueError) as error:
        return f"the INA3221 cannot be read: {error}"
    if now <= 0:
        return f"the INA3221 tells {now} W, which cannot be"
    return SampledPower(
        name=f"INA3221 {' + '.join(names)}",
        covers="module (CPU, GPU and memory)",
        least_s=_JETSON_LEAST_S,
        watts=lambda: _watts(chosen),
        period_s=_JETSON_PERIOD_S,
    )


def _rails(root: Path) -> dict[str, Rail]:
    """By label; channels without one, and the sums of channels, have no current of their own."""
    found = {}
    for chip in listing(root / "sys/class/hwmon", "hwmon*"):
        if read_line(chip / "name") != "ina3221":
            continue
        for number in (1, 2, 3):
            label = read_line(chip / f"in{number}_label")
            if label and label != "NC":  # not connected
                found[label] = (chip / f"in{number}_input", chip / f"curr{number}_input")
    return found


def _watts(rails: list[Rail]) -> float:
    """Millivolts times milliamperes are microwatts."""
    return sum(int(volts.read_text()) * int(amperes.read_text()) for volts, amperes in rails) / 1e6


T = TypeVar("T")
_COVERS = "GPU board"
_NVML_LEAST_S = 2.0  # the counter moves about ten times a second, the power is a mean of one second
_NVML_PERIOD_S = 0.05
_MILLIJOULES = 1e3


def nvml_meter(gpu: NvmlGpu | None) -> CountedEnergy | SampledPower | str:
    """The GPU's counter of energy, or else its power, or why there is neither."""
    if gpu is None:
        return "no NVIDIA GPU that NVML knows"
    if gpu.energy_mj() is not None:
        meter = CountedEnergy(
            name="NVML energy",
            covers=_COVERS,
            least_s=_NVML_LEAST_S,
            counters=(Counter(lambda: _known(gpu.energy_mj())),),
            per_joule=_MILLIJOULES,
        )
        if meter.moves():
            return meter
    if gpu.power_w():
        return SampledPower(
            name="NVML power",
            covers=_COVERS,
            least_s=_NVML_LEAST_S,
            watts=lambda: _known(gpu.power_w()),
            period_s=_NVML_PERIOD_S,
        )
    return "this GPU tells NVML neither energy nor power"


def _known(value: T | None) -> T:
    if value is None:
        raise ValueError("the driver no longer tells it")
    return value


_RAPL_LEAST_S = 0.2  # counters move about once a millisecond
_MICROJOULES = 1e6


def rapl_meter(root: Path = Path("/")) -> CountedEnergy | str:
    """The packages of this machine, or why there is no such meter.

    Other zones are left out: parts of a package (intel-rapl:0:0), and "psys", which holds the
    packages and more.

    Args:
        root: where `sys` is.
    """
    zones = listing(root / "sys/class/powercap", "intel-rapl:*")
    packages = [zone for zone in zones if (read_line(zone / "name") or "").startswith("package")]
    if not packages:
        return "no RAPL counters in /sys/class/powercap"
    counters = []
    for package in packages:
        limit = read_number(package / "max_energy_range_uj")
        counters.append(Counter(partial(_number, package / "energy_uj"), limit))
    return _checked("RAPL packages", "processor packages", counters, packages[0] / "energy_uj")


def amd_energy_meter(root: Path = Path("/")) -> CountedEnergy | str:
    """The sockets of this machine, or why there is no such meter.

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
    counters = [Counter(partial(_number, file)) for file in files]
    return _checked("amd_energy sockets", "processor packages", counters, files[0])


def _checked(name: str, covers: str, counters: list[Counter], file: Path) -> CountedEnergy | str:
    """The meter, if all its counters can be read and move."""
    try:
        for counter in counters:
            counter.read()
    except PermissionError:
        return f"{name} may not be read: run as root, or let others read {file}"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    meter = CountedEnergy(
        name=name,
        covers=covers,
        least_s=_RAPL_LEAST_S,
        counters=tuple(counters),
        per_joule=_MICROJOULES,
    )
    return meter if meter.moves() else f"{name} stand still, as in many virtual machines"


def _number(file: Path) -> int:
    return int(file.read_text())


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
