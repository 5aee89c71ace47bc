"""A candidate of the quantization search: its config, its measurements, and its ranking."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from edgeclip.export.quantizing.config import Config, Float32, describe, key
from edgeclip.profiles.record.timing_statistics import (
    RatioEstimate,
    estimate_mean_log,
    surely_below,
)
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.stats.interval import Interval

# How the gates' names begin.
MEAN_COSINE, P1_COSINE = "mean cosine", "1st-percentile cosine"
R1_LOSS, ZERO_SHOT_LOSS = "R@1 loss", "zero-shot top-1 loss"

_VERSION = 5  # of how candidates are made and measured: a change counts it up
_TIE = 1.01  # two engines with the same graph can differ by this much, by their memory layout

RecordT = TypeVar("RecordT", bound=JsonRecord)

key_of = functools.lru_cache(maxsize=4096)(key)  # the same configs are asked for many times


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateLatency:
    """Time of one call at batch 1 on the device, interleaved with calls of fp32.

    Attributes:
        load_ratios: its time / fp32's time, the median over the rounds of each load of both.
        ms: median milliseconds of one call.
        reference_ms: median milliseconds of one call of fp32, in the same rounds.
        contended: other programs used the processor during the measurement.
    """

    load_ratios: tuple[float, ...]
    ms: Interval
    reference_ms: Interval
    contended: bool

    @property
    def estimate(self) -> RatioEstimate:
        """The ratio over loads; of a single load nothing is shown."""
        return estimate_mean_log(np.array(self.load_ratios))

    @property
    def ratio(self) -> Interval:
        """The ratio over loads with its 95% interval."""
        return self.estimate.interval


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationCandidate(JsonRecord):
    """A config with its size, latency and gates.

    Attributes:
        config: what was tried.
        bytes: size of the graph and its weights.
        latency: None where this machine is not the device.
        records: its gates on the steering pairs: neither calibration nor test pairs.
        seconds: that making and measuring it took.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a candidate"
    HINT: ClassVar[str] = "delete it and search again"

    config: Config
    bytes: int
    latency: CandidateLatency | None
    records: tuple[GateRecord, ...]
    seconds: float

    @property
    def key(self) -> str:
        """The key of its config."""
        return key_of(self.config)

    @property
    def name(self) -> str:
        """The description of its config."""
        return describe(self.config)

    @property
    def passed(self) -> bool:
        """Whether it is inside all gates on the steering pairs, which decide what is tried."""
        return all(record.is_inside for record in self.records)

    @property
    def cosine(self) -> Interval | None:
        """Mean cosine with fp32; None where no embedding is usable."""
        return gate_interval(self.records, MEAN_COSINE)

    @property
    def p1_cosine(self) -> Interval | None:
        """The 1st percentile of the cosines; None where no embedding is usable."""
        return gate_interval(self.records, P1_COSINE)

    @property
    def zero_shot_loss(self) -> Interval | None:
        """Loss of zero-shot accuracy in percentage points; None where it was not judged."""
        return gate_interval(self.records, ZERO_SHOT_LOSS)

    @property
    def r1_loss(self) -> Interval | None:
        """Loss of R@1 in percentage points; None where no embedding is usable."""
        return gate_interval(self.records, R1_LOSS)

    @property
    def ratio(self) -> float | None:
        """Its ratio to fp32's time, if that was measured."""
        return None if self.latency is None else self.latency.ratio.value


def gate_interval(records: tuple[GateRecord, ...], name: str) -> Interval | None:
    """Return the value and the interval of the gate whose name begins with `name`."""
    for record in records:
        if record.name.startswith(name):
            return Interval(record.value, record.low, record.high)
    return None


class RecordStore:
    """Keep the records of one tower on one device in files.

    Args:
        folder: where the files are.
        identity: everything beside the config that a record depends on.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def load(self, kind: type[RecordT], what: str) -> RecordT | None:
        """Return a stored record; None if there is none, or none readable.

        Args:
            kind: its class, which gives the file's name its first word.
            what: identifies it among others of its kind.
        """
        try:
            return kind.load(self._path(kind, what))
        except ConfigError:
            return None  # of another version, perhaps: it is made again

    def load_or_make(self, kind: type[RecordT], what: str, make: Callable[[], RecordT]) -> RecordT:
        """Return a stored record, or make it and store it; for `kind` and `what` see `load`.

        Raises:
            InputError: the file cannot be written.
        """
        record = self.load(kind, what)
        if record is None:
            record = make()
            record.save(self._path(kind, what))
        return record

    def _path(self, kind: type[JsonRecord], what: str) -> Path:
        name = hashlib.sha256(f"{_VERSION}\n{self._identity}\n{what}".encode()).hexdigest()[:20]
        prefix = kind.__name__.removeprefix("Quantization").lower()
        return self._folder / f"{prefix}-{name}.json"


def rank_shippable(
    candidates: Sequence[QuantizationCandidate], fp32: QuantizationCandidate
) -> tuple[list[QuantizationCandidate], str]:
    """Rank the candidates that may be shipped, the best first, and say why it is the best.

    They must pass their gates and be surely faster than fp32, all of them together with 97.5%.
    Candidates within 1% of the fastest are ranked by their mean cosine. Where no time was
    measured, they are ranked by bytes, because
    the device itself will choose between precisions.
    """
    passing = [item for item in candidates if item.passed and not isinstance(item.config, Float32)]
    if not passing:
        return [], "nothing else is inside its gates"
    if fp32.latency is None:
        smallest = sorted(passing, key=lambda item: item.bytes)
        return smallest, "smallest inside its gates; no time was measured, this is not the device"
    timed = [(item, item.latency.estimate) for item in passing if item.latency is not None]
    faster = surely_below([ratio for _, ratio in timed])
    left = sorted(
        (item for (item, _), is_faster in zip(timed, faster, strict=True) if is_faster), key=_cost
    )
    if not left:
        return [], "nothing inside its gates is surely faster than fp32"
    ranked: list[QuantizationCandidate] = []
    while left:
        tied = [item for item in left if _cost(item) <= _TIE * _cost(left[0])]
        best = max(tied, key=_mean_cosine)
        ranked.append(best)
        left.remove(best)
    return ranked, "fastest inside its gates"


def pareto_front(
    candidates: Sequence[QuantizationCandidate],
) -> tuple[QuantizationCandidate, ...]:
    """Return the candidates that no other beats in both time and mean cosine, the fastest first.

    Bytes stand in for time where none was measured. Candidates without a usable embedding are
    left out.
    """
    usable = [item for item in candidates if item.cosine is not None]
    front: list[QuantizationCandidate] = []
    for item in sorted(usable, key=lambda item: (_cost(item), -_mean_cosine(item))):
        if not front or _mean_cosine(item) > _mean_cosine(front[-1]):
            front.append(item)
    return tuple(front)


def _cost(candidate: QuantizationCandidate) -> float:
    return float(candidate.bytes) if candidate.ratio is None else candidate.ratio


def _mean_cosine(candidate: QuantizationCandidate) -> float:
    return -1.0 if candidate.cosine is None else candidate.cosine.value
