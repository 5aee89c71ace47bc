"""What a report shows, as plain data: `report.write_report` turns it into one HTML file.

Shares (R@1, retention) are between 0 and 1 here; the report prints percent.
"""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from edgeclip.profiles.record.measurement import Measurement
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision, Tower

Picture = Image.Image | bytes
Role = Literal["teacher", "student"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One figure that decides: a share with its interval, and the bar it is held against."""

    name: str
    value: Interval
    bar: float
    direction: Literal[">=", "<="]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value itself (not its interval) meets the bar."""
        if self.direction == ">=":
            return self.value.value >= self.bar
        return self.value.value <= self.bar

    @property
    def certain(self) -> bool:
        """Whether the whole interval lies on the side of the bar where the value lies."""
        low, high = self.value.low >= self.bar, self.value.high >= self.bar
        return low == high


@dataclass(frozen=True, slots=True)
class Choice:
    """The precision that a tower ships in, and why."""

    tower: Tower
    precision: Precision
    why: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the run and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionQuality:
    """Retrieval in one direction: shares, and ranks counted from 1."""

    r1: Interval
    r5: float
    r10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuality:
    """Retrieval quality of one model in both directions."""

    name: str
    role: Role
    image_to_text: DirectionQuality
    text_to_image: DirectionQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One model: quality (a share) against latency in ms; the circle's area is its size."""

    name: str
    role: Role
    quality: Interval
    latency_ms: Interval
    bytes: int
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class LossCurve:
    """A series that the training log holds: equally long `steps` and `values`."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"curve {self.name!r}: {len(self.steps)} steps but {len(self.values)} values"
            )


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate and what it is about, such as "image int8"."""

    subject: str
    record: GateRecord


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One of a model's top answers."""

    text: str
    score: float
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryEntry:
    """A test picture (or its PNG, JPEG or WebP bytes) and what both models answered, best first."""

    picture: Picture
    caption: str
    teacher: tuple[ShownAnswer, ...]
    student: tuple[ShownAnswer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that one report shows. An empty part is left out of the page.

    Attributes:
        title: what was made, such as the bundle's name.
        summary: one or two sentences under the title.
        created: ISO 8601, UTC.
        headlines: the figures that decide, most important first.
        choices: the precision chosen for each tower.
        stages: the steps of the run, in order.
        quality: one row per model.
        measurements: latency, throughput, cold start and memory, one row per candidate.
        pareto: points of quality against latency.
        quality_name: what the Pareto picture's quality axis shows.
        latency_name: what its latency axis shows.
        quality_bar: share of quality below which a student is not good enough, if any.
        losses: training curves.
        gates: bounds that were checked before the bundle was written.
        gallery: test pictures with answers.
        failures: pictures that the student gets wrong.
        machine: where it ran.
        commands: what to type to get it again, in order.
        credits: licences and attribution, one sentence each.
    """

    title: str
    summary: str
    created: str
    headlines: tuple[Headline, ...]
    choices: tuple[Choice, ...]
    stages: tuple[Stage, ...]
    quality: tuple[ModelQuality, ...]
    measurements: tuple[Measurement, ...]
    pareto: tuple[ParetoPoint, ...]
    quality_name: str
    latency_name: str
    quality_bar: float | None
    losses: tuple[LossCurve, ...]
    gates: tuple[Gate, ...]
    gallery: tuple[GalleryEntry, ...]
    failures: tuple[GalleryEntry, ...]
    machine: Machine
    commands: tuple[str, ...]
    credits: tuple[str, ...]
