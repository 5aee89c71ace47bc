"""Schema of a profile: MeasurementRun (one JSON file) and the dataclasses inside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from edgeclip.profiles.record.conditions import CpuTime, Interference, MachineConditions
from edgeclip.profiles.workload import Scenario, Workload
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import Machine, detect_machine
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Time and cost of one node of the graph that the engine ran (after its own fusions).

    Attributes:
        name: the engine's name of the node.
        op: operator, such as "MatMul".
        provider: execution provider that ran it.
        ms: median over runs, milliseconds.
        share: share of the sum of all layers, 0 to 1.
        flops: floating-point (or integer) operations of one run, a multiply-add counts as 2;
            None if the shapes do not determine it.
        bytes: least memory traffic: inputs, weights and outputs, each once; None if unknown.
    """

    name: str
    op: str
    provider: str
    ms: float
    share: float
    flops: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Layer times of one tower at batch 1.

    Attributes:
        source: the profiler that reported the times, such as "ONNX Runtime profiling".
        runs: number of profiled runs.
        total_ms: median over runs of the sum of all layers.
        plain_ms: median of runs without profiling; the difference is the profiler's overhead.
        layers: slowest first.
    """

    source: str
    runs: int
    total_ms: float
    plain_ms: float
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Measured peak compute and memory bandwidth of a machine, for the roofline model.

    Attributes:
        threads: number of threads used.
        peak_gflops: (precision, 10^9 operations per second) of a large matrix product, for
            "fp32", "int8" and so on.
        bandwidth_gb_s: 10^9 bytes per second read and written, in a buffer far larger than caches.
        method: how the peaks were measured, in words.
        interference: other load during the measurement; on a disturbed machine the peaks may be
            far too low. None if it was not watched.
    """

    threads: int
    peak_gflops: tuple[tuple[str, Interval], ...]
    bandwidth_gb_s: Interval
    method: str
    interference: Interference | None = None


