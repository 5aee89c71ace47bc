"""MeasuredDevice: a device whose pieces of towers were timed, so that any tower's time follows.

Files of them are kept in `profiles/measured/`, and are found there by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import edgeclip.profiles
from edgeclip.profiles.predict.tower_shapes import Part, Piece
from edgeclip.profiles.record.conditions import Conditions, Interference
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.device.schema import unknown_name
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceCost:
    """What one piece adds to a tower's time at batch 1.

    Attributes:
        probe: name of the probe that told.
        piece: which one.
        precision: of the graph; pieces that stay float in int8 are measured in fp32 only.
        ms: median, with its 95% interval.
        samples_ms: one value a round; empty where the time was carried over.
        few: its probe is one of the few.
    """

    probe: str
    piece: Piece
    precision: Precision
    ms: Interval
    samples_ms: tuple[float, ...]
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckTime:
    """Measured time of a whole tower that no prediction was made from.

    Attributes:
        name: of the tower.
        precision: of its graph.
        parts: what it consists of.
        ms: median at batch 1, with its 95% interval.
    """

    name: str
    precision: Precision
    parts: tuple[Part, ...]
    ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Where times come from that were not measured on the device itself.

    Attributes:
        source: name of the device that they were carried over from.
        probes: how many were measured on both.
        error: median over those of the relative error with which the others tell each of them.
        worst: the largest of these.
    """

    source: str
    probes: int
    error: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice(JsonRecord):
    """A device, and what each piece of a tower costs there.

    Attributes:
        name: what people call it.
        created: ISO 8601 in UTC.
        command: what was typed.
        device: the profile that it was measured with.
        machine: where; versions of packages are part of it.
        rounds: timed rounds; sample i of every piece is of round i of its group.
        costs: of the pieces.
        checks: of whole towers.
        before, after: clocks and temperatures around the timed runs.
        interference: what else the machine did meanwhile.
        carried: None where every cost was measured.
    """

    WHAT: ClassVar[str] = "a measured device"
    MEND: ClassVar[str] = "measure again with `edgeclip measure-probes`"

    name: str
    created: str
    command: str
    device: DeviceProfile
    machine: Machine
    rounds: int
    costs: tuple[PieceCost, ...]
    checks: tuple[CheckTime, ...]
    before: Conditions | None = None
    after: Conditions | None = None
    interference: Interference | None = None
    carried: Carried | None = None

    def __post_init__(self) -> None:
        if not self.costs:
            raise ValueError("a measured device needs costs of some pieces")

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those that were measured."""
        return tuple(dict.fromkeys(cost.precision for cost in self.costs))


def load_measured(name_or_path: str | Path) -> MeasuredDevice:
    """Read a measured device: one that comes with the package by name, any other by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or a bad file.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.lower().endswith(".json") or "/" in text:
        return MeasuredDevice.load(Path(name_or_path))
    names = measured_names()
    if text in names:
        return MeasuredDevice.load(_folder() / f"{text}.json")
    file = "a file that `edgeclip measure-probes` wrote"
    raise unknown_name("measured device", text, names, file)


def measured_names() -> tuple[str, ...]:
    """Names that `load_measured` knows."""
    return tuple(sorted(path.stem for path in _folder().glob("*.json")))


def _folder() -> Path:
    return Path(edgeclip.profiles.__path__[0]) / "measured"
