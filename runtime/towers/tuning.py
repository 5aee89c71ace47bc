"""What `edgeclip tune` found fastest for a bundle on this machine, kept in this user's cache.

A choice holds for the bundle's very manifest, this processor and the installed versions of the
engines; with any of these changed it is not used.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import JsonRecord, cache_root
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import ConfigError, first_line
from edgeclip.runtime.spec import Precision, Tower

_log = logging.getLogger(__name__)
_ENGINE_PACKAGES = ("onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedTower:
    """The fastest configuration to run one tower.

    Attributes:
        tower: which one.
        precision: one that the bundle holds.
        device: engine, threads and what else decides; its `batch_max` is the best batch where
            throughput was asked for.
        batch: rows that ran at a time when it was measured.
        ms_per_row: median time of a batch, divided by its rows.
    """

    tower: Tower
    precision: Precision
    device: DeviceProfile
    batch: Annotated[int, Ge(1)]
    ms_per_row: Annotated[float, Gt(0)]

    def __str__(self) -> str:
        return f"{self.tower} tower: {describe_config(self.device, self.precision)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(JsonRecord):
    """The choices for a bundle's towers.

    Attributes:
        bundle: SHA-256 of its manifest, which holds those of all its files.
        machine: what they were measured on, see `machine_state`.
        towers: at most one choice for each tower.
        command: what was typed.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "tuning"
    HINT: ClassVar[str] = "run `edgeclip tune` again"

    bundle: str
    machine: str
    towers: tuple[TunedTower, ...]
    command: str

    def __post_init__(self) -> None:
        names = [item.tower for item in self.towers]
        if len(set(names)) != len(names):
            raise ValueError("towers must not repeat one")

    def of(self, tower: Tower) -> TunedTower | None:
        """Return the choice for a tower, if there is one."""
        return next((item for item in self.towers if item.tower == tower), None)

    def with_towers(self, towers: tuple[TunedTower, ...], *, command: str) -> "Tuning":
        """Return it with new choices, which take the place of those of the same towers."""
        new = {item.tower for item in towers}
        kept = tuple(item for item in self.towers if item.tower not in new)
        return replace(self, towers=(*kept, *towers), command=command)


def describe_config(device: DeviceProfile, precision: Precision) -> str:
    """Return words such as "openvino int8 in bfloat16, 2 threads"."""
    rounded = " in bfloat16" if device.bfloat16 else ""
    threads = f", {device.threads} thread{'s' * (device.threads > 1)}" if device.on_cpu else ""
    return f"{device.engine} {precision}{rounded}{threads}"


def machine_state() -> str:
    """Return a hash of what decides about speed here: processor, cores, versions of engines."""
    machine = detect_machine()
    versions = [item for item in machine.packages if item[0].startswith(_ENGINE_PACKAGES)]
    parts = [machine.cpu, machine.cores, machine.flags, versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tuning_path(bundle: Bundle) -> Path:
    """Return where the choices for a bundle are kept, in `$EDGECLIP_CACHE`."""
    return cache_root() / "tuned" / f"{bundle.sha256}.json"


def find_tuning(bundle: Bundle) -> Tuning | None:
    """Return the choices for a bundle, if there are any that hold here and now.

    Logs a warning if there are some that do not.
    """
    path = tuning_path(bundle)
    if not path.is_file():
        return None
    try:
        found = Tuning.load(path)
    except ConfigError as error:
        _log.warning(
            "tuning is not used: %s; run `edgeclip tune %s` again", first_line(error), bundle.path
        )
        return None
    if found.bundle != bundle.sha256 or found.machine != machine_state():
        _log.warning(
            "tuning is not used: it was made on another processor or with other versions of the "
            "engines; run `edgeclip tune %s` again, or with --forget",
            bundle.path,
        )
        return None
    return found