# "file": from an image file to its embedding; "split": the same with a server's help.
Part = Literal["image", "text", "file", "split"]
StageName = Literal["read", "decode", "resize", "tokenize", "copy", "run", "post", "network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """Number of warm-up runs; `settled` is False if the median was still changing at the end."""

    runs: int
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Percentiles of the wall time of `runs` runs or queries in milliseconds, with 95% intervals.

    With several processes a value is the geometric mean of the processes' own percentiles. A
    percentile above the median is None where too few runs were made to know its interval, see
    `timing_statistics.latency_of`; that of the median is then from 0 to infinity.
    """

    runs: Annotated[int, Ge(1)]
    p50_ms: Interval
    p90_ms: Interval | None
    p95_ms: Interval | None
    p99_ms: Interval | None
    p99_9_ms: Interval | None

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRatio:
    """Median over rounds of this subject's time divided by the reference's, paired by round.

    Over several processes the interval is Student's t over them. Of a single process it is of that
    process alone, and shows nothing of another one.
    """

    reference: str
    ratio: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """Throughput (images or texts per second) and median batch latency at one batch size.

    `threads` are the engine's; None if unknown.
    """

    batch: int
    threads: int | None
    items_per_s: Interval
    p50_ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """Result of one MLPerf LoadGen scenario.

    Attributes:
        scenario: name of the scenario.
        queries: number of completed queries.
        samples_per_query: images or texts in each query.
        seconds: duration of the test.
        latency: time of a query, from its scheduled time (Server), else from its issue; None for
            Offline, which is a single query.
        samples_per_s: images or texts per second.
        target_qps: requested queries per second; Server only.
        bound_ms: latency bound for `bound_percentile` of the queries; Server only.
        bound_percentile: percentile that `bound_ms` limits, in percent; Server only.
        valid: whether LoadGen judged the test valid.
        loadgen_p50_ms: median latency in LoadGen's own log, as a cross-check.
        reasons: why the test is invalid, in LoadGen's words.
        settings: LoadGen settings that differ from its defaults; for Offline also the batch size.
    """

    scenario: Scenario
    queries: int
    samples_per_query: int
    seconds: float
    latency: Latency | None
    samples_per_s: Interval
    target_qps: float | None
    bound_ms: float | None
    bound_percentile: float | None
    valid: bool
    loadgen_p50_ms: float | None
    reasons: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartIntervals:
    """Steps of a cold start in milliseconds, with 95% intervals over processes as in `Latency`.

    `total_ms` is computed from whole starts.
    """

    import_ms: Interval
    load_ms: Interval
    first_run_ms: Interval
    total_ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """Cost of a fresh process that imports the runtime, loads one model and runs it once.

    Times are milliseconds, geometric means over `processes`. `peak_memory_mb` (MB of 10^6 bytes,
    of the whole process, median) is None if the platform does not report it. `intervals` is None
    for a single process.
    """

    processes: int
    import_ms: float
    load_ms: float
    first_run_ms: float
    peak_memory_mb: float | None
    file_bytes: int
    intervals: StartIntervals | None = None

    @property
    def total_ms(self) -> float:
        """Mean of whole starts; slightly different from the sum of the steps' means."""
        if self.intervals is not None:
            return self.intervals.total_ms.value
        return self.import_ms + self.load_ms + self.first_run_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Energy per image or text during continuous runs at batch 1.

    Attributes:
        sensor: name of the sensor.
        covers: what the sensor counts, such as "processor package".
        joules: per item, idle power included.
        idle_watts: power before the runs by the same sensor; None if it was not measured.
    """

    sensor: str
    covers: str
    joules: Interval
    idle_watts: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Time of one stage of a request at batch 1, in milliseconds."""

    name: StageName
    ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The exact model and engine that a measurement belongs to.

    Attributes:
        bundle: name of the bundle; for a peer, its file name.
        sha256: SHA-256 of the bundle's manifest or of the peer's file, 64 hexadecimal digits.
        precision: the precision that ran; None for a peer.
        engine: name of the engine in the `DeviceProfile`.
        provider: execution provider reported by the session, such as "CPUExecutionProvider"; if
            the device allows a fallback, all providers in order of preference.
        threads: number of engine threads.
        bytes_on_disk: size of graph and weights.
        input_shape: shape of the input at batch 1; a text tower's time depends on the sequence
            length.
    """

    bundle: str
    sha256: str
    precision: Precision | None
    engine: str
    provider: str
    threads: int
    bytes_on_disk: int
    input_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """All results of one subject (a part of a bundle in one precision, or a peer's graph).

    Attributes:
        name: unique among the subjects of the same part.
        part: the part of a bundle that runs.
        input_shape: shape of the input at batch 1.
        warm_up: runs before the timed ones.
        latency: percentiles at batch 1, in runs interleaved with those of the other subjects.
        ratio: its time / the reference subject's time, round by round.
        sweep: throughput by batch size and threads.
        cpu, contended: where the time went, see `CpuTime`.
        samples_ms: wall time of each run behind `latency`, one tuple for each process; entry i
            is from round i, in which every subject ran once. In an export a load of the engine
            takes the place of a process.
        identity: None if the target is no bundle or file.
        cold_start, scenarios, energy, stages, layers: present if requested.
        peak_memory_mb: peak memory of a process that runs this subject alone, in 10^6 bytes.
        missing: (name, reason) of what could not be measured, such as ("energy", "no sensor").
    """

    name: str
    part: Part
    input_shape: tuple[int, ...]
    warm_up: WarmUp
    latency: Latency
    ratio: PairedRatio | None
    sweep: tuple[SweepPoint, ...]
    cpu: CpuTime
    contended: bool | None
    samples_ms: tuple[tuple[float, ...], ...] = ()
    identity: Identity | None = None
    cold_start: ColdStart | None = None
    scenarios: tuple[ScenarioResult, ...] = ()
    energy: Energy | None = None
    stages: tuple[StageTime, ...] = ()
    layers: LayerProfile | None = None
    peak_memory_mb: float | None = None
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Run times of a small fixed graph, interleaved with the subjects: how fast the machine was.

    The machine's speed may change between two profiles; dividing by the yardstick cancels it.

    Attributes:
        name: name of the graph; only times of graphs with the same name may be compared.
        samples_ms: run times, as in `Measurement`.
    """

    name: str
    samples_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRun(JsonRecord):
    """One profile: the measurements with machine, workload and conditions, enough to repeat it.

    Attributes:
        created: time in UTC, ISO 8601.
        command: the command line that the user typed.
        workload: batch sizes, repeats and processes.
        machine: hardware, operating system and package versions.
        measurements: one for each subject.
        device: the device profile that chose the engine; None if subjects had different ones.
        before, after: clocks and temperatures before and after the timed runs.
        interference: other load during the measurement.
        yardstick: None if no yardstick ran.
        roofline: peak speed of this machine; None if it was not measured.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "measurements"
    HINT: ClassVar[str] = "measure again with `edgeclip profile`"

    created: str
    command: str
    workload: Workload
    machine: Machine
    measurements: tuple[Measurement, ...]
    device: DeviceProfile | None = None
    before: MachineConditions | None = None
    after: MachineConditions | None = None
    interference: Interference | None = None
    yardstick: Yardstick | None = None
    roofline: Roofline | None = None


def measurement_run(
    measurements: Sequence[Measurement], *, workload: Workload, command: str
) -> MeasurementRun:
    """Wrap measurements in a MeasurementRun with this machine and the current time."""
    return MeasurementRun(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        workload=workload,
        machine=detect_machine(),
        measurements=tuple(measurements),
    )
