"""`quantization.json`: the config that a search chose for each tower, for `edgeclip export`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from edgeclip.compress.sources import Source
from edgeclip.export.gates import data_record
from edgeclip.export.quantizing.config import (
    Config,
    config_from_data,
    config_to_data,
    default_config,
    precision_of,
)
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.machine import detect_machine
from edgeclip.profiles.schema import parse
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.spec import Precision, Tower

FILE_NAME = "quantization.json"

_VERSION = 1
_MEND = "search again with `edgeclip quantize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerQuantization:
    """What was chosen for a tower.

    Attributes:
        config: the choice; fp32 says that nothing else is worth shipping.
        graph: of the fp32 graph that its names of nodes belong to; see `graph_sha256`.
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
class Quantization:
    """The choices for a device.

    Attributes:
        basis: what they hold for.
        towers: those that were searched.
    """

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

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        data = {
            "schema_version": _VERSION,
            **asdict(self.basis),
            "towers": {
                tower: {
                    "config": config_to_data(item.config),
                    **asdict(_Rest(item.graph, item.passes, item.why)),
                }
                for tower, item in self.towers.items()
            },
        }
        with atomic_file(path) as temporary:
            text = json.dumps(data, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Quantization":
        """Read what `save` wrote.

        Raises:
            ConfigError: missing, unreadable or invalid.
        """
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON ({error}): {_MEND}") from None
        if not isinstance(data, Mapping) or data.get("schema_version") != _VERSION:
            raise ConfigError(f"{path} is no {FILE_NAME} of version {_VERSION}: {_MEND}")
        rest = {name: data[name] for name in data if name not in ("schema_version", "towers")}
        basis = parse(SearchBasis, rest, source=str(path))
        towers = data.get("towers")
        known = get_args(Tower)
        if not isinstance(towers, Mapping) or not set(towers) <= set(known):
            raise ConfigError(f"{path}: towers must map {' and '.join(known)} to configs: {_MEND}")
        return cls(
            basis=basis,
            towers={name: _read(item, f"{path}, {name} tower") for name, item in towers.items()},
        )


@dataclass(frozen=True, slots=True)
class _Rest:
    """All of a tower's choice but its config."""

    graph: str
    passes: tuple[str, ...]
    why: str


def _read(data: object, source: str) -> TowerQuantization:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected a mapping of keys to values")
    rest = parse(_Rest, {key: data[key] for key in data if key != "config"}, source=source)
    return TowerQuantization(
        config=config_from_data(data.get("config"), source=source),
        graph=rest.graph,
        passes=rest.passes,
        why=rest.why,
    )
