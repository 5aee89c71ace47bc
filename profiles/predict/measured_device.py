"""MeasuredDevice: what each block of a tower costs on one device, as a JSON file.

Files that come with the package lie in `profiles/measured/`, and are found by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import edgeclip.profiles
from edgeclip.profiles.predict.tower_shapes import BlockCount, TowerBlock
from edgeclip.profiles.record.conditions import Interference, MachineConditions
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.device.schema import unknown_name_error
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What one block adds to a tower's time at batch 1.

    Attributes:
        probe: name of the probe that measured it.
        piece: the block.
        precision: precision of the graph; blocks that stay float in int8 are measured in fp32 only.
        ms: median, with its 95% interval.
        samples_ms: one value a round; empty where the cost was transferred from another device.
        few: its probe is one of the few that a transfer needs.
    """

    probe: str
    piece: TowerBlock
    precision: Precision
    ms: Interval
    samples_ms: tuple[float, ...]
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckTime:
    """Measured time of a whole tower, which predictions are checked against.

    Attributes:
        name: name of the tower.
        precision: precision of its graph.
        parts: its blocks.
        ms: median at batch 1, with its 95% interval.
    """

    name: str
    precision: Precision
    parts: tuple[BlockCount, ...]
    ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferAccuracy:
    """How well costs can be believed that were transferred from another device.

    Attributes:
        source: name of that device.
        probes: how many blocks were measured on both.
        error: median over those of the relative error with which the others predict each of them.
        bound: conformal bound of these errors (each left out in its turn), see `level`.
        level: share of blocks that the bound is for; with fewer than nine blocks below 0.9.
    """

    source: str
    probes: int
    error: float
    bound: float
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice(JsonRecord):
    """What each block of a tower costs on one device.

    Attributes:
        name: what people call it.
        created: ISO 8601 in UTC.
        command: what was typed.
        device: the profile that it was measured with.
        machine: where it was measured, with versions of packages.
        rounds: timed rounds; sample i of every block is of round i of its group.
        costs: costs of the blocks.
        checks: times of whole towers.
        before, after: clocks and temperatures around the timed runs.
        interference: what else the machine did meanwhile.
        carried: source and accuracy of transferred costs; None if every cost was measured here.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "a measured device"
    HINT: ClassVar[str] = "measure again with `edgeclip measure-probes`"

    name: str
    created: str
    command: str
    device: DeviceProfile
    machine: Machine
    rounds: int
    costs: tuple[BlockCost, ...]
    checks: tuple[CheckTime, ...]
    before: MachineConditions | None = None
    after: MachineConditions | None = None
    interference: Interference | None = None
    carried: TransferAccuracy | None = None

    def __post_init__(self) -> None:
        if not self.costs:
            raise ValueError("a measured device needs costs of some blocks")

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that were measured."""
        return tuple(dict.fromkeys(cost.precision for cost in self.costs))


def load_measured(name_or_path: str | Path) -> MeasuredDevice:
    """Read a measured device, by name if it comes with the package, else by path.

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
    raise unknown_name_error("measured device", text, names, file)


def measured_names() -> tuple[str, ...]:
    """Names of the measured devices that come with the package."""
    return tuple(sorted(path.stem for path in _folder().glob("*.json")))


def _folder() -> Path:
    return Path(edgeclip.profiles.__path__[0]) / "measured"
