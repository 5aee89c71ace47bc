"""A point of a search: one config of a tower, and what was measured of it."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from edgeclip.export.quantizing.config import Config, describe, key
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.manifest import GateRecord

# How the gates' names begin.
MEAN_COSINE, P1_COSINE = "mean cosine", "1st-percentile cosine"
R1_LOSS, ZERO_SHOT_LOSS = "R@1 loss", "zero-shot top-1 loss"


key_of = functools.lru_cache(maxsize=4096)(key)  # asked for again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class PointLatency:
    """Time of one call at batch 1 on the device, taken in turns with fp32.

    Attributes:
        ratio: to fp32's time.
        ms: of one call.
        reference_ms: of one call of fp32, in the same rounds.
        contended: other programs took the processor meanwhile.
    """

    ratio: Interval
    ms: Interval
    reference_ms: Interval
    contended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(JsonRecord):
    """A config, and what came of it.

    Attributes:
        config: what was tried.
        bytes: of the graph and its weights.
        latency: None where this machine is not the device.
        records: its gates, on pairs that ranges were not found on, and never on the test pairs.
        seconds: that making and measuring it took.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a point"
    MEND: ClassVar[str] = "delete it and search again"

    config: Config
    bytes: int
    latency: PointLatency | None
    records: tuple[GateRecord, ...]
    seconds: float

    @property
    def key(self) -> str:
        """What tells its config from any other."""
        return key_of(self.config)

    @property
    def name(self) -> str:
        """What a person calls it."""
        return describe(self.config)

    @property
    def passed(self) -> bool:
        """Whether it is inside all gates."""
        return all(record.passed for record in self.records)

    @property
    def cosine(self) -> Interval | None:
        """Mean cosine with fp32; None where no embedding is usable."""
        return measured(self.records, MEAN_COSINE)

    @property
    def p1_cosine(self) -> Interval | None:
        """The 1st percentile of the cosines; None where no embedding is usable."""
        return measured(self.records, P1_COSINE)

    @property
    def zero_shot_loss(self) -> Interval | None:
        """Zero-shot accuracy that is lost, in points of 100; None where it was not judged."""
        return measured(self.records, ZERO_SHOT_LOSS)

    @property
    def r1_loss(self) -> Interval | None:
        """R@1 that is lost, in points of 100; None where no embedding is usable."""
        return measured(self.records, R1_LOSS)

    @property
    def sure_ratio(self) -> float | None:
        """The upper end of its ratio to fp32's time, if that was measured."""
        return None if self.latency is None else self.latency.ratio.high

    @property
    def ratio(self) -> float | None:
        """Its ratio to fp32's time, if that was measured."""
        return None if self.latency is None else self.latency.ratio.value


def measured(records: tuple[GateRecord, ...], name: str) -> Interval | None:
    """Return the value and the interval of the gate whose name begins so."""
    for record in records:
        if record.name.startswith(name):
            return Interval(record.value, record.low, record.high)
    return None
