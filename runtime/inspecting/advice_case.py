"""What rules of advice start from, and what they give."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.machine import Machine
from edgeclip.runtime.inspecting.roofline import Roofline
from edgeclip.runtime.inspecting.roofline_distance import LayerDistance
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.measurement import Measurement, MeasurementRun, SweepPoint
from edgeclip.runtime.spec import Precision

Gains = Literal["certainty", "latency", "throughput", "processor time", "start"]
NOISE = 1.1  # of a roof; what is above that is not held by it
_NEARLY_ALL = 0.999  # a share of 1 would promise an endless gain
_FEW = 0.05  # of the time of all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing to try next.

    Attributes:
        topic: of the rule, such as "threads".
        what: to do, one sentence with the command or setting that does it.
        evidence: the figures that say so.
        gains: what becomes better.
        at_most: how many times better, a bound and no promise; None where there is none.
    """

    topic: str
    what: str
    evidence: str
    gains: Gains
    at_most: float | None

    @property
    def saves(self) -> float:
        """The largest share of what there is now that can be saved, 0 to 1."""
        return 0.0 if self.at_most is None else max(0.0, 1 - 1 / self.at_most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A measurement with what is known around it; see `advise`."""

    measurement: Measurement
    roofline: Roofline | None
    distances: tuple[LayerDistance, ...]
    device: DeviceProfile
    machine: Machine
    run: MeasurementRun

    @property
    def precision(self) -> Precision | None:
        """What ran; None for a file of someone else's."""
        identity = self.measurement.identity
        return None if identity is None else identity.precision

    @property
    def threads(self) -> int:
        """Of the engine."""
        identity = self.measurement.identity
        return self.device.threads if identity is None else identity.threads

    def alone(self) -> SweepPoint | None:
        """Batch 1 with the threads of the measurement."""
        return next((item for item in self.by_batch() if item.batch == 1), None)

    def by_batch(self) -> list[SweepPoint]:
        """The sweep with the threads of the measurement."""
        sweep = self.measurement.sweep
        same = [item for item in sweep if item.threads == self.threads]
        return same or [item for item in sweep if item.threads is None]

    def by_threads(self) -> list[SweepPoint]:
        """The sweep at batch 1, where its threads are known."""
        return [item for item in self.measurement.sweep if item.batch == 1 and item.threads]

    def siblings(self) -> list[Measurement]:
        """The same part of the same bundle on the same engine in other precisions."""
        own = self.measurement.identity
        if own is None or own.precision is None:
            return []
        return [
            item
            for item in self.run.measurements
            if item.part == self.measurement.part
            and (found := item.identity) is not None
            and found.precision not in (None, own.precision)
            and (found.sha256, found.engine, found.threads) == (own.sha256, own.engine, own.threads)
            and (item.part != "text" or item.input_shape == self.measurement.input_shape)
        ]

    def measured_precisions(self) -> set[Precision | None]:
        """Of the siblings."""
        return {item.identity.precision for item in self.siblings() if item.identity}

    def above_the_roof(self) -> float | None:
        """How much faster than the peak layers computed, as a factor; None if they did not.

        Nothing computes faster than the peak, so it was measured while something disturbed it.
        """
        above = [
            item for item in self.distances if item.limit == "compute" and (item.share or 0) > NOISE
        ]
        if share_of_time(above) < _FEW:
            return None
        return max(item.share or 0 for item in above)


def amdahl(share: float, times: float = float("inf")) -> float:
    """How many times faster all becomes when `share` of it becomes `times` as fast.

    Source: Amdahl, "Validity of the single processor approach to achieving large scale
    computing capabilities", AFIPS 1967.
    """
    share = min(share, _NEARLY_ALL)
    return 1 / (1 - share + share / times)


def share_of_time(layers: Iterable[LayerDistance]) -> float:
    """Of the whole tower."""
    return sum(layer.share_of_time for layer in layers)


def percent(share: float) -> str:
    """0.413 is "41%"."""
    return f"{100 * share:.0f}%"


def span(value: Interval, unit: str = "") -> str:
    """ "1.43 [1.40, 1.47] ms"."""
    return f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]{unit and ' ' + unit}"
