"""What tells energy: counters that only rise, and power that must be asked for again and again."""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edgeclip.runtime.errors import EdgeClipError

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
