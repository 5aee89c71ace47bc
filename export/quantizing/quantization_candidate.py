"""A candidate of the search: a config of one tower, what was measured of it, and its place."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from edgeclip.export.quantizing.config import Config, Float32, describe, key
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.quality.intervals import Interval

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


_VERSION = 3  # of how points are made and measured: a change counts it up

Made = TypeVar("Made", bound=JsonRecord)


class PointStore:
    """The records of one tower on one device, judged on the same data by the same bounds.

    Args:
        folder: where the files are.
        identity: everything beside the config that a point depends on.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def find(self, kind: type[Made], what: str) -> Made | None:
        """Return a record that is there; None if there is none, or none readable.

        Args:
            kind: its class, whose name is the beginning of the file's.
            what: tells it from others of its kind.
        """
        try:
            return kind.load(self._path(kind, what))
        except ConfigError:
            return None  # of another version, perhaps: it is made again

    def remember(self, kind: type[Made], what: str, make: Callable[[], Made]) -> Made:
        """Return a record that is there, or make it and keep it; for `kind` and `what` see `find`.

        Raises:
            InputError: the file cannot be written.
        """
        found = self.find(kind, what)
        if found is None:
            found = make()
            found.save(self._path(kind, what))
        return found

    def _path(self, kind: type[JsonRecord], what: str) -> Path:
        name = hashlib.sha256(f"{_VERSION}\n{self._identity}\n{what}".encode()).hexdigest()[:20]
        return self._folder / f"{kind.__name__.lower()}-{name}.json"


# Two engines with the same graph can differ by this much, by where their memory lies.
_SAME = 1.01


def ranked(points: Sequence[Point], fp32: Point) -> tuple[list[Point], str]:
    """Points that may be shipped, the best first, and why it is the best.

    Those whose times cannot be told apart follow each other by their mean cosine. Where no
    time was measured, what is inside its gates is ranked by its bytes, because the device
    itself will choose between it and other precisions.
    """
    inside = [point for point in points if point.passed and not isinstance(point.config, Float32)]
    if not inside:
        return [], "nothing else is inside its gates"
    if fp32.latency is None:
        smallest = sorted(inside, key=lambda point: point.bytes)
        return smallest, "smallest inside its gates; no time was measured, this is not the device"
    faster = [point for point in inside if (point.sure_ratio or 1.0) < 1]
    if not faster:
        return [], "nothing inside its gates is surely faster than fp32"
    return _by_time(faster), "fastest inside its gates"


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that no other beats in both time and mean cosine, the fastest first.

    Bytes stand in for time where none was measured. What gives no usable embedding is left
    out.
    """
    usable = [point for point in points if point.cosine is not None]
    front: list[Point] = []
    for point in sorted(usable, key=lambda item: (_cost(item), -_cosine(item))):
        if not front or _cosine(point) > _cosine(front[-1]):
            front.append(point)
    return tuple(front)


def _by_time(points: Sequence[Point]) -> list[Point]:
    left = sorted(points, key=_cost)
    ordered: list[Point] = []
    while left:
        alike = [point for point in left if _cost(point) <= _SAME * _cost(left[0])]
        best = max(alike, key=_cosine)
        ordered.append(best)
        left.remove(best)
    return ordered


def _cost(point: Point) -> float:
    return float(point.bytes) if point.ratio is None else point.ratio


def _cosine(point: Point) -> float:
    return -1.0 if point.cosine is None else point.cosine.value
