"""What was measured, on which machine, by which command: data with a JSON round trip."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.machine import Machine
from edgeclip.profiles.schema import parse
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.cpu_time import CpuTime
from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.spec import Tower

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """Runs before the timed ones. `settled` is False if the median was still moving."""

    runs: int
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Wall time of one run at batch 1, in milliseconds, over `runs` timed runs."""

    runs: int
    p50_ms: Interval
    p90_ms: Interval
    p99_ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRatio:
    """Median over rounds of this candidate's time divided by the reference's."""

    reference: str
    ratio: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Images or texts per second when run in batches of `batch`."""

    batch: int
    items_per_s: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """A fresh process that loads one model and runs it once; medians over `processes`.

    Times are in milliseconds. `peak_memory_mb` (MB of 10^6 bytes, the whole process) is
    None where the platform does not report it.
    """

    processes: int
    import_ms: float
    load_ms: float
    first_run_ms: float
    peak_memory_mb: float | None
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One candidate (a tower in some precision on some engine) under one workload.

    `input_shape` is the shape at batch 1; a text tower's time depends on its length.
    """

    name: str
    tower: Tower
    input_shape: tuple[int, ...]
    warm_up: WarmUp
    latency: Latency
    ratio: PairedRatio | None
    throughput: tuple[Throughput, ...]
    cpu: CpuTime
    contended: bool | None
    cold_start: ColdStart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRun:
    """Everything needed to believe, and to repeat, some measurements.

    `created` is ISO 8601 in UTC. Versions of packages are part of `machine`.
    """

    schema_version: int
    created: str
    command: str
    workload: Workload
    machine: Machine
    measurements: tuple[Measurement, ...]

    def to_json(self) -> str:
        """This run as indented JSON; `from_json` gives an equal object back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, *, source: str) -> "MeasurementRun":
        """Read what `to_json` wrote; `source` names it in messages.

        Raises:
            ConfigError: not JSON, another schema version, or not a measurement run.
        """
        try:
            data: Any = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{source} is not JSON: {error}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{source}: measurement schema {version!r} is not {SCHEMA_VERSION}: "
                "measure again, or read it with the version of edgeclip that wrote it"
            )
        return parse(MeasurementRun, data, source=source)

    def save(self, path: Path) -> None:
        """Write `to_json` to `path`, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "MeasurementRun":
        """Read what `save` wrote.

        Raises:
            ConfigError: missing, unreadable or invalid file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text: {error}") from None
        return MeasurementRun.from_json(text, source=str(path))
