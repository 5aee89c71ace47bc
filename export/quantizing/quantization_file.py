"""`quantization.json`: the config that a search chose for each tower, for `edgeclip export`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from edgeclip.compress.sources import Source
from edgeclip.export.gates import data_record
from edgeclip.export.quantizing.config import (
    Config,
    default_config,
    precision_of,
)
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.machine import detect_machine
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.spec import Precision, Tower

FILE_NAME = "quantization.json"

_MEND = "search again with `edgeclip quantize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerQuantization:
    """What was chosen for a tower.

    Attributes:
        config: the choice; fp32 says that nothing else is worth shipping.
        graph: `sha256_graph` of the fp32 graph that its names of nodes belong to.
        passes: rewrites that this graph has, in order.
        why: it and no other.
    """

    config: Config
    graph: str
    passes: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBasis:
    """What the choices hold for.

    Attributes:
        device: name of its profile.
        machine: the processor that configs were timed on; None where none was timed.
        pairs: how many calibration pairs were asked for (of emoji scenes; a folder has its own).
        ranges: on how many of them ranges were to be found; see `open_calibration`.
        calibration: sha256 of the identity of the pairs that ranges were found on.
    """

    device: str
    machine: str | None
    pairs: int
    ranges: int
    calibration: str

    @classmethod
    def of(
        cls, device: DeviceProfile, found: Source, *, pairs: int, ranges: int, timed: bool
    ) -> "SearchBasis":
        """Return that of a search with ranges found on `found`, on this machine."""
        return cls(
            device=device.name,
            machine=detect_machine().cpu if timed else None,
            pairs=pairs,
            ranges=ranges,
            calibration=data_record(found).sha256,
        )

    def check(self, device: DeviceProfile, found: Source) -> None:
        """Refuse what was not searched: what is made of it would not be what was judged.

        Raises:
            ConfigError: another device or machine, or other pairs to find ranges on.
        """
        asked = SearchBasis.of(
            device, found, pairs=self.pairs, ranges=self.ranges, timed=self.machine is not None
        )
        if asked.device != self.device:
            raise ConfigError(
                f"{FILE_NAME} is for the device {self.device!r}, not {device.name!r}: name that "
                f"--device, or {_MEND}"
            )
        if asked.machine != self.machine:
            raise ConfigError(
                f"{FILE_NAME} was timed on {self.machine}, and this is {asked.machine}: {_MEND} "
                "here, or name a --device for both"
            )
        if asked.calibration != self.calibration:
            raise ConfigError(
                f"{FILE_NAME} has ranges of other pairs than {found.name}: name the --data that "
                f"was searched with, as it was, or {_MEND}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization(JsonRecord):
    """The choices for a device.

    Attributes:
        basis: what they hold for.
        towers: those that were searched.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = FILE_NAME
    MEND: ClassVar[str] = _MEND

    basis: SearchBasis
    towers: Mapping[Tower, TowerQuantization]

    def config_for(
        self, tower: Tower, precision: Precision, device: DeviceProfile
    ) -> Config | None:
        """What a tower is turned into in a precision; None where the search found no use in it."""
        found = self.towers.get(tower)
        if found is None:
            return default_config(precision, device)
        if precision_of(found.config) == precision:
            return found.config
        return None if precision == "int8" else default_config(precision, device)
