"""What was measured, on which machine, by which command: data with a JSON round trip."""

from dataclasses import dataclass
from typing import ClassVar

from edgeclip.profiles.machine import Machine
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.measuring.cpu_time import CpuTime
from edgeclip.runtime.spec import Tower


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
class MeasurementRun(JsonRecord):
    """Everything needed to believe, and to repeat, some measurements.

    `created` is ISO 8601 in UTC. Versions of packages are part of `machine`.
    """

    WHAT: ClassVar[str] = "measurements"
    MEND: ClassVar[str] = "measure again"

    created: str
    command: str
    workload: Workload
    machine: Machine
    measurements: tuple[Measurement, ...]
